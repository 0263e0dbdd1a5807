// Transfers against a plain copy of what a region should hold: both backends, odd sizes, offsets and addresses.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <fstream>
#include <map>
#include <set>

#include "io/piece.h"
#include "io_support.h"

namespace slidecore {
namespace {

using namespace testing_support;

std::shared_ptr<Storage> make_storage(const Directories& directories, std::size_t stripe = 32768) {
  StorageOptions options;
  options.stripe_bytes = stripe;
  return std::make_shared<Storage>(directories.names, options);
}

class TransfersTest : public EachBackend {};
INSTANTIATE_TEST_SUITE_P(Backends, TransfersTest, ::testing::Values("uring", "threads"), backend_name);

TEST_P(TransfersTest, BringBackWhatWasWrittenAtAnySizeAndAddress) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  for (const std::size_t drives : {1u, 3u}) {
    Directories directories(drives);
    const auto storage = make_storage(directories);
    Transfers transfers(storage, options());
    EXPECT_STREQ(transfers.backend(), GetParam());
    for (const std::size_t bytes : {1u, 511u, 4095u, 4096u, 4097u, 32768u, 100'003u, 1'000'000u}) {
      const auto region = storage->allocate("odd", bytes);
      for (const std::size_t shift : {0u, 1u, 512u}) {
        Memory source(bytes + shift), target(bytes + shift + 1, 0x5a);
        randomize(source.data(), source.size(), random);
        transfers.wait(transfers.write(region, 0, source.data() + shift, bytes));
        const Ticket ticket = transfers.read(region, 0, target.data() + shift, bytes);
        transfers.wait(ticket);
        EXPECT_TRUE(transfers.done(ticket));
        ASSERT_EQ(std::memcmp(target.data() + shift, source.data() + shift, bytes), 0)
            << bytes << " bytes at address + " << shift;
        EXPECT_EQ(target.data()[bytes + shift], 0x5a) << "written behind the memory";
        for (std::size_t i = 0; i < shift; ++i) ASSERT_EQ(target.data()[i], 0x5a) << "written before the memory";
      }
    }
  }
}

// Regions side by side, random ranges of them read and written in rounds: what is not asked for does not change.
TEST_P(TransfersTest, ChangeWhatTheyAreAskedToAndNothingElse) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  Directories directories(2);
  const auto storage = make_storage(directories);
  Transfers transfers(storage, options());
  std::vector<std::shared_ptr<const Region>> regions;
  std::vector<Bytes> expected;
  for (const std::size_t bytes : {70'001u, 4096u, 123'457u, 10u}) {
    regions.push_back(storage->allocate("region " + std::to_string(regions.size()), bytes));
    expected.push_back(random_bytes(bytes, random));
    transfers.write(regions.back(), 0, expected.back().data(), bytes);
  }
  transfers.synchronize();
  for (int round = 0; round < 40; ++round) {
    // Neighbouring ranges that share blocks, written at the same time.
    for (std::size_t r = 0; r < regions.size(); ++r) {
      std::vector<std::size_t> cuts{0, expected[r].size()};
      for (int i = 0; i < 6; ++i) cuts.push_back(draw<std::size_t>(random, 0, expected[r].size()));
      std::sort(cuts.begin(), cuts.end());
      for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
        if (draw(random, 0, 2) == 0) continue;
        randomize(expected[r].data() + cuts[i], cuts[i + 1] - cuts[i], random);
        transfers.write(regions[r], cuts[i], expected[r].data() + cuts[i], cuts[i + 1] - cuts[i]);
      }
    }
    transfers.synchronize();
    for (std::size_t r = 0; r < regions.size(); ++r) {
      const auto begin = draw<std::size_t>(random, 0, expected[r].size() - 1);
      const auto bytes = draw<std::size_t>(random, 1, expected[r].size() - begin);
      Bytes seen(bytes);
      transfers.wait(transfers.read(regions[r], begin, seen.data(), bytes));
      ASSERT_EQ(std::memcmp(seen.data(), expected[r].data() + begin, bytes), 0) << "round " << round;
    }
  }
}

