// Gradients that wait in host memory: saved or added up there, and consumed by updates that come later.

#include <pthread.h>

#include <array>
#include <map>

#include "held_stream.h"
#include "scheduler_support.h"
#include "slidecore/scheduler.h"

namespace slidecore {
namespace {

using namespace testing_support;

// What the sink does with a chunk's next submission, as the tables of AdamWSink say it.
struct Job {
  bool sums = false;
  bool first = false;        // of a sum
  unsigned char factor = 1;  // of an update
};

// Bytewise: an update is plane -= factor * gradient, a sum is `grad` = or += gradient. Each submission takes the
// chunk's oldest job, so that submissions out of their order come to another result.
class JobSink final : public GradientSink {
 public:
  using Before = std::function<void(const char* call, std::uint32_t chunk, bool sums)>;

  void add_chunk(HostBuffer* plane, HostBuffer* grad) { chunks_.push_back({.plane = plane, .grad = grad, .jobs = {}}); }
  void set_before(Before before) { before_ = std::move(before); }  // while the update lane is idle
  void prepare(std::uint32_t chunk, Job job) {
    const std::lock_guard lock(mutex_);
    chunks_.at(chunk).jobs.push_back(job);
  }

  void begin(std::uint32_t chunk) override {
    Chunk& c = chunks_.at(chunk);
    EXPECT_FALSE(c.begun) << "a chunk's submission began inside another";
    {
      const std::lock_guard lock(mutex_);
      ASSERT_FALSE(c.jobs.empty());
      c.job = c.jobs.front();
      c.jobs.pop_front();
    }
    if (before_) before_("begin", chunk, c.job.sums);
    c.begun = true;
    c.offset = 0;
  }
  void consume(std::uint32_t chunk, std::size_t offset, const void* piece, std::size_t bytes) override {
    Chunk& c = chunks_.at(chunk);
    if (before_) before_("consume", chunk, c.job.sums);
    EXPECT_TRUE(c.begun);
    EXPECT_EQ(c.offset, offset);
    ASSERT_LE(offset + bytes, c.plane->size());
    const auto* gradient = static_cast<const unsigned char*>(piece);
    auto* target = static_cast<unsigned char*>(c.job.sums ? c.grad->data() : c.plane->data()) + offset;
    for (std::size_t i = 0; i < bytes; ++i) {
      const int before = c.job.sums && c.job.first ? 0 : target[i];
      target[i] = static_cast<unsigned char>(c.job.sums ? before + gradient[i] : before - c.job.factor * gradient[i]);
    }
    c.offset += bytes;
  }
  void end(std::uint32_t chunk) override {
    Chunk& c = chunks_.at(chunk);
    if (before_) before_("end", chunk, c.job.sums);
    EXPECT_EQ(c.offset, c.plane->size());
    c.begun = false;
    ++(c.job.sums ? sums : updates);
  }

  std::atomic<int> updates{0}, sums{0};

 private:
  struct Chunk {
    HostBuffer* plane;
    HostBuffer* grad;
    std::deque<Job> jobs;  // guarded by the mutex; the rest is the update lane's own
    Job job = {};
    bool begun = false;
    std::size_t offset = 0;
  };

