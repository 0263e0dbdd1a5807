// Planes on disk: updates that are staged, uploads that read as they go, and what becomes of faults.

#include <array>
#include <cmath>

#include "io/errors.h"
#include "io_support.h"
#include "slidecore/adamw_sink.h"

namespace slidecore {
namespace {

using namespace testing_support;

constexpr std::size_t kPlanes = 6;

// The planes of a chunk in an order of our own: weight, residual, exp_avg, exp_avg_sq and the scales of 8-bit moments.
struct Shape {
  bool eight_bit;
  std::size_t n;

  std::size_t bytes(std::size_t plane) const {
    const std::size_t moment = eight_bit ? 1 : 4, groups = eight_bit ? (n + moments_group - 1) / moments_group : 0;
    return std::array<std::size_t, kPlanes>{n * 2, n * 2, n * moment, n * moment, groups * 4, groups * 4}[plane];
  }
};

AdamWPlanes planes_at(const Shape& shape, const std::array<void*, kPlanes>& at) {
  AdamWPlanes planes;
  planes.weight = static_cast<std::uint16_t*>(at[0]);
  planes.residual = static_cast<std::int16_t*>(at[1]);
  if (shape.eight_bit) {
    planes.exp_avg8 = static_cast<std::int8_t*>(at[2]);
    planes.exp_avg_sq8 = static_cast<std::uint8_t*>(at[3]);
    planes.exp_avg_scale = static_cast<float*>(at[4]);
    planes.exp_avg_sq_scale = static_cast<float*>(at[5]);
  } else {
    planes.exp_avg = static_cast<float*>(at[2]);
    planes.exp_avg_sq = static_cast<float*>(at[3]);
  }
  return planes;
}

AdamWRegions regions_at(const Shape& shape, const std::array<std::shared_ptr<const Region>, kPlanes>& at) {
  AdamWRegions regions;
  regions.weight = at[0];
  regions.residual = at[1];
  (shape.eight_bit ? regions.exp_avg8 : regions.exp_avg) = at[2];
  (shape.eight_bit ? regions.exp_avg_sq8 : regions.exp_avg_sq) = at[3];
  regions.exp_avg_scale = at[4];
  regions.exp_avg_sq_scale = at[5];
  return regions;
}

// Chunks whose planes lie in memory or on disk, and the same planes beside them, updated by adamw() alone.
class DiskRig {
 public:
  DiskRig(const std::vector<Shape>& shapes, unsigned seed, const TransferOptions& options,
          std::shared_ptr<io::SystemCalls> calls = nullptr)
      : device(host_device()), random(seed), pool(std::make_shared<ThreadPool>(2)), shapes_(shapes) {
    StorageOptions storage_options{.stripe_bytes = 16384};
    storage_options.calls = std::move(calls);
    storage = std::make_shared<Storage>(directories.names, storage_options);
    transfers = std::make_shared<Transfers>(storage, options);
    sink = std::make_shared<AdamWSink>(pool);
    SchedulerOptions scheduler_options{.piece_bytes = 4096, .ring_pieces = 3, .trace_spans = 4096};
    scheduler_options.transfers = transfers;
    scheduler_options.disk_pieces = 2;
    sink->use_disk(transfers, device, 2, 2048);
    std::size_t largest = 0;
    std::vector<ChunkSpec> specs;
    for (std::size_t c = 0; c < shapes.size(); ++c) {
      const Shape& shape = shapes[c];
      Chunk chunk;
      std::array<void*, kPlanes> at{}, expected{};
      for (std::size_t p = 0; p < kPlanes; ++p) {
        chunk.memory[p] = std::make_unique<Memory>(shape.bytes(p));
        chunk.expected[p] = std::make_unique<Memory>(shape.bytes(p));
        if (p == 0) {
          for (std::size_t i = 0; i < shape.n; ++i) {
            reinterpret_cast<std::uint16_t*>(chunk.memory[0]->data())[i] =
                static_cast<std::uint16_t>(0x3c00 + random() % 700);
          }
        } else if (p == 1) {
          randomize(chunk.memory[1]->data(), shape.bytes(1), random);
        }
        std::memcpy(chunk.expected[p]->data(), chunk.memory[p]->data(), shape.bytes(p));
        at[p] = chunk.memory[p]->data();
        expected[p] = chunk.expected[p]->data();
        if (shape.bytes(p) > 0) {
          chunk.region[p] =
              storage->allocate("chunk " + std::to_string(c) + ", plane " + std::to_string(p), shape.bytes(p));
        }
      }
      chunk.reference = planes_at(shape, expected);
      chunks.push_back(std::move(chunk));
      sink->add_chunk(planes_at(shape, at), shape.n, GradientType::bfloat16);
      specs.push_back({"chunk " + std::to_string(c), at[0], shape.bytes(0), 0});
      largest = std::max(largest, shape.bytes(0));
    }
    WindowSpec window{{}, largest};
    for (int s = 0; s < 2; ++s) window.slots.push_back(device->alloc(largest));
    for (auto& buffer : buffers_) buffer = {device->alloc(largest), 0};
    slots_ = window.slots;
    scheduler = std::make_unique<Scheduler>(device, specs, std::vector<WindowSpec>{window}, sink, scheduler_options);
  }
  ~DiskRig() {
    scheduler.reset();
    sink.reset();
    for (void* slot : slots_) device->free(slot);
    for (auto& buffer : buffers_) device->free(buffer.first);
  }

