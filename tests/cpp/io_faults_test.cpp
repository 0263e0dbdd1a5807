// Faults at every call of a transfer: an error that names file and offset, or the right bytes; never a hang, wrong
// bytes taken for right ones, or something left behind.

#include <gtest/gtest.h>
#include <unistd.h>

#include <optional>
#include <set>

#include "io/errors.h"
#include "io_support.h"

namespace slidecore {
namespace {

using namespace testing_support;
using Call = HookedCalls::Call;

bool moves_bytes(const Call& call) {
  return is(call, "pread") || is(call, "pwrite");
}

class FaultsTest : public EachBackend {
 protected:
  void SetUp() override {
    EachBackend::SetUp();
    if (IsSkipped()) return;
    SCOPED_TRACE(seed_text(seed_));
    threads_ = threads_now();
    files_ = open_files();
    StorageOptions chosen;
    chosen.stripe_bytes = 32768;
    chosen.calls = calls_;
    storage_ = std::make_shared<Storage>(directories_.names, chosen);
    storage_->reserve(4'000'000);
  }
  void TearDown() override {
    if (IsSkipped()) return;
    calls_->set(nullptr);
    EXPECT_EQ(storage_.use_count(), 1);
    storage_.reset();
    expect_no_more_threads(threads_);
    EXPECT_EQ(open_files(), files_);
    EXPECT_TRUE(directories_.files().empty());
    EXPECT_NO_THROW(Storage{directories_.names}) << "a lock was left";
  }
  std::unique_ptr<Transfers> make(double patience_s = 30) const {
    TransferOptions chosen = options();
    chosen.patience_s = patience_s;
    return std::make_unique<Transfers>(storage_, chosen);
  }
  // Writes and reads, aligned or not, until `faults` says that it has seen enough; all bytes must be right.
  void expect_right_bytes(Transfers& transfers, const std::function<bool()>& enough) {
    for (int round = 0; round < 200 && !enough(); ++round) {
      const auto bytes = draw<std::size_t>(random_, 1, 200'000);
      const auto offset = draw<std::size_t>(random_, 0, 1) * draw<std::size_t>(random_, 0, 5000);
      const auto region = storage_->allocate("round " + std::to_string(round), offset + bytes + 100);
      Memory source(bytes), target(bytes);
      randomize(source.data(), bytes, random_);
      transfers.wait(transfers.write(region, offset, source.data(), bytes));
      transfers.wait(transfers.read(region, offset, target.data(), bytes));
      ASSERT_EQ(target.bytes(), source.bytes()) << "round " << round;
    }
    EXPECT_TRUE(enough());
  }

  unsigned seed_ = new_seed();
  Random random_{seed_};
  Directories directories_{2};
  std::shared_ptr<HookedCalls> calls_ = std::make_shared<HookedCalls>();
  std::shared_ptr<Storage> storage_;
  std::size_t threads_ = 0, files_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Backends, FaultsTest, ::testing::Values("uring", "threads"), backend_name);

TEST_P(FaultsTest, AnErrorOfTheDriveIsThrownByEveryLaterCall) {
  for (const int code : {EIO, ENOSPC, EROFS, EBADF, ENOMEM}) {
    for (const bool write : {false, true}) {
      const auto transfers = make();
      Memory memory(300'000, 1);
      const auto region = storage_->allocate("layers.7.exp_avg", memory.size());
      std::atomic<int> left{5};
      calls_->set([&](const Call& call) -> long {
        return moves_bytes(call) && call.write == write && left.fetch_sub(1) == 1 ? -code : HookedCalls::kPass;
      });
      const auto start = [&] {
        return write ? transfers->write(region, 0, memory.data(), memory.size())
                     : transfers->read(region, 0, memory.data(), memory.size());
      };
      const Ticket ticket = start();
      const std::vector<std::string> parts = {write ? "writing" : "reading", "slidecore-swap.", "at offset ",
                                              "'layers.7.exp_avg'", io::errno_text(code)};
      expect_error(Code::io, parts, [&] { transfers->wait(ticket); });
      expect_error(Code::io, parts, [&] { transfers->wait(ticket); });
      expect_error(Code::io, parts, [&] { transfers->done(ticket); });
      expect_error(Code::io, parts, [&] { transfers->synchronize(); });
      expect_error(Code::io, parts, [&] { transfers->check(); });
      expect_error(Code::io, parts, [&] { start(); });
      calls_->set(nullptr);
      // The Storage is as good as before.
      const auto next = make();
      next->wait(next->write(region, 0, memory.data(), memory.size()));
    }
  }
}

TEST_P(FaultsTest, AnErrorNamesTheFileAndTheOffset) {
  const auto transfers = make();
  Memory memory(65536);
  storage_->allocate("filler", 1);  // given back at once
  const auto region = storage_->allocate("plane", 65536);
  ASSERT_EQ(region->base(), 0u);
  // The second stripe lies at the beginning of the second file.
  const std::string where = "of " + storage_->files()[1];
  std::atomic<int> count{0};
  calls_->set([&](const Call& call) { return call.write && count++ == 0 ? -EIO : HookedCalls::kPass; });
  expect_error(Code::io, {where, "writing 16384 bytes at offset 16384", "bytes 49152 to 65536"},
               [&] { transfers->wait(transfers->write(region, 49152, memory.data(), 16384)); });
}

TEST_P(FaultsTest, ShortTransfersContinue) {
  std::mutex mutex;
  Random random(seed_ + 1);
  std::atomic<int> shortened{0};
  calls_->set([&](const Call& call) -> long {
    if (!moves_bytes(call)) return HookedCalls::kPass;
    const std::lock_guard lock(mutex);
    if (draw(random, 0, 2) != 0) return HookedCalls::kPass;
    ++shortened;
    return draw<long>(random, 1, 20'000);  // of any length: nothing aligned about it
  });
  {
    const auto transfers = make();
    expect_right_bytes(*transfers, [&] { return shortened > 300; });
    EXPECT_GT(transfers->counters().short_transfers, 0u);
  }
}

TEST_P(FaultsTest, StormsOfInterruptionsAndBusyDrivesAreRetried) {
  std::mutex mutex;
  Random random(seed_ + 1);
  std::atomic<int> refused{0};
  calls_->set([&](const Call& call) -> long {
    if (!moves_bytes(call)) return HookedCalls::kPass;
    const std::lock_guard lock(mutex);
    const int kind = draw(random, 0, 3);
    if (kind > 1) return HookedCalls::kPass;
    ++refused;
    return kind == 0 ? -EINTR : -EAGAIN;
  });
  {
    const auto transfers = make();
    expect_right_bytes(*transfers, [&] { return refused > 500; });
    EXPECT_GT(transfers->counters().retries, 0u);
  }
}

TEST_P(FaultsTest, AStormThatDoesNotEndIsAnError) {
  for (const long answer : {-EAGAIN, -EINTR, 1}) {
    calls_->set([&](const Call& call) { return moves_bytes(call) ? answer : HookedCalls::kPass; });
    const auto transfers = make(0.05);
    Memory memory(10'000);
    const auto region = storage_->allocate("plane", 10'000);
    const auto again = [&] { transfers->wait(transfers->write(region, 0, memory.data(), 10'000)); };
    expect_error(Code::io, {"slidecore-swap.", "again and again"}, again);
  }
}

TEST_P(FaultsTest, AStormDoesNotHoldUpTheEnd) {
  calls_->set([](const Call& call) { return moves_bytes(call) ? -EAGAIN : HookedCalls::kPass; });
  Memory memory(300'000);
  const auto region = storage_->allocate("plane", memory.size());
  const auto transfers = make(1e9);  // patience for longer than the test's limit
  transfers->write(region, 0, memory.data(), memory.size());
}

// One drive answers nothing for a while. The other goes on, waiting callers wait, and then all is right. The ring's one
// thread cannot be held inside a call, so there the drive is busy for as long.
TEST_P(FaultsTest, AStalledDriveDelaysAndHarmsNothing) {
  const bool ring = std::string(GetParam()) == "uring";
  const auto transfers = make();
  Memory memory(16384, 9), other(200'000, 8), seen(16384);
  const auto stalled = storage_->allocate("on the first drive", 32768);
  const auto filler = storage_->allocate("between", 65536), passing = storage_->allocate("on the second", 32768);
  ASSERT_EQ(stalled->base(), 0u);
  ASSERT_EQ(passing->base(), 3 * 32768u);
  Gate gate;
  std::atomic<bool> over{false};
  calls_->set([&](const Call& call) -> long {
    if (!call.write || call.offset >= 32768 || over) return HookedCalls::kPass;
    if (ring) return -EAGAIN;
    gate.pass();
    return HookedCalls::kPass;
  });
  const Ticket ticket = transfers->write(stalled, 0, memory.data(), memory.size());
  if (!ring) gate.wait_for_arrival();
  for (int i = 0; i < 20; ++i) transfers->wait(transfers->write(passing, 0, other.data(), 32768));
  EXPECT_FALSE(transfers->done(ticket));
  over = true;
  gate.open();
  transfers->wait(ticket);
  transfers->wait(transfers->read(stalled, 0, seen.data(), seen.size()));
  EXPECT_EQ(seen.bytes(), memory.bytes());
}

class ThreadFaultsTest : public FaultsTest {};
INSTANTIATE_TEST_SUITE_P(Backends, ThreadFaultsTest, ::testing::Values("threads"), backend_name);

// An error while another drive is still at work: nobody is told before that work has ended, since told callers free
// their memory.
TEST_P(ThreadFaultsTest, AnErrorWaitsForWhatIsUnderWay) {
  const auto transfers = make();
  Memory memory(65536);
  const auto region = storage_->allocate("two stripes", 65536);
  Gate gate;
  std::atomic<bool> opened{false};
  calls_->set([&](const Call& call) -> long {
    if (!call.write) return HookedCalls::kPass;
    if (call.offset == 0) {
      gate.wait_for_arrival();
      return -EIO;
    }
    gate.pass();
    return HookedCalls::kPass;
  });
  const Ticket ticket = transfers->write(region, 0, memory.data(), 65536);
  std::jthread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    transfers->check();  // not told yet
    EXPECT_FALSE(transfers->done(ticket));
    opened = true;
    gate.open();
  });
  expect_error(Code::io, {"at offset 0"}, [&] { transfers->wait(ticket); });
  EXPECT_TRUE(opened.load());
}

TEST_P(FaultsTest, ATruncatedFileIsAnError) {
  const auto transfers = make();
  const auto region = storage_->allocate("plane", 200'000);
  Memory memory(200'000, 5);
  transfers->wait(transfers->write(region, 0, memory.data(), memory.size()));
  for (const std::size_t length : {20'000u, 16384u, 1000u, 0u}) {
    ASSERT_EQ(truncate(storage_->files()[0].c_str(), static_cast<off_t>(length)), 0);
    const auto reader = make();
    expect_error(Code::io, {storage_->files()[0], "truncated"},
                 [&] { reader->wait(reader->read(region, 0, memory.data(), memory.size())); });
    const auto writer = make();
    if (length % 16384 == 0) continue;
    // So is a part of a block, whose rest would have to be read.
    const auto offset = length / 32768 * 65536 + length % 32768 + 10;
    expect_error(Code::io, {storage_->files()[0], "truncated"},
                 [&] { writer->wait(writer->write(region, offset, memory.data(), 100)); });
  }
}

// A write behind the cut makes the file longer again, and the hole would read as zeros. That it does not become as long
// as it was is what tells.
TEST_P(FaultsTest, ATruncatedFileStaysOneWhateverIsWritten) {
  const auto region = storage_->allocate("all of it", storage_->reserved_bytes());
  Memory memory(region->size(), 5);
  const auto at_end = [&](Transfers& transfers, const std::string& drive) {
    // The last stripe of each file.
    const std::size_t from = region->size() - (drive == storage_->files()[0] ? 65536 : 32768);
    return transfers.write(region, from, memory.data(), 32768);
  };
  const auto first = make();
  first->wait(first->write(region, 0, memory.data(), memory.size()));
  const std::string file = storage_->files()[0];
  // While a write is under way: whether it is told depends on which of its pieces comes first, but the next transfer
  // is, on whichever drive.
  std::atomic<bool> cut{false};
  calls_->set([&](const Call& call) -> long {
    if (call.write && !cut.exchange(true)) {
      EXPECT_EQ(truncate(file.c_str(), 4096), 0);
    }
    return HookedCalls::kPass;
  });
  try {
    first->wait(at_end(*first, file));
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::io) << error.what();
  }
  EXPECT_TRUE(cut);
  const std::vector<std::string> parts = {"'all of it'", "at offset ", "of " + file, "truncated"};
  expect_error(Code::io, parts, [&] { first->wait(first->read(region, 4096, memory.data(), 4096)); });
  expect_error(Code::io, parts, [&] { first->check(); });
  const std::function<Ticket(Transfers&)> starts[] = {
      [&](Transfers& t) { return t.read(region, 0, memory.data(), 4096); },
      [&](Transfers& t) { return t.read(region, 32768, memory.data(), 4096); },  // of the other drive
      [&](Transfers& t) { return t.read(region, region->size() - 65536, memory.data(), 32768); },
      [&](Transfers& t) { return t.write(region, 0, memory.data(), 4096); },
      [&](Transfers& t) { return t.write(region, 32768, memory.data(), 4096); },
      [&](Transfers& t) { return at_end(t, file); }};
  for (const auto& start : starts) {
    const auto transfers = make();
    expect_error(Code::io, parts, [&] { transfers->wait(start(*transfers)); });
  }
  // Nor does growing or shrinking hide it.
  const std::vector<std::string> ends = {"at offset ", "of " + file, "truncated"};
  expect_error(Code::io, ends, [&] { storage_->reserve(storage_->reserved_bytes() + 1); });
  storage_->trim();
  const auto last = make();
  expect_error(Code::io, parts, [&] { last->wait(last->read(region, 0, memory.data(), 4096)); });
}

// Truncated between the request and its answer: what was read may be zeros.
TEST_P(FaultsTest, AReadBesideATruncationIsNotBelieved) {
  const auto region = storage_->allocate("plane", 200'000);
  Memory memory(200'000, 5);
  const auto transfers = make();
  transfers->wait(transfers->write(region, 0, memory.data(), memory.size()));
  std::atomic<bool> cut{false};
  calls_->set([&](const Call& call) -> long {
    if (is(call, "pread") && !cut.exchange(true)) {
      const off_t length = static_cast<off_t>(std::filesystem::file_size(storage_->files()[1]));
      EXPECT_EQ(truncate(storage_->files()[1].c_str(), length - 1), 0);
    }
    return HookedCalls::kPass;
  });
  expect_error(Code::io, {"reading 'plane'", "of " + storage_->files()[1], "truncated"},
               [&] { transfers->wait(transfers->read(region, 0, memory.data(), memory.size())); });
}

// One look for each transfer and drive, however many requests it takes.
TEST_P(FaultsTest, FilesAreLookedAtOnceForEachTransfer) {
  const auto region = storage_->allocate("plane", 1'000'000);
  Memory memory(1'000'000, 5);
  std::atomic<int> looks{0};
  calls_->set([&](const Call& call) -> long {
    looks += is(call, "size") ? 1 : 0;
    return HookedCalls::kPass;
  });
  const auto transfers = make();
  transfers->wait(transfers->write(region, 0, memory.data(), memory.size()));
  EXPECT_EQ(looks, 2);
  transfers->wait(transfers->read(region, 0, memory.data(), memory.size()));
  EXPECT_EQ(looks, 4);
  calls_->set([&](const Call& call) { return is(call, "size") ? -EIO : HookedCalls::kPass; });
  expect_error(Code::io, {"how long", storage_->files()[0], io::errno_text(EIO)},
               [&] { transfers->wait(transfers->read(region, 0, memory.data(), 4096)); });
}

TEST_P(FaultsTest, EndWhileEverythingFails) {
  std::mutex mutex;
  Random random(seed_ + 1);
  calls_->set([&](const Call& call) -> long {
    if (!moves_bytes(call)) return HookedCalls::kPass;
    const std::lock_guard lock(mutex);
    constexpr long kAnswers[] = {
        -EIO, -EAGAIN, -EINTR, 4096, 1, HookedCalls::kPass, HookedCalls::kPass, HookedCalls::kPass};
    return kAnswers[draw(random, 0, 7)];
  });
  for (int round = 0; round < 30; ++round) {
    Memory memory(400'000);
    const auto region = storage_->allocate("plane", memory.size());
    const auto transfers = make(0.02);
    std::vector<std::jthread> threads;
    for (std::size_t t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        try {
          for (int i = 0; i < 5; ++i)
            transfers->wait(transfers->write(region, t * 100'000, memory.data() + t * 100'000, 100'000));
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), Code::io);
        }
      });
    }
  }
}

class RingFaultsTest : public FaultsTest {};
INSTANTIATE_TEST_SUITE_P(Backends, RingFaultsTest, ::testing::Values("uring"), backend_name);

TEST_P(RingFaultsTest, EntersThatFailForAWhileAreRetried) {
  for (const int code : {EINTR, EAGAIN, EBUSY, ENOMEM}) {
    int refused = 0;
    calls_->set([&](const Call& call) -> long {
      return is(call, "uring_enter") && refused < 50 && ++refused % 2 == 0 ? -code : HookedCalls::kPass;
    });
    const auto transfers = make();
    expect_right_bytes(*transfers, [&] { return transfers->counters().requests > 500; });
    EXPECT_EQ(refused, 50);
  }
}

TEST_P(RingFaultsTest, ARingThatBreaksIsAnErrorOnceNothingIsUnderWay) {
  for (const int code : {EBADF, EIO, EFAULT}) {
    for (const int after : {1, 2, 5}) {
      Memory memory(400'000);
      const auto region = storage_->allocate("plane", memory.size());
      std::atomic<int> count{0};
      calls_->set([&](const Call& call) -> long {
        return is(call, "uring_enter") && ++count == after ? -code : HookedCalls::kPass;
      });
      const auto transfers = make();
      expect_error(Code::io, {"io_uring_enter", "slidecore-swap.", io::errno_text(code)}, [&] {
        for (int i = 0; i < 20; ++i) transfers->wait(transfers->write(region, 0, memory.data(), memory.size()));
      });
      EXPECT_FALSE(transfers->register_memory(memory.data(), memory.size()));
      transfers->unregister_memory(memory.data());
    }
  }
}

TEST_P(RingFaultsTest, ARingThatCannotBeMadeIsNoRing) {
  for (const char* name : {"uring_setup", "uring_map", "uring_register"}) {
    for (const int code : {ENOMEM, EPERM, EINVAL}) {
      int count = 0;
      calls_->set([&](const Call& call) { return is(call, name) && ++count >= 1 ? -code : HookedCalls::kPass; });
      expect_error(Code::unsupported, {"io_uring cannot be used"}, [&] { make(); });
    }
  }
}

// The kernel refuses the memory: what any wrong address would do.
TEST_P(RingFaultsTest, AnAddressThatIsNoneIsAnError) {
  const auto transfers = make();
  const auto region = storage_->allocate("plane", 8192);
  const std::string bad = io::errno_text(EFAULT);
  expect_error(Code::io, {bad},
               [&] { transfers->wait(transfers->read(region, 0, reinterpret_cast<void*>(4096), 8192)); });
}

}  // namespace
}  // namespace slidecore