  std::mutex mutex_;
  std::deque<Chunk> chunks_;
  Before before_;
};

// Chunks with a weight plane and a `grad` plane each; `weights` and `grads` are what these hold after all calls so far,
// computed in the order of the calls.
class DeferredRig {
 public:
  DeferredRig(std::shared_ptr<Device> device_, const std::vector<std::size_t>& sizes, std::size_t slots, unsigned seed,
              SchedulerOptions options = kSmallPieces)
      : device(std::move(device_)), sink(std::make_shared<JobSink>()), random_(seed) {
    const std::size_t largest = *std::max_element(sizes.begin(), sizes.end());
    std::vector<ChunkSpec> specs;
    for (std::size_t c = 0; c < sizes.size(); ++c) {
      for (auto* buffers : {&planes, &grad_planes}) {
        buffers->push_back(std::make_unique<HostBuffer>(device, sizes[c], true));
        randomize(buffers->back()->data(), sizes[c], random_);
      }
      weights.push_back(bytes_of(*planes[c]));
      grads.push_back(bytes_of(*grad_planes[c]));
      sink->add_chunk(planes[c].get(), grad_planes[c].get());
      specs.push_back({Rig::name(c), planes[c]->data(), sizes[c], 0});
    }
    tickets.resize(sizes.size());
    WindowSpec window{{}, largest};
    for (std::size_t s = 0; s < slots; ++s) window.slots.push_back(device->alloc(largest));
    for (Buffer& buffer : buffers_) buffer = {device->alloc(largest), Bytes(largest), 0};
    scheduler = std::make_unique<Scheduler>(device, specs, std::vector<WindowSpec>{window}, sink, options);
  }

  static Bytes bytes_of(const HostBuffer& buffer) {
    const auto* data = static_cast<const unsigned char*>(buffer.data());
    return Bytes(data, data + buffer.size());
  }

  // A device buffer with a new gradient, filled on `stream`.
  struct Buffer {
    void* device = nullptr;
    Bytes bytes;
    Ticket ticket = 0;
  };
  Buffer& gradient(std::uint32_t chunk, StreamHandle stream) {
    Buffer& buffer = buffers_[next_++ % buffers_.size()];
    scheduler->synchronize_ticket(buffer.ticket);
    buffer.bytes = random_bytes(planes[chunk]->size(), random_);
    device->to_device(buffer.device, buffer.bytes.data(), buffer.bytes.size(), stream);
    return buffer;
  }
  void subtract(std::uint32_t chunk, const Bytes& gradient, unsigned char factor) {
    for (std::size_t i = 0; i < gradient.size(); ++i) {
      weights[chunk][i] = static_cast<unsigned char>(weights[chunk][i] - factor * gradient[i]);
    }
  }

  Ticket submit(std::uint32_t chunk, StreamHandle stream = 0) {
    Buffer& buffer = gradient(chunk, stream);
    const auto factor = draw_factor();
    subtract(chunk, buffer.bytes, factor);
    sink->prepare(chunk, {.factor = factor});
    return buffer.ticket = scheduler->submit_gradient(chunk, buffer.device, buffer.bytes.size(), stream);
  }
  Ticket save(std::uint32_t chunk, StreamHandle stream = 0) {
    Buffer& buffer = gradient(chunk, stream);
    grads[chunk] = buffer.bytes;
    buffer.ticket =
        scheduler->save_gradient(chunk, grad_planes[chunk]->data(), buffer.device, buffer.bytes.size(), stream);
    return tickets[chunk] = buffer.ticket;
  }
  Ticket add(std::uint32_t chunk, bool first, StreamHandle stream = 0) {
    Buffer& buffer = gradient(chunk, stream);
    for (std::size_t i = 0; i < buffer.bytes.size(); ++i) {
      grads[chunk][i] = static_cast<unsigned char>((first ? 0 : grads[chunk][i]) + buffer.bytes[i]);
    }
    sink->prepare(chunk, {.sums = true, .first = first});
    return buffer.ticket = scheduler->add_gradient(chunk, buffer.device, buffer.bytes.size(), stream);
  }
  void update(std::uint32_t chunk) {
    const auto factor = draw_factor();
    subtract(chunk, grads[chunk], factor);
    sink->prepare(chunk, {.factor = factor});
    scheduler->update(chunk, grad_planes[chunk]->data(), grads[chunk].size(), tickets[chunk]);
  }
  void visit(std::uint32_t chunk, Phase phase = Phase::forward) {
    const void* slot = scheduler->acquire(chunk, phase, 0);
    EXPECT_EQ(std::memcmp(slot, weights[chunk].data(), weights[chunk].size()), 0)
        << "a visit found wrong weights of " << Rig::name(chunk);
    scheduler->release(chunk, phase, 0);
  }
  void check() {
    scheduler->synchronize();
    for (std::size_t c = 0; c < planes.size(); ++c) {
      EXPECT_EQ(bytes_of(*planes[c]), weights[c]) << "weights of " << Rig::name(c);
      EXPECT_EQ(bytes_of(*grad_planes[c]), grads[c]) << "gradient of " << Rig::name(c);
    }
  }
  Random& random() { return random_; }