  // Moves the chunk's planes: bit p of `on_disk` says where plane p lies from now on.
  void place(std::uint32_t c, unsigned on_disk) {
    scheduler->synchronize();
    Chunk& chunk = chunks[c];
    std::array<void*, kPlanes> memory{};
    std::array<std::shared_ptr<const Region>, kPlanes> disk{};
    for (std::size_t p = 0; p < kPlanes; ++p) {
      if (chunk.region[p] == nullptr) continue;
      const bool down = (on_disk >> p & 1) != 0;
      Memory& here = *chunk.memory[p];
      if (down && !chunk.down[p]) {
        transfers->wait(transfers->write(chunk.region[p], 0, here.data(), here.size()));
        std::memset(here.data(), 0xa5, here.size());  // nobody may look here any more
      } else if (!down && chunk.down[p]) {
        transfers->wait(transfers->read(chunk.region[p], 0, here.data(), here.size()));
      }
      chunk.down[p] = down;
      if (!down) memory[p] = here.data();
      if (down) disk[p] = chunk.region[p];
    }
    sink->place(c, planes_at(shapes_[c], memory), regions_at(shapes_[c], disk));
    scheduler->place_weight(c, memory[0], disk[0]);
  }

  void expect_weights(std::uint32_t c) {
    const std::size_t bytes = shapes_[c].bytes(0);
    Bytes seen(bytes);
    void* slot = scheduler->acquire(c, Phase::forward, 0);
    device->to_host(seen.data(), slot, bytes, 0);
    device->synchronize(0);
    scheduler->release(c, Phase::forward, 0);
    EXPECT_TRUE(std::memcmp(seen.data(), chunks[c].expected[0]->data(), bytes) == 0) << "weights of chunk " << c;
  }

  // A backward visit with a gradient, which is consumed at once or waits in memory for update().
  void backward(std::uint32_t c, bool later) {
    const Shape& shape = shapes_[c];
    auto& [buffer, ticket] = buffers_[next_++ % buffers_.size()];
    scheduler->synchronize_ticket(ticket);
    std::vector<std::uint16_t> gradient(shape.n);
    for (auto& g : gradient) g = static_cast<std::uint16_t>(0x3a00 + random() % 512 + (random() % 2) * 0x8000);
    scheduler->acquire(c, Phase::backward, 0);
    device->to_device(buffer, gradient.data(), shape.n * 2, 0);
    scheduler->release(c, Phase::backward, 0);
    Chunk& chunk = chunks[c];
    const AdamWHyper hyper{.step = ++chunk.step};
    if (later) {
      chunk.gradient = std::make_unique<Memory>(shape.n * 2);
      chunk.saved = ticket = scheduler->save_gradient(c, chunk.gradient->data(), buffer, shape.n * 2, 0);
    } else {
      sink->prepare(c, {{0, shape.n, hyper}});
      ticket = scheduler->submit_gradient(c, buffer, shape.n * 2, 0);
    }
    adamw(*pool, hyper, chunk.reference, gradient.data(), GradientType::bfloat16, shape.n);
  }
  void update(std::uint32_t c) {
    Chunk& chunk = chunks[c];
    sink->prepare(c, {{0, shapes_[c].n, AdamWHyper{.step = chunk.step}}});
    scheduler->update(c, chunk.gradient->data(), shapes_[c].n * 2, chunk.saved);
  }
  void step(bool later) {
    const auto count = static_cast<std::uint32_t>(chunks.size());
    for (std::uint32_t c = 0; c < count; ++c) expect_weights(c);
    for (std::uint32_t c = count; c-- > 0;) backward(c, later);
    for (std::uint32_t c = 0; later && c < count; ++c) update(c);
  }
  void expect_planes() {
    scheduler->synchronize();
    for (std::size_t c = 0; c < chunks.size(); ++c) {
      for (std::size_t p = 0; p < kPlanes; ++p) {
        Bytes seen = chunks[c].memory[p]->bytes();
        if (chunks[c].down[p]) transfers->wait(transfers->read(chunks[c].region[p], 0, seen.data(), seen.size()));
        EXPECT_EQ(seen, chunks[c].expected[p]->bytes()) << "chunk " << c << ", plane " << p;
      }
    }
  }