// The file as another reader sees it: the stripes lie where they should.
TEST_P(TransfersTest, StripeOverTheFiles) {
  constexpr std::size_t kStripe = 16384;
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  Directories directories(3);
  const auto storage = make_storage(directories, kStripe);
  Transfers transfers(storage, options());
  const Bytes content = random_bytes(200'001, random);
  const auto region = storage->allocate("striped", content.size());
  ASSERT_EQ(region->base(), 0u);
  transfers.wait(transfers.write(region, 0, content.data(), content.size()));
  for (std::size_t at = 0; at < content.size(); at += kStripe) {
    const std::size_t stripe = at / kStripe, bytes = std::min(kStripe, content.size() - at);
    std::ifstream file(storage->files()[stripe % 3], std::ios::binary);
    file.seekg(static_cast<std::streamoff>(stripe / 3 * kStripe));
    Bytes seen(bytes);
    file.read(reinterpret_cast<char*>(seen.data()), static_cast<std::streamsize>(bytes));
    ASSERT_TRUE(file);
    ASSERT_EQ(std::memcmp(seen.data(), content.data() + at, bytes), 0) << "stripe " << stripe;
  }
}

TEST_P(TransfersTest, TakeOrdersFromManyThreads) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Directories directories(2);
  const auto storage = make_storage(directories);
  Transfers transfers(storage, options());
  std::atomic<int> wrong{0};
  std::vector<std::jthread> threads;
  for (unsigned t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      Random random(seed + t);
      for (int i = 0; i < 15; ++i) {
        const auto bytes = draw<std::size_t>(random, 1, 90'000);
        const auto region = storage->allocate("of thread " + std::to_string(t), bytes);
        const Bytes content = random_bytes(bytes, random);
        Bytes seen(bytes);
        transfers.wait(transfers.write(region, 0, content.data(), bytes));
        const Ticket ticket = transfers.read(region, 0, seen.data(), bytes);
        while (i % 3 == 0 && !transfers.done(ticket)) std::this_thread::yield();
        if (i % 3 == 1) transfers.synchronize();
        transfers.wait(ticket);
        if (seen != content) ++wrong;
      }
    });
  }
  threads.clear();
  EXPECT_EQ(wrong.load(), 0);
  EXPECT_EQ(storage->allocated_bytes(), 0u);
}

TEST_P(TransfersTest, KeepARegionsSpaceWhileTheyUseIt) {
  Directories directories(1);
  const auto storage = make_storage(directories);
  Transfers transfers(storage, options());
  const Memory content(3'000'000, 7);
  Memory source(3'000'000, 7);
  transfers.write(storage->allocate("dropped at once", 3'000'000), 0, source.data(), source.size());
  transfers.synchronize();
  EXPECT_EQ(storage->allocated_bytes(), 0u);
}

TEST_P(TransfersTest, CountWhatTheyDo) {
  Directories directories(1);
  const auto storage = make_storage(directories);
  Transfers transfers(storage, options());
  Memory memory(65536);
  const auto region = storage->allocate("counted", 65536);
  transfers.wait(transfers.write(region, 0, memory.data(), 65536));
  Transfers::Counters counters = transfers.counters();
  EXPECT_EQ(counters.writes, 1u);
  EXPECT_EQ(counters.written_bytes, 65536u);
  EXPECT_EQ(counters.requests, 4u);  // of 16384 bytes
  EXPECT_EQ(counters.bounced_bytes, 0u);
  transfers.wait(transfers.read(region, 100, memory.data(), 10));
  counters = transfers.counters();
  EXPECT_EQ(counters.reads, 1u);
  EXPECT_EQ(counters.read_bytes, 10u);
  EXPECT_EQ(counters.bounced_bytes, 10u);
}