  std::shared_ptr<Device> device;
  std::vector<std::unique_ptr<HostBuffer>> planes, grad_planes;
  std::vector<Bytes> weights, grads;
  std::vector<Ticket> tickets;  // of each chunk's last saved gradient
  std::shared_ptr<JobSink> sink;

 private:
  unsigned char draw_factor() { return static_cast<unsigned char>(draw<int>(random_, 1, 255)); }

  Random random_;
  std::array<Buffer, 3> buffers_;
  std::size_t next_ = 0;

 public:
  std::unique_ptr<Scheduler> scheduler;  // its lanes use the rest: the first to go
};

// A gate at the sink's calls of one kind.
JobSink::Before gated(Gate& gate, const std::string& call, bool sums) {
  return [&gate, call, sums](const char* called, std::uint32_t, bool of_sum) {
    if (called == call && of_sum == sums) gate.pass();
  };
}

TEST(SchedulerDeferred, AnUpdateFromTheHostWaitsForItsDownload) {
  const auto device = host_device();
  HeldStream held(device);
  DeferredRig rig(device, {30'001, 500}, 2, 1);
  rig.save(0, held.handle());
  rig.update(0);
  let_others_run();
  EXPECT_EQ(rig.sink->updates, 0);
  held.open();
  rig.visit(0);
  rig.check();
  EXPECT_EQ(rig.sink->updates, 1);
}

TEST(SchedulerDeferred, AnUpdateFromTheHostWaitsForTheChunksSums) {
  Gate gate;
  DeferredRig rig(host_device(), {30'001, 500}, 2, 2);
  rig.sink->set_before(gated(gate, "consume", true));
  rig.add(0, true);
  rig.add(0, false);
  rig.update(0);
  gate.wait_for_arrival();
  let_others_run();
  EXPECT_EQ(rig.sink->updates, 0);
  gate.open();
  rig.visit(0);
  rig.check();
  EXPECT_EQ(rig.sink->sums, 2);
}

TEST(SchedulerDeferred, ASavedGradientWaitsForTheUpdateThatReadsTheOneBefore) {
  Gate gate;
  DeferredRig rig(host_device(), {30'001}, 1, 3);
  rig.save(0);
  rig.scheduler->synchronize();
  const Bytes before = rig.grads[0];
  rig.sink->set_before(gated(gate, "begin", false));
  rig.update(0);
  gate.wait_for_arrival();
  const Ticket landed = rig.save(0);
  let_others_run();
  EXPECT_FALSE(rig.scheduler->done(landed));
  EXPECT_EQ(DeferredRig::bytes_of(*rig.grad_planes[0]), before);
  gate.open();
  rig.check();
}

TEST(SchedulerDeferred, ASumWaitsForTheUpdateThatReadsTheOneBefore) {
  Gate gate;
  DeferredRig rig(host_device(), {30'001, 9'000}, 1, 4);
  rig.save(0);
  rig.save(1);
  rig.scheduler->synchronize();
  // Both updates are queued: while the first is held, only the order of the calls keeps the sum of chunk 1 back.
  rig.sink->set_before([&](const std::string& call, std::uint32_t chunk, bool sums) {
    if (call == "begin" && chunk == 0 && !sums) gate.pass();
  });
  rig.update(0);
  gate.wait_for_arrival();
  rig.update(1);
  rig.add(1, true);
  let_others_run();
  EXPECT_EQ(rig.sink->sums, 0);
  gate.open();
  rig.check();
}

TEST(SchedulerDeferred, ASavedGradientWaitsForSumsIntoItsPlace) {
  Gate gate;
  DeferredRig rig(host_device(), {9'001}, 1, 5);
  rig.sink->set_before(gated(gate, "consume", true));
  rig.add(0, true);
  gate.wait_for_arrival();
  const Ticket landed = rig.save(0);
  let_others_run();
  EXPECT_FALSE(rig.scheduler->done(landed));
  gate.open();
  rig.check();
}

// The gradient in the ring was submitted before the one on the host, which is ready first.
TEST(SchedulerDeferred, UpdatesOfAChunkKeepTheOrderOfTheCalls) {
  Gate gate;
  DeferredRig rig(host_device(), {5'000, 3'000}, 2, 6);
  rig.save(1);
  rig.scheduler->synchronize();
  rig.tickets[1] = 0;
  rig.sink->set_before([&](const std::string& call, std::uint32_t chunk, bool) {
    if (call == "begin" && chunk == 0) gate.pass();
  });
  rig.submit(0);
  gate.wait_for_arrival();
  rig.submit(1);
  rig.update(1);
  rig.submit(1);
  let_others_run();
  gate.open();
  rig.visit(1);
  rig.check();
  EXPECT_EQ(rig.sink->updates, 4);
}

TEST(SchedulerDeferred, AVisitWaitsForUpdatesFromTheHost) {
  Gate gate;
  DeferredRig rig(host_device(), {5'000, 3'000, 700}, 2, 7);
  rig.scheduler->set_schedule(training_schedule(3));
  for (std::uint32_t c = 0; c < 3; ++c) rig.visit(c);
  for (std::uint32_t c = 3; c-- > 0;) {
    rig.visit(c, Phase::backward);
    rig.save(c);
  }
  rig.scheduler->synchronize();
  rig.sink->set_before(gated(gate, "begin", false));
  for (std::uint32_t c = 0; c < 3; ++c) rig.update(c);
  gate.wait_for_arrival();
  const std::uint64_t uploads = rig.scheduler->counters().uploads;
  std::thread visitor([&] {
    for (std::uint32_t c = 0; c < 3; ++c) rig.visit(c);
  });
  let_others_run();
  EXPECT_EQ(rig.scheduler->counters().uploads, uploads);
  gate.open();
  visitor.join();
  rig.check();
}

TEST(SchedulerDeferred, AnUpdateFromTheHostWaitsForUploadsThatReadItsPlane) {
  const auto device = host_device();
  HeldStream held(device);
  DeferredRig rig(device, {20'011, 20'011}, 1, 8);
  rig.save(1);
  rig.scheduler->synchronize();
  Bytes seen(20'011);
  // Its upload is enqueued behind the held visit of the slot.
  rig.scheduler->acquire(0, Phase::forward, held.handle());
  rig.scheduler->release(0, Phase::forward, held.handle());
  const StreamHandle other = device->create_stream();
  const void* slot = rig.scheduler->acquire(1, Phase::forward, other);
  device->to_host(seen.data(), slot, seen.size(), other);
  rig.scheduler->release(1, Phase::forward, other);
  const Bytes before = rig.weights[1];
  rig.update(1);
  let_others_run();
  EXPECT_EQ(rig.sink->updates, 0);
  held.open();
  device->synchronize(other);
  EXPECT_EQ(seen, before);
  rig.check();
  device->destroy_stream(other);
}

TEST(SchedulerDeferred, WaitUpdatesAndSynchronizeCoverHostUpdatesAndSums) {
  for (const bool everything : {false, true}) {
    for (const bool sums : {false, true}) {
      SCOPED_TRACE(std::string(everything ? "synchronize" : "wait_updates") + (sums ? ", sums" : ", updates"));
      Gate gate;
      DeferredRig rig(host_device(), {9'001, 200}, 1, 9);
      rig.sink->set_before(gated(gate, "begin", sums));
      for (std::uint32_t c = 0; c < 2; ++c) {
        if (sums) {
          rig.add(c, true);
        } else {
          rig.save(c);
          rig.update(c);
        }
      }
      gate.wait_for_arrival();
      std::vector<std::thread> waiters;
      for (int i = 0; i < 4; ++i) {
        waiters.emplace_back([&] {
          everything ? rig.scheduler->synchronize() : rig.scheduler->wait_updates();
          EXPECT_EQ(sums ? rig.sink->sums : rig.sink->updates, 2);
        });
      }
      let_others_run();
      gate.open();
      for (std::thread& waiter : waiters) waiter.join();
      rig.check();
    }
  }
}

// Training steps as the layers above make them, with passes that add up, updates in forward order, and steps that are
// skipped; every visit sees the weights of all updates before it.
TEST(SchedulerDeferred, StepsOfSeveralPasses) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  const std::vector<std::size_t> sizes = {12'289, 4'096, 1, 30'000, 8'192, 77};
  const auto chunks = static_cast<std::uint32_t>(sizes.size());
  DeferredRig rig(host_device(), sizes, 2, seed);
  rig.scheduler->start_trace();
  for (int step = 0; step < 12; ++step) {
    const int passes = draw<int>(rig.random(), 1, 4);
    for (int pass = 0; pass < passes; ++pass) {
      rig.scheduler->set_schedule(training_schedule(chunks, pass == passes - 1));
      for (std::uint32_t c = 0; c < chunks; ++c) rig.visit(c);
      for (std::uint32_t c = chunks; c-- > 0;) {
        rig.visit(c, Phase::backward);
        passes == 1 ? rig.save(c) : rig.add(c, pass == 0);
      }
    }
    if (step % 4 == 3) continue;  // skipped
    for (std::uint32_t c = 0; c < chunks; ++c) rig.update(c);
  }
  rig.check();
  rig.scheduler->stop_trace();
  EXPECT_EQ(rig.sink->updates, 9 * static_cast<int>(chunks));
}

// Any sequence of calls, with every lane slow by turns.
TEST(SchedulerDeferred, RandomCallsEqualTheReference) {
  for (int round = 0; round < 12; ++round) {
    const unsigned seed = new_seed() + static_cast<unsigned>(round);
    SCOPED_TRACE(seed_text(seed));
    const char* lanes[] = {"", "upload", "download", "update"};
    const std::string slow = lanes[round % 4];
    std::atomic<unsigned> calls{seed};
    HookedDevice hooked([&](const char*) {
      char thread[16] = "";
      pthread_getname_np(pthread_self(), thread, sizeof(thread));
      if (slow == thread && ++calls % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(calls % 200));
      return 0;
    });
    HeldStream held(hooked.device());
    held.open();
    DeferredRig rig(hooked.device(), {4'097, 20'000, 3, 8'192}, 1 + round % 3, seed);
    rig.sink->set_before([&](const char*, std::uint32_t, bool) {
      if (slow == "update" && ++calls % 5 == 0) std::this_thread::sleep_for(std::chrono::microseconds(calls % 300));
    });
    std::vector<bool> saved(4);  // the chunk's gradient is there
    for (int call = 0; call < 250; ++call) {
      const auto c = draw<std::uint32_t>(rig.random(), 0, 3);
      const StreamHandle stream = draw<int>(rig.random(), 0, 2) == 0 ? held.handle() : 0;
      switch (draw<int>(rig.random(), 0, 11)) {
        case 0:
        case 1:
        case 2:
          rig.visit(c, call % 2 == 0 ? Phase::forward : Phase::backward);
          break;
        case 3:
        case 4:
          rig.submit(c, stream);
          break;
        case 5:
        case 6:
          rig.save(c, stream);
          saved[c] = true;
          break;
        case 7:
        case 8:
          rig.add(c, !saved[c] || draw<int>(rig.random(), 0, 1) == 0, stream);
          saved[c] = true;
          break;
        case 9:
        case 10:
          if (saved[c]) rig.update(c);
          break;
        default:
          switch (draw<int>(rig.random(), 0, 5)) {
            case 0:
              rig.scheduler->wait_updates();
              break;
            case 1:
              rig.check();
              break;
            case 2:
              rig.scheduler->set_schedule(training_schedule(4, call % 2 == 0));
              break;
            case 3:
              rig.scheduler->invalidate(c);
              break;
            default:
              rig.scheduler->synchronize_ticket(rig.tickets[c]);
              break;
          }
      }
    }
    rig.check();
  }
}

// Both at once: a thread that updates from the host, and one that visits what it updated.
TEST(SchedulerDeferred, ThreadsWithChunksOfTheirOwn) {
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  constexpr std::uint32_t threads = 3;
  DeferredRig rig(host_device(), {5'000, 9'001, 20'000}, threads, seed);
  std::vector<std::thread> workers;
  for (std::uint32_t t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      Random random(seed + t);
      const std::size_t bytes = rig.weights[t].size();
      void* gradient = rig.device->alloc(bytes);
      for (int step = 0; step < 25; ++step) {
        const Bytes source = random_bytes(bytes, random);
        const bool adds = step % 3 == 1;
        std::memcpy(gradient, source.data(), bytes);
        Ticket landed = 0;
        if (adds) {
          rig.sink->prepare(t, {.sums = true, .first = true});
          landed = rig.scheduler->add_gradient(t, gradient, bytes, 0);
        } else {
          landed = rig.scheduler->save_gradient(t, rig.grad_planes[t]->data(), gradient, bytes, 0);
        }
        rig.sink->prepare(t, {.factor = 3});
        rig.scheduler->update(t, rig.grad_planes[t]->data(), bytes, adds ? 0 : landed);
        rig.subtract(t, source, 3);
        rig.grads[t] = source;
        rig.visit(t);
        rig.scheduler->synchronize_ticket(landed);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  rig.check();
}

TEST(SchedulerDeferred, AFailingHostUpdateStopsEverything) {
  const std::size_t threads = threads_now();
  for (const std::string failing : {"begin", "consume", "end", "sum"}) {
    SCOPED_TRACE(failing);
    DeferredRig rig(host_device(), {200, 5 * 4096 + 1, 300}, 2, 10);
    rig.sink->set_before([&](const std::string& call, std::uint32_t chunk, bool sums) {
      const bool fails = failing == "sum" ? sums : !sums && call == failing;
      if (chunk == 1 && fails) throw Error(Code::out_of_memory, "nothing left");
    });
    try {
      for (std::uint32_t c = 0; c < 3; ++c) {
        if (failing == "sum") {
          rig.add(c, true);
        } else {
          rig.save(c);
        }
      }
      for (std::uint32_t c = 0; c < 3; ++c) rig.update(c);
    } catch (const Error&) {
      // the lane failed before the last call: the error is told again below
    }
    const std::vector<std::string> parts = {
        "update lane", failing == "sum" ? "sum of gradients of chunk 'chunk 1'" : "update of chunk 'chunk 1', bytes ",
        "nothing left"};
    const auto refused = [&](const auto& call) { expect_error(Code::out_of_memory, parts, call); };
    refused([&] { rig.scheduler->wait_updates(); });
    refused([&] { rig.scheduler->synchronize(); });
    refused([&] { rig.scheduler->acquire(1, Phase::forward, 0); });
    refused([&] { rig.scheduler->update(0, rig.grad_planes[0]->data(), 200, 0); });
    refused([&] { rig.scheduler->save_gradient(0, rig.grad_planes[0]->data(), rig.grads[0].data(), 200, 0); });
    refused([&] { rig.scheduler->add_gradient(0, rig.grads[0].data(), 200, 0); });
  }
  expect_no_more_threads(threads);
}

TEST(SchedulerDeferred, ADeviceCallThatFailsDuringAHostUpdateStopsEverything) {
  const std::size_t threads = threads_now();
  struct Case {
    std::string function, lane, what;
  };
  for (const Case& c : {Case{"event_synchronize", "update", "update of chunk 'chunk 0'"},
                        Case{"copy_to_host", "download", "download of the gradient of chunk 'chunk 0'"},
                        Case{"event_record", "download", "download of the gradient of chunk 'chunk 0'"}}) {
    SCOPED_TRACE(c.function);
    HookedDevice hooked([&](const char* function) {
      char thread[16] = "";
      pthread_getname_np(pthread_self(), thread, sizeof(thread));
      return function == c.function && thread == c.lane ? 999 : 0;
    });
    DeferredRig rig(hooked.device(), {9'000}, 1, 11);
    const std::vector<std::string> parts = {c.lane + " lane", c.what, "injected fault"};
    expect_error(Code::device, parts, [&] {
      rig.save(0);
      rig.update(0);
      rig.scheduler->wait_updates();
    });
    expect_error(Code::device, parts, [&] { rig.scheduler->update(0, rig.grad_planes[0]->data(), 9'000, 0); });
  }
  expect_no_more_threads(threads);
}

// A call that fails changes nothing: made again, it succeeds.
TEST(SchedulerDeferred, ACallThatFailsCanBeMadeAgain) {
  int failures = 0;
  for (int failing = 0; failing < 12; ++failing) {
    SCOPED_TRACE("device call " + std::to_string(failing) + " of the calling thread fails");
    const auto caller = std::this_thread::get_id();
    bool counting = false;
    int calls = 0;
    HookedDevice hooked([&](const char*) {
      if (std::this_thread::get_id() != caller || !counting) return 0;
      return calls++ == failing ? 999 : 0;
    });
    DeferredRig rig(hooked.device(), {6'000}, 1, 12);
    const auto retried = [&](const auto& call) {
      for (;;) {
        counting = true;
        try {
          const Ticket ticket = call();
          counting = false;
          return ticket;
        } catch (const Error& error) {
          counting = false;
          ++failures;
          if (std::string(error.what()).find("injected fault") == std::string::npos) throw;
        }
      }
    };
    Scheduler& scheduler = *rig.scheduler;
    auto& saved = rig.gradient(0, 0);
    rig.grads[0] = saved.bytes;
    rig.tickets[0] = saved.ticket =
        retried([&] { return scheduler.save_gradient(0, rig.grad_planes[0]->data(), saved.device, 6'000, 0); });
    rig.update(0);
    auto& added = rig.gradient(0, 0);
    rig.grads[0] = added.bytes;
    rig.sink->prepare(0, {.sums = true, .first = true});
    added.ticket = retried([&] { return scheduler.add_gradient(0, added.device, 6'000, 0); });
    const unsigned char factor = 7;
    rig.subtract(0, rig.grads[0], factor);
    rig.sink->prepare(0, {.factor = factor});
    retried([&] {
      scheduler.update(0, rig.grad_planes[0]->data(), 6'000, 0);
      return Ticket{0};
    });
    rig.visit(0);
    rig.check();
  }
  EXPECT_GT(failures, 3) << "the failing calls were not reached";
}

TEST(SchedulerDeferred, DestructionDropsWhatIsQueued) {
  const std::size_t threads = threads_now();
  for (int round = 0; round < 20; ++round) {
    const unsigned seed = new_seed() + static_cast<unsigned>(round);
    SCOPED_TRACE(seed_text(seed));
    DeferredRig rig(host_device(), {50'000, 60'001, 70'002}, 2, seed);
    for (int call = draw<int>(rig.random(), 0, 12); call > 0; --call) {
      const auto chunk = draw<std::uint32_t>(rig.random(), 0, 2);
      call % 3 == 0 ? rig.add(chunk, true) : rig.save(chunk);
      rig.update(chunk);
    }
    rig.scheduler.reset();
  }
  expect_no_more_threads(threads);
}

// The update lane is inside a host update when the scheduler ends; the rest of it, and what is queued, is not consumed.
TEST(SchedulerDeferred, DestructionWaitsForTheSinkOnly) {
  DeferredRig rig(host_device(), {20 * 4096, 4096}, 1, 13);
  Gate gate;
  rig.sink->set_before(gated(gate, "consume", false));
  for (std::uint32_t c = 0; c < 2; ++c) {
    rig.save(c);
    rig.update(c);
  }
  gate.wait_for_arrival();
  std::thread opener([&] {
    let_others_run();
    gate.open();
  });
  rig.scheduler.reset();
  opener.join();
  EXPECT_EQ(rig.sink->updates, 0);
}

TEST(SchedulerDeferred, ArgumentsThatCannotWorkAreRefused) {
  DeferredRig rig(host_device(), {100}, 1, 14);
  Scheduler& s = *rig.scheduler;
  Bytes bytes(100);
  const auto refused = [&](const std::vector<std::string>& parts, const auto& call) {
    expect_error(Code::invalid_argument, parts, call);
  };
  refused({"no chunk 1"}, [&] { s.save_gradient(1, bytes.data(), bytes.data(), 100, 0); });
  refused({"no chunk 1"}, [&] { s.add_gradient(1, bytes.data(), 100, 0); });
  refused({"no chunk 1"}, [&] { s.update(1, bytes.data(), 100, 0); });
  refused({"'chunk 0'", "empty"}, [&] { s.save_gradient(0, bytes.data(), bytes.data(), 0, 0); });
  refused({"'chunk 0'", "empty"}, [&] { s.add_gradient(0, bytes.data(), 0, 0); });
  refused({"'chunk 0'", "empty"}, [&] { s.update(0, bytes.data(), 0, 0); });
  refused({"null address"}, [&] { s.save_gradient(0, nullptr, bytes.data(), 100, 0); });
  refused({"'chunk 0'", "null address"}, [&] { s.update(0, nullptr, 100, 0); });
  refused({"no ticket 5"}, [&] { s.update(0, bytes.data(), 100, 5); });
  rig.check();
  EXPECT_EQ(s.counters().gradients, 0u);

  Bytes slot(100);
  Scheduler without(rig.device, {{"first", bytes.data(), 100, 0}}, {{{slot.data()}, 100}}, nullptr);
  expect_error(Code::state, {"no sink"}, [&] { without.add_gradient(0, bytes.data(), 100, 0); });
  expect_error(Code::state, {"no sink"}, [&] { without.update(0, bytes.data(), 100, 0); });
  Bytes host(100), source(100, 5);
  without.synchronize_ticket(without.save_gradient(0, host.data(), source.data(), 100, 0));  // needs none
  EXPECT_EQ(host, source);
}

TEST(SchedulerDeferred, SumsAndUpdatesAreTraced) {
  DeferredRig rig(host_device(), {9'000}, 1, 15);
  rig.scheduler->start_trace();
  rig.add(0, true);
  rig.update(0);
  rig.save(0);
  rig.scheduler->stop_trace();
  std::map<SpanKind, std::size_t> bytes;
  for (const Span& span : rig.scheduler->trace().spans()) bytes[span.kind] += span.bytes;
  EXPECT_EQ(bytes[SpanKind::sum], 9'000u);
  EXPECT_EQ(bytes[SpanKind::update], 9'000u);
  EXPECT_EQ(bytes[SpanKind::gradient], 18'000u);
  EXPECT_EQ(rig.scheduler->counters().gradients, 2u);
}

}  // namespace
}  // namespace slidecore