  Directories directories{2};
  std::shared_ptr<Device> device;
  Random random;
  std::shared_ptr<ThreadPool> pool;
  std::shared_ptr<Storage> storage;
  std::shared_ptr<Transfers> transfers;
  std::shared_ptr<AdamWSink> sink;
  std::unique_ptr<Scheduler> scheduler;
  struct Chunk {
    std::array<std::unique_ptr<Memory>, kPlanes> memory, expected;
    std::array<std::shared_ptr<const Region>, kPlanes> region;
    std::array<bool, kPlanes> down{};
    AdamWPlanes reference;
    std::unique_ptr<Memory> gradient;
    Ticket saved = 0;
    std::int64_t step = 0;
  };
  std::vector<Chunk> chunks;

 private:
  std::vector<Shape> shapes_;
  std::vector<void*> slots_;
  std::array<std::pair<void*, Ticket>, 2> buffers_;
  std::size_t next_ = 0;
};

class SchedulerDisk : public EachBackend {};
INSTANTIATE_TEST_SUITE_P(, SchedulerDisk, ::testing::Values("uring", "threads"), backend_name);

// Whatever lies where, moved between steps, with and without deferred updates: the planes are those of adamw() alone.
TEST_P(SchedulerDisk, PlacesDoNotChangeNumbers) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  Random random(seed);
  for (const bool eight_bit : {false, true}) {
    SCOPED_TRACE(eight_bit ? "8-bit moments" : "float32 moments");
    DiskRig rig({{eight_bit, 5}, {eight_bit, 2048 * 4 + 129}, {eight_bit, 4000}, {eight_bit, 2048 * 6}}, random(),
                options());
    rig.scheduler->set_schedule(training_schedule(4));
    for (int step = 0; step < 8; ++step) {
      for (std::uint32_t c = 0; c < 4; ++c) {
        // All on disk, all in memory, or any mixture.
        const int kind = draw(random, 0, 3);
        if (kind < 3) rig.place(c, kind == 0 ? ~0u : kind == 1 ? 0u : static_cast<unsigned>(random()));
      }
      for (int again = 0; again < 2; ++again) rig.step(draw(random, 0, 1) == 1);
    }
    rig.expect_planes();
  }
}

// Gradients of many chunks wait for few stages, and the ring holds the download back.
TEST_P(SchedulerDisk, MorePiecesThanStages) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  DiskRig rig(std::vector<Shape>(9, Shape{false, 2048 * 3 + 7}), seed, options());
  for (std::uint32_t c = 0; c < 9; ++c) rig.place(c, ~0u);
  rig.scheduler->set_schedule(training_schedule(9));
  for (int step = 0; step < 5; ++step) rig.step(step % 2 == 1);
  rig.expect_planes();
  EXPECT_GT(rig.transfers->counters().written_bytes, 9u * 5 * 2048 * 3 * 12);
}