TEST_P(TransfersTest, RefuseWhatCannotBe) {
  Directories directories(1), others(1);
  const auto storage = make_storage(directories), other = make_storage(others);
  Transfers transfers(storage, options());
  Memory memory(8192);
  const auto region = storage->allocate("ours", 5000), foreign = other->allocate("theirs", 5000);
  expect_error(Code::invalid_argument, {"'ours'", "5000"}, [&] { transfers.read(region, 1, memory.data(), 5000); });
  expect_error(Code::invalid_argument, {"'ours'"}, [&] { transfers.write(region, 5001, memory.data(), 0); });
  expect_error(Code::invalid_argument, {"'ours'"}, [&] { transfers.read(region, UINT64_MAX, memory.data(), 2); });
  expect_error(Code::invalid_argument, {"not one of"}, [&] { transfers.read(foreign, 0, memory.data(), 10); });
  expect_error(Code::invalid_argument, {"memory"}, [&] { transfers.read(region, 0, nullptr, 10); });
  expect_error(Code::invalid_argument, {"never given"}, [&] { transfers.wait(99); });
  EXPECT_EQ(transfers.read(region, 5000, memory.data(), 0), 0u);
  EXPECT_TRUE(transfers.done(0));
  transfers.wait(0);
  transfers.check();
  TransferOptions wrong = options();
  wrong.block_bytes = 5000;
  expect_error(Code::invalid_argument, {"block_bytes", "4096"}, [&] { Transfers made(storage, wrong); });
  wrong = options();
  wrong.queue_depth = 1 << 20;
  expect_error(Code::invalid_argument, {"queue_depth"}, [&] { Transfers made(storage, wrong); });
  wrong = options();
  wrong.backend = "aio";
  expect_error(Code::invalid_argument, {"aio", "uring", "threads"}, [&] { Transfers made(storage, wrong); });
}

TEST_P(TransfersTest, DropWhatWaitsAndLeaveNothingBehind) {
  Directories directories(2);
  const std::size_t threads = threads_now(), files = open_files();
  {
    const auto storage = make_storage(directories);
    for (int round = 0; round < 10; ++round) {
      // Nothing orders two transfers under way, so that they cannot share memory.
      Memory from(5'000'000, 3), into(5'000'000);
      const auto region = storage->allocate("dropped", from.size());
      Transfers transfers(storage, options());
      transfers.write(region, 0, from.data(), from.size());
      transfers.read(region, 0, into.data(), into.size());
    }  // the memory goes right after its transfers
  }
  expect_no_more_threads(threads);
  EXPECT_EQ(open_files(), files);
  EXPECT_TRUE(directories.files().empty());
}

// `bytes`: less than a huge page, or some of them with odd ends.
void register_and_move(const TransferOptions& options, bool by_threads, std::size_t bytes) {
  Directories directories(1);
  const auto storage = make_storage(directories);
  Transfers transfers(storage, options);
  Memory memory(bytes), plain(bytes);
  const auto region = storage->allocate("registered", memory.size());
  for (std::size_t i = 0; i < bytes; ++i) memory.data()[i] = static_cast<unsigned char>(i % 251);  // no two pages alike
  const bool registered = transfers.register_memory(memory.data(), memory.size());
  if (by_threads) {
    EXPECT_FALSE(registered);
  } else if (!registered) {
    EXPECT_NE(transfers.describe().find("no registered buffers"), std::string::npos) << transfers.describe();
  }
  transfers.wait(transfers.write(region, 0, memory.data(), memory.size()));
  const Bytes content = memory.bytes();
  std::memset(memory.data(), 0, memory.size());
  transfers.wait(transfers.read(region, 0, memory.data(), memory.size()));
  EXPECT_EQ(memory.bytes(), content);
  // Memory that only begins inside of what is registered, and memory outside.
  transfers.wait(transfers.read(region, 0, plain.data(), plain.size()));
  EXPECT_EQ(plain.bytes(), content);
  transfers.unregister_memory(memory.data());
  transfers.unregister_memory(memory.data());
  std::memset(memory.data(), 0, memory.size());
  transfers.wait(transfers.read(region, 0, memory.data(), memory.size()));
  EXPECT_EQ(memory.bytes(), content);
  EXPECT_EQ(transfers.register_memory(memory.data(), memory.size()), registered);
}