// Inputs of any size go to disk and come back, regions are used again, also those whose content nobody fetched.
TEST_P(SchedulerDisk, SavedInputsComeBack) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  DiskRig rig({{false, 3000}}, seed, options());
  constexpr std::size_t kMost = 5 * 4096 + 17;
  void* const source = rig.device->alloc(kMost);
  void* const target = rig.device->alloc(kMost);
  std::vector<std::shared_ptr<const Region>> regions;
  for (int i = 0; i < 3; ++i) regions.push_back(rig.storage->allocate("input " + std::to_string(i), kMost));
  for (int round = 0; round < 6; ++round) {
    std::vector<Bytes> saved;
    std::vector<Ticket> tickets;
    for (const auto& region : regions) {
      saved.push_back(random_bytes(draw<std::size_t>(rig.random, 1, kMost), rig.random));
      rig.device->to_device(source, saved.back().data(), saved.back().size(), 0);
      tickets.push_back(rig.scheduler->save_input(0, region, source, saved.back().size(), 0));
      rig.scheduler->wait(tickets.back(), 0);  // `source` is filled again
    }
    for (std::size_t i = regions.size(); i-- > 0;) {
      if (draw(rig.random, 0, 3) == 0) continue;
      Bytes seen(saved[i].size());
      const Ticket fetched = rig.scheduler->fetch_input(0, target, regions[i], seen.size(), 0, tickets[i]);
      rig.scheduler->wait(fetched, 0);
      rig.device->to_host(seen.data(), target, seen.size(), 0);
      rig.device->synchronize(0);
      EXPECT_EQ(seen, saved[i]);
    }
  }
  rig.scheduler->synchronize();
  expect_error(Code::invalid_argument, {"room"},
               [&] { rig.scheduler->save_input(0, regions[0], source, kMost + 1, 0); });
  rig.device->free(source);
  rig.device->free(target);
}

TEST_P(SchedulerDisk, ReadsAndWritesAreTraced) {
  DiskRig rig({{false, 5000}, {false, 5000}}, 1, options());
  for (std::uint32_t c = 0; c < 2; ++c) rig.place(c, ~0u);
  rig.scheduler->set_schedule(training_schedule(2));
  rig.scheduler->start_trace();
  const auto before = rig.transfers->counters();
  rig.step(false);
  rig.scheduler->stop_trace();
  const auto after = rig.transfers->counters();
  std::uint64_t read = 0, written = 0;
  for (const Span& span : rig.scheduler->trace().spans()) {
    if (span.lane != Lane::disk) continue;
    EXPECT_GE(span.end_ns, span.start_ns);
    (span.kind == SpanKind::read ? read : written) += span.bytes;
  }
  EXPECT_EQ(read, after.read_bytes - before.read_bytes);
  EXPECT_EQ(written, after.written_bytes - before.written_bytes);
  EXPECT_EQ(written, 2u * 5000 * 12);
}

// A drive that fails stops the lanes; the error names the file and what was at work, and nothing hangs.
TEST_P(SchedulerDisk, FaultsAreToldAtTheNextCall) {
  const std::size_t threads = threads_now(), files = open_files();
  for (const bool write : {false, true}) {
    for (const long after : {0L, 1L, 5L, 11L}) {
      SCOPED_TRACE((write ? "write " : "read ") + std::to_string(after));
      auto calls = std::make_shared<HookedCalls>();
      std::atomic<bool> armed{false};
      std::atomic<long> left{after};
      calls->set([&](const HookedCalls::Call& call) -> long {
        if (!armed || !is(call, write ? "pwrite" : "pread")) return HookedCalls::kPass;
        return left-- > 0 ? HookedCalls::kPass : -EIO;
      });
      DiskRig rig(std::vector<Shape>(3, Shape{false, 2048 * 5}), 3, options(), calls);
      for (std::uint32_t c = 0; c < 3; ++c) rig.place(c, ~1u);  // the weights stay in memory
      rig.scheduler->set_schedule(training_schedule(3));
      armed = true;
      expect_error(Code::io, {"slidecore-swap", write ? "writing" : "reading", "plane"}, [&] {
        for (int step = 0; step < 4; ++step) {
          for (std::uint32_t c = 3; c-- > 0;) rig.backward(c, false);
          rig.scheduler->synchronize();
        }
      });
      EXPECT_THROW(rig.scheduler->check(), Error);
      rig.scheduler.reset();
    }
  }
  expect_no_more_threads(threads);
  EXPECT_EQ(open_files(), files);
}

TEST_P(SchedulerDisk, FaultsOfUploadsAreTold) {
  auto calls = std::make_shared<HookedCalls>();
  std::atomic<bool> armed{false};
  calls->set(
      [&](const HookedCalls::Call& call) -> long { return armed && is(call, "pread") ? -EIO : HookedCalls::kPass; });
  DiskRig rig({{false, 9000}}, 4, options(), calls);
  rig.place(0, 1u);
  armed = true;
  expect_error(Code::io, {"upload lane", "upload of chunk 'chunk 0'", "slidecore-swap"}, [&] {
    rig.scheduler->acquire(0, Phase::forward, 0);
    rig.scheduler->release(0, Phase::forward, 0);
    rig.scheduler->synchronize();
  });
}