TEST_P(TransfersTest, RegisterMemoryWhereTheyCan) {
  for (const std::size_t bytes : {std::size_t{400'000}, std::size_t{9'000'001}}) {
    SCOPED_TRACE(bytes);
    register_and_move(options(), std::string(GetParam()) == "threads", bytes);
  }
}

TEST_P(TransfersTest, AreRefusedToAChildOfFork) {
  Directories directories(1);
  const auto storage = make_storage(directories);
  auto transfers = std::make_unique<Transfers>(storage, options());
  Memory memory(4096);
  const auto region = storage->allocate("parent's", 4096);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    int code = 1;
    try {
      transfers->read(region, 0, memory.data(), 4096);
    } catch (const Error& error) {
      code = error.code() == Code::state ? 0 : 2;
    }
    transfers.reset();
    _exit(code);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  transfers->wait(transfers->write(region, 0, memory.data(), 4096));
}

class Backend : public ::testing::Test {
 protected:
  void TearDown() override { unsetenv("SLIDECORE_IO"); }
  Directories directories_{1};
};

TEST_F(Backend, IsChosenByTheVariable) {
  const auto storage = make_storage(directories_);
  setenv("SLIDECORE_IO", "threads", 1);
  Transfers threads(storage);
  EXPECT_STREQ(threads.backend(), "threads");
  EXPECT_NE(threads.describe().find("SLIDECORE_IO"), std::string::npos) << threads.describe();
  setenv("SLIDECORE_IO", "carrier pigeon", 1);
  expect_error(Code::invalid_argument, {"SLIDECORE_IO", "carrier pigeon"}, [&] { Transfers transfers(storage); });
}

// What containers and old kernels answer: the other backend is taken, with the reason; forcing is an error.
TEST_F(Backend, IsThreadsWhereIoUringIsForbidden) {
  for (const int code : {ENOSYS, EPERM, EACCES, ENOMEM, EMFILE}) {
    const auto calls = std::make_shared<HookedCalls>();
    StorageOptions options;
    options.calls = calls;
    const auto storage = std::make_shared<Storage>(directories_.names, options);
    calls->set([&](const HookedCalls::Call& call) { return is(call, "uring_setup") ? -code : HookedCalls::kPass; });
    const std::size_t threads = threads_now();
    TransferOptions forced;
    forced.backend = "uring";
    expect_error(Code::unsupported, {"io_uring cannot be used"}, [&] { Transfers transfers(storage, forced); });
    expect_no_more_threads(threads);
    Transfers transfers(storage);
    EXPECT_STREQ(transfers.backend(), "threads");
    EXPECT_NE(transfers.describe().find("io_uring cannot be used"), std::string::npos) << transfers.describe();
    Memory memory(10'000, 1);
    const auto region = storage->allocate("works", 10'000);
    transfers.wait(transfers.write(region, 0, memory.data(), 10'000));
  }
}

TEST_F(Backend, DoesWithoutWhatOlderKernelsLack) {
  if (const std::string reason = why_no_io_uring(); !reason.empty()) GTEST_SKIP() << reason;
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  struct Kernel {
    const char* lacks;
    std::uint64_t flags;              // of io_uring_setup
    std::set<std::uint64_t> opcodes;  // of io_uring_register
    const char* said;
    long version = HookedCalls::kPass;
  };
  const Kernel kernels[] = {{"DEFER_TASKRUN", io::abi::kDeferTaskrun, {}, "COOP_TASKRUN"},
                            {"both", io::abi::kDeferTaskrun | io::abi::kCoopTaskrun, {}, "plain"},
                            {"files", 0, {io::abi::kRegisterFiles}, "no registered files"},
                            {"buffers", 0, {io::abi::kRegisterBuffers2}, "no registered buffers"},
                            {"updates", 0, {io::abi::kUpdateBuffers}, "no registered buffers"},
                            {"whole pages", 0, {}, "no registered buffers: before Linux 6.12", 6011}};
  for (const Kernel& kernel : kernels) {
    SCOPED_TRACE(kernel.lacks);
    const auto calls = std::make_shared<HookedCalls>();
    StorageOptions options;
    options.calls = calls;
    calls->set([&](const HookedCalls::Call& call) -> long {
      if (is(call, "uring_setup") && (call.offset & kernel.flags) != 0) return -EINVAL;
      if (is(call, "uring_register") && kernel.opcodes.contains(call.offset)) return -EINVAL;
      return is(call, "kernel_version") ? kernel.version : HookedCalls::kPass;
    });
    const auto storage = std::make_shared<Storage>(directories_.names, options);
    TransferOptions forced;
    forced.backend = "uring";
    Transfers transfers(storage, forced);
    const Bytes content = random_bytes(123'457, random);
    Memory memory(content.size());
    std::memcpy(memory.data(), content.data(), content.size());
    const bool registered = transfers.register_memory(memory.data(), memory.size());
    if (std::string(kernel.said).starts_with("no registered buffers")) {
      EXPECT_FALSE(registered);
    }
    EXPECT_NE(transfers.describe().find(kernel.said), std::string::npos) << transfers.describe();
    const auto region = storage->allocate("old kernel", content.size());
    transfers.wait(transfers.write(region, 0, memory.data(), memory.size()));
    std::memset(memory.data(), 0, memory.size());
    transfers.wait(transfers.read(region, 0, memory.data(), memory.size()));
    EXPECT_EQ(memory.bytes(), content);
  }
  // Operations of Linux 5.6 are the least.
  const auto calls = std::make_shared<HookedCalls>();
  calls->set([](const HookedCalls::Call& call) {
    return is(call, "uring_register") && call.offset == io::abi::kRegisterProbe ? -EINVAL : HookedCalls::kPass;
  });
  StorageOptions options;
  options.calls = calls;
  const auto storage = std::make_shared<Storage>(directories_.names, options);
  Transfers transfers(storage);
  EXPECT_STREQ(transfers.backend(), "threads");
  EXPECT_NE(transfers.describe().find("5.6"), std::string::npos) << transfers.describe();
}

// However many reads were asked for before: writes need not wait for all of them, nor reads for writes.
TEST(TransfersOrder, ReadsAndWritesTakeTurns) {
  constexpr std::size_t kBlock = 16384, kEach = 8;
  for (const std::size_t depth : {1u, 2u, 3u}) {
    for (const bool writes_first : {false, true}) {
      SCOPED_TRACE("queue depth " + std::to_string(depth) + (writes_first ? ", writes first" : ", reads first"));
      Directories directories;
      const auto calls = std::make_shared<HookedCalls>();
      StorageOptions storage_options;
      storage_options.calls = calls;
      const auto storage = std::make_shared<Storage>(directories.names, storage_options);
      TransferOptions options;
      options.backend = "threads";
      options.block_bytes = kBlock;
      options.queue_depth = depth;
      Transfers transfers(storage, options);
      Memory from(kEach * kBlock, 1), to(kEach * kBlock);
      const auto read = storage->allocate("read", kEach * kBlock);
      const auto written = storage->allocate("written", kEach * kBlock);
      transfers.wait(transfers.write(read, 0, from.data(), from.size()));
      Gate gate;
      std::mutex mutex;
      std::condition_variable full;
      std::vector<bool> made;  // true: a write
      calls->set([&](const HookedCalls::Call& call) {
        if (!is(call, "pread") && !is(call, "pwrite")) return HookedCalls::kPass;
        std::unique_lock lock(mutex);
        made.push_back(call.write);
        // In rounds of a call for each thread: one that is not scheduled for a while would leave its turns to the
        // others.
        const std::size_t round = std::min((made.size() + depth - 1) / depth * depth, 2 * kEach);
        full.notify_all();
        full.wait(lock, [&] { return made.size() >= round; });
        lock.unlock();
        gate.pass();
        return HookedCalls::kPass;
      });
      const auto ask = [&](bool write) {
        write ? transfers.write(written, 0, from.data(), from.size()) : transfers.read(read, 0, to.data(), to.size());
      };
      ask(writes_first);
      gate.wait_for_arrival(static_cast<int>(depth));
      ask(!writes_first);
      gate.open();
      transfers.synchronize();
      calls->set(nullptr);
      EXPECT_EQ(to.bytes(), from.bytes());
      ASSERT_EQ(made.size(), 2 * kEach);
      // Calls are counted as they are made, by several threads: neighbours may stand in either order.
      const auto others = std::count(made.begin(), made.begin() + kEach, !writes_first);
      EXPECT_GE(others, 2) << "of the first " << kEach << " transfers";
    }
  }
}

}  // namespace
}  // namespace slidecore