// A drive answers nothing for as long as a gate is closed. The ring's one thread cannot be held inside a call, so there
// the drive is busy for as long. Calls hold what they look at: some are still on their way out of the gate, or into the
// hook, when the test has gone on.
class StalledDrive {
 public:
  StalledDrive(HookedCalls& calls, bool ring, const char* call) : calls_(calls) {
    calls.set([state = state_, ring, name = std::string(call)](const HookedCalls::Call& made) -> long {
      if (!state->closed || made.name != name) return HookedCalls::kPass;
      ++state->arrived;
      if (ring) return -EAGAIN;
      state->gate.pass();
      return HookedCalls::kPass;
    });
  }
  ~StalledDrive() {
    open();
    calls_.set(nullptr);
  }
  // Until so many requests have come to the drive in vain.
  void wait_for_arrival(int count) const {
    while (state_->arrived < count) std::this_thread::yield();
  }
  void open() {
    state_->closed = false;
    state_->gate.open();
  }

 private:
  struct State {
    Gate gate;
    std::atomic<bool> closed{true};
    std::atomic<int> arrived{0};
  };
  HookedCalls& calls_;
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

// Who needs the drive waits, who does not goes on, nothing fails, and when it answers again the numbers are right.
TEST_P(SchedulerDisk, AStalledDriveHoldsUpOnlyWhatNeedsIt) {
  for (const char* call : {"pread", "pwrite"}) {
    SCOPED_TRACE(call);
    auto calls = std::make_shared<HookedCalls>();
    DiskRig rig(std::vector<Shape>(4, Shape{false, 2048 * 3 + 50}), 11, options(), calls);
    for (std::uint32_t c = 1; c < 4; ++c) rig.place(c, ~1u);  // chunk 0, and all weights, stay in memory
    rig.scheduler->set_schedule(training_schedule(4));
    rig.step(false);
    rig.scheduler->synchronize();
    std::atomic<bool> settled{false};
    std::jthread waiter;
    {
      StalledDrive drive(*calls, rig.transfers->backend() == std::string("uring"), call);
      rig.backward(0, false);  // needs no drive
      rig.backward(3, false);
      drive.wait_for_arrival(2);
      waiter = std::jthread([&] {
        rig.scheduler->synchronize();
        settled = true;
      });
      for (int again = 0; again < 3; ++again) {
        for (std::uint32_t c = 0; c < 3; ++c) rig.expect_weights(c);  // 0 has been updated by now
      }
      EXPECT_NO_THROW(rig.scheduler->check());
      EXPECT_NO_THROW(rig.transfers->check());
      EXPECT_FALSE(settled) << "the update of chunk 3 cannot have ended";
    }
    waiter.join();
    EXPECT_TRUE(settled);
    for (std::uint32_t c = 0; c < 4; ++c) rig.expect_weights(c);
    for (int step = 0; step < 2; ++step) rig.step(step == 1);
    rig.expect_planes();
  }
}

// Uploads from a drive that stalls, and inputs on their way to it.
TEST_P(SchedulerDisk, AStalledDriveDelaysWeightsAndInputs) {
  const bool ring = GetParam() == std::string("uring");
  auto calls = std::make_shared<HookedCalls>();
  DiskRig rig({{false, 9000}, {false, 9000}}, 12, options(), calls);
  rig.place(0, 1u);
  constexpr std::size_t kBytes = 4096 * 4;
  void* const source = rig.device->alloc(kBytes);
  void* const target = rig.device->alloc(kBytes);
  const Bytes input = random_bytes(kBytes, rig.random);
  rig.device->to_device(source, input.data(), kBytes, 0);
  const auto region = rig.storage->allocate("input", kBytes);
  std::atomic<bool> uploaded{false}, saved{false};
  Ticket ticket = 0;
  {
    StalledDrive drive(*calls, ring, "pwrite");
    ticket = rig.scheduler->save_input(1, region, source, kBytes, 0);
    drive.wait_for_arrival(1);
    std::jthread waiter([&] {
      rig.scheduler->synchronize();
      saved = true;
    });
    rig.expect_weights(0);  // reads go on
    rig.expect_weights(1);
    EXPECT_FALSE(saved);
    drive.open();
  }
  EXPECT_TRUE(saved);
  rig.scheduler->invalidate(0);  // else it is still in its slot
  {
    StalledDrive drive(*calls, ring, "pread");
    std::jthread visitor([&] {
      rig.expect_weights(0);
      uploaded = true;
    });
    drive.wait_for_arrival(1);
    EXPECT_NO_THROW(rig.scheduler->check());
    EXPECT_FALSE(uploaded);
    drive.open();
  }
  EXPECT_TRUE(uploaded);
  rig.scheduler->wait(rig.scheduler->fetch_input(1, target, region, kBytes, 0, ticket), 0);
  Bytes seen(kBytes);
  rig.device->to_host(seen.data(), target, kBytes, 0);
  rig.device->synchronize(0);
  EXPECT_EQ(seen, input);
  rig.scheduler->synchronize();
  rig.device->free(source);
  rig.device->free(target);
}

// Busy drives, interrupted calls and transfers that stop anywhere, under steps with everything on disk: the same
// numbers as without.
TEST_P(SchedulerDisk, StormsUnderTrainingChangeNothing) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  auto calls = std::make_shared<HookedCalls>();
  std::mutex mutex;
  Random random(seed + 1);
  DiskRig rig({{false, 2048 * 4 + 129}, {true, 4000}, {false, 2048 * 3}}, seed, options(), calls);
  for (std::uint32_t c = 0; c < 3; ++c) rig.place(c, ~0u);
  rig.scheduler->set_schedule(training_schedule(3));
  const auto before = rig.transfers->counters();
  calls->set([&](const HookedCalls::Call& call) -> long {
    if (!is(call, "pread") && !is(call, "pwrite")) return HookedCalls::kPass;
    const std::lock_guard lock(mutex);
    switch (draw(random, 0, 5)) {
      case 0:
        return -EAGAIN;
      case 1:
        return -EINTR;
      case 2:
        return draw<long>(random, 1, 20'000);
      default:
        return HookedCalls::kPass;
    }
  });
  for (int step = 0; step < 6; ++step) rig.step(step % 2 == 1);
  rig.expect_planes();
  const auto after = rig.transfers->counters();
  EXPECT_GT(after.retries - before.retries, 20u);
  EXPECT_GT(after.short_transfers - before.short_transfers, 20u);
  calls->set(nullptr);
  rig.step(false);
  rig.expect_planes();
}

// What cannot go on: a full drive, one that is busy for longer than it is waited for, one that moves nothing, a file
// that ends. The error names file and offset and is told by every later call; nothing hangs, nothing is left.
TEST_P(SchedulerDisk, WhatCannotGoOnIsAnErrorThatNamesFileAndOffset) {
  struct Fault {
    const char* call;
    long answer;
    std::string said;
  };
  const std::size_t threads = threads_now(), files = open_files();
  for (const Fault& fault : {Fault{"pwrite", -ENOSPC, io::errno_text(ENOSPC)},
                             {"pwrite", -EAGAIN, "again and again"},
                             {"pread", -EAGAIN, "again and again"},
                             {"pread", 100, "again and again"},
                             {"pwrite", 100, "again and again"},
                             {"pread", 0, "truncated"},
                             {"size", 4096, "truncated"}}) {
    for (const bool later : {false, true}) {
      SCOPED_TRACE(std::string(fault.call) + " " + std::to_string(fault.answer) + (later ? ", deferred" : ""));
      auto calls = std::make_shared<HookedCalls>();
      TransferOptions chosen = options();
      chosen.patience_s = 0.02;
      DiskRig rig(std::vector<Shape>(3, Shape{false, 2048 * 5}), 3, chosen, calls);
      for (std::uint32_t c = 0; c < 3; ++c) rig.place(c, ~1u);
      rig.scheduler->set_schedule(training_schedule(3));
      rig.step(later);
      rig.scheduler->synchronize();
      std::atomic<int> left{5};
      calls->set([&](const HookedCalls::Call& call) -> long {
        return is(call, fault.call) && left-- <= 0 ? fault.answer : HookedCalls::kPass;
      });
      const std::vector<std::string> parts = {"at offset ", "slidecore-swap.", fault.said};
      expect_error(Code::io, parts, [&] {
        for (int step = 0; step < 4; ++step) rig.step(later);
        rig.scheduler->synchronize();
      });
      expect_error(Code::io, parts, [&] { rig.scheduler->synchronize(); });
      expect_error(Code::io, parts, [&] { rig.scheduler->acquire(0, Phase::forward, 0); });
      rig.scheduler.reset();
      calls->set(nullptr);
    }
  }
  expect_no_more_threads(threads);
  EXPECT_EQ(open_files(), files);
}

TEST_P(SchedulerDisk, AFullDriveEndsTheSavingOfInputs) {
  auto calls = std::make_shared<HookedCalls>();
  DiskRig rig({{false, 3000}}, 6, options(), calls);
  void* const source = rig.device->alloc(4096 * 6);
  const auto region = rig.storage->allocate("an input", 4096 * 6);
  std::atomic<int> left{2};
  calls->set([&](const HookedCalls::Call& call) -> long {
    return is(call, "pwrite") && left-- <= 0 ? -ENOSPC : HookedCalls::kPass;
  });
  expect_error(
      Code::io,
      {"save of an input of chunk 'chunk 0'", "at offset ", "slidecore-swap.", "'an input'", io::errno_text(ENOSPC)},
      [&] {
        rig.scheduler->save_input(0, region, source, 4096 * 6, 0);
        rig.scheduler->synchronize();
      });
  rig.scheduler.reset();
  rig.device->free(source);
}

TEST_P(SchedulerDisk, ArgumentsThatCannotWorkAreRefused) {
  DiskRig rig({{false, 5000}, {true, 5000}}, 5, options());
  Scheduler& scheduler = *rig.scheduler;
  const auto small = rig.storage->allocate("small", 100);
  expect_error(Code::invalid_argument, {"chunk 0", "do not fit", "small"},
               [&] { scheduler.place_weight(0, nullptr, small); });
  expect_error(Code::invalid_argument, {"chunk 0", "somewhere"}, [&] { scheduler.place_weight(0, nullptr, nullptr); });
  expect_error(Code::invalid_argument, {"in memory and on disk"},
               [&] { scheduler.place_weight(0, rig.chunks[0].memory[0]->data(), rig.chunks[0].region[0]); });
  expect_error(Code::invalid_argument, {"chunk 1", "exp_avg_sq", "small"}, [&] {
    AdamWRegions regions;
    regions.exp_avg_sq8 = small;
    rig.sink->place(1, AdamWPlanes{}, regions);
  });
  expect_error(Code::invalid_argument, {"adamw"}, [&] { rig.sink->place(0, AdamWPlanes{}, AdamWRegions{}); });
  expect_error(Code::state, {"before"}, [&] { rig.sink->use_disk(rig.transfers, rig.device, 2, 2048); });
  AdamWSink other(rig.pool);
  expect_error(Code::invalid_argument, {"at least 2"}, [&] { other.use_disk(rig.transfers, rig.device, 1, 2048); });
  expect_error(Code::invalid_argument, {"transfers"}, [&] { other.use_disk(nullptr, rig.device, 2, 2048); });
}

// What nobody would stage, or give back, is an error and no wait for ever.
TEST_P(SchedulerDisk, UpdatesThatCannotBeStagedAreErrors) {
  const std::size_t n = 5000;
  for (const bool with_transfers : {false, true}) {
    DiskRig rig({{false, n}}, 6, options());
    rig.place(0, 0b1110);
    void* memory = rig.device->alloc(2 * n);
    void* slot = rig.device->alloc(2 * n);
    std::memset(memory, 0, 2 * n);
    {
      SchedulerOptions bare{.piece_bytes = 4096};
      if (with_transfers) bare.transfers = rig.transfers;
      Scheduler scheduler(rig.device, {{"it", rig.chunks[0].memory[0]->data(), 2 * n, 0}}, {{{slot}, 2 * n}}, rig.sink,
                          bare);
      std::vector<float> sum(n);
      if (with_transfers) {
        rig.sink->prepare_sum(0, {{0, n, true}}, sum.data(), GradientType::bfloat16);
      } else {
        rig.sink->prepare(0, {{0, n, AdamWHyper{}}});
      }
      scheduler.submit_gradient(0, memory, 2 * n, 0);
      expect_error(Code::state, {with_transfers ? "a sum was prepared" : "without transfers", "update"},
                   [&] { scheduler.wait_updates(); });
    }
    rig.device->free(memory);
    rig.device->free(slot);
  }
}

}  // namespace
}  // namespace slidecore
