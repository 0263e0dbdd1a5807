// Device calls, sinks and users that fail: errors that say what happened, no hang, no thread left, nothing lost.

#include <pthread.h>

#include <stdexcept>

#include "scheduler_support.h"
#include "slidecore/scheduler.h"

namespace slidecore {
namespace {

using namespace testing_support;

constexpr int kInjected = 999;

// A call that fails changes nothing: made again, it succeeds, and everything else goes on.
TEST(SchedulerFailure, ACallThatFailsCanBeMadeAgain) {
  int failures = 0;
  for (int failing = 0; failing < 40; ++failing) {
    SCOPED_TRACE("device call " + std::to_string(failing) + " of the calling thread fails");
    const auto caller = std::this_thread::get_id();
    bool counting = false;
    int calls = 0;
    HookedDevice hooked([&](const char*) {
      // `counting` and `calls` are this thread's own.
      if (std::this_thread::get_id() != caller || !counting) return 0;
      return calls++ == failing ? kInjected : 0;
    });
    Rig rig(hooked.device(), equal_chunks(3, 6'000), {2}, 1);
    Scheduler& scheduler = *rig.scheduler;
    const auto retried = [&](const auto& call) {
      for (;;) {
        counting = true;
        try {
          auto result = call();
          counting = false;
          return result;
        } catch (const Error& error) {
          counting = false;
          ++failures;
          if (std::string(error.what()).find("injected fault") == std::string::npos) throw;
          EXPECT_EQ(error.code(), Code::device);
        }
      }
    };
    scheduler.set_schedule(training_schedule(3));
    void* input = rig.device->alloc(100);
    void* gradient = rig.device->alloc(6'000);
    std::memset(input, 7, 100);
    Bytes saved(100);
    for (const Phase phase : {Phase::forward, Phase::backward}) {
      for (std::uint32_t i = 0; i < 3; ++i) {
        const std::uint32_t c = phase == Phase::forward ? i : 2 - i;
        rig.read(retried([&] { return scheduler.acquire(c, phase, 0); }), c, 0);
        retried([&] {
          scheduler.release(c, phase, 0);
          return true;
        });
        if (phase == Phase::forward) continue;
        std::memset(gradient, static_cast<int>(c) + 1, 6'000);
        for (unsigned char& w : rig.expected[c]) w = static_cast<unsigned char>(w - c - 1);
        const Ticket landed = retried([&] { return scheduler.submit_gradient(c, gradient, 6'000, 0); });
        retried([&] {
          scheduler.synchronize_ticket(landed);
          return scheduler.done(landed);
        });
      }
      const Ticket save = retried([&] { return scheduler.save_input(0, saved.data(), input, 100, 0); });
      const Ticket fetch = retried([&] { return scheduler.fetch_input(0, input, saved.data(), 100, 0, save); });
      retried([&] {
        scheduler.wait(fetch, 0);
        return true;
      });
    }
    EXPECT_EQ(saved, Bytes(100, 7));
    scheduler.wait_updates();
    rig.check_planes();
    EXPECT_EQ(scheduler.counters().gradients, 3u);
  }
  EXPECT_GT(failures, 30) << "the failing calls were not reached";
}

// Every call but the constructor's, release() included, throws the error of the lane.
void expect_stopped(Rig& rig, Code code, const std::vector<std::string>& parts) {
  Scheduler& s = *rig.scheduler;
  Bytes bytes(8);
  for (int repeat = 0; repeat < 2; ++repeat) {
    expect_error(code, parts, [&] { s.synchronize(); });
    expect_error(code, parts, [&] { s.check(); });
    expect_error(code, parts, [&] { s.acquire(0, Phase::forward, 0); });
    expect_error(code, parts, [&] { s.submit_gradient(0, bytes.data(), 8, 0); });
    expect_error(code, parts, [&] { s.add_gradient(0, bytes.data(), 8, 0); });
    expect_error(code, parts, [&] { s.save_gradient(0, bytes.data(), bytes.data(), 8, 0); });
    expect_error(code, parts, [&] { s.update(0, bytes.data(), 8, 0); });
    expect_error(code, parts, [&] { s.save_input(0, bytes.data(), bytes.data(), 8, 0); });
    expect_error(code, parts, [&] { s.fetch_input(0, bytes.data(), bytes.data(), 8, 0); });
    expect_error(code, parts, [&] { s.wait_updates(); });
    expect_error(code, parts, [&] { s.set_schedule({}); });
    expect_error(code, parts, [&] { s.invalidate(0); });
    expect_error(code, parts, [&] { s.done(0); });
    expect_error(code, parts, [&] { s.wait(0, 0); });
    expect_error(code, parts, [&] { s.synchronize_ticket(0); });
    expect_error(code, parts, [&] { s.start_trace(); });
  }
  s.counters();
  s.trace();
}

// With the ring full and more gradients queued behind it.
TEST(SchedulerFailure, ASinkThatThrowsStopsEverything) {
  const std::size_t threads = threads_now();
  struct Case {
    std::function<void()> raise;
    Code code;
    std::string reason;
  };
  const std::vector<Case> cases = {
      {[] { throw Error(Code::io, "the disk is full"); }, Code::io, "the disk is full"},
      {[] { throw Error(Code::invalid_argument, "a bad table"); }, Code::invalid_argument, "a bad table"},
      {[] { throw Error(Code::out_of_memory, "nothing left"); }, Code::out_of_memory, "nothing left"},
      {[] { throw std::runtime_error("a surprise"); }, Code::state, "a surprise"},
      {[] { throw 7; }, Code::state, "unknown"},
  };
  for (const auto& [raise, code, reason] : cases) {
    for (const std::string failing : {"begin", "consume", "end"}) {
      SCOPED_TRACE(failing + ", " + reason);
      Rig rig(host_device(), {{200}, {9 * 4096 + 1}, {300}}, {2}, 1);
      Gate gate;
      rig.sink->set_before([&](const std::string& call, std::uint32_t chunk) {
        if (chunk != 1 || call != failing) return;
        gate.pass();
        raise();
      });
      rig.scheduler->set_schedule(training_schedule(3));
      rig.acquire(0, Phase::forward);
      rig.submit(2);
      rig.submit(1);
      rig.submit(1);
      // This one waits for an update that will never come.
      std::thread visitor([&] { EXPECT_THROW(rig.scheduler->acquire(1, Phase::forward, 0), Error); });
      while (rig.scheduler->counters().visits < 2) std::this_thread::yield();
      gate.wait_for_arrival();
      gate.open();
      visitor.join();
      const std::vector<std::string> parts = {"update lane", "'chunk 1'", reason};
      expect_stopped(rig, code, parts);
      expect_error(code, parts, [&] { rig.scheduler->release(0, Phase::forward, 0); });
    }
  }
  expect_no_more_threads(threads);
}

TEST(SchedulerFailure, ADeviceCallThatFailsOnALaneStopsEverything) {
  const std::size_t threads = threads_now();
  struct Case {
    std::string function;
    std::string lane;
    int nth;
    int code;
    std::string what;
  };
  const std::vector<Case> cases = {
      {"copy_to_device", "upload", 0, kInjected, "upload of chunk '"},
      {"copy_to_device", "upload", 3, kInjected, "upload of chunk '"},
      {"copy_to_device", "upload", 5, kDeviceOutOfMemory, "upload of chunk '"},
      {"stream_wait_event", "upload", 1, kInjected, "upload of chunk '"},
      {"event_record", "upload", 2, kInjected, "upload of chunk '"},
      {"copy_to_host", "download", 0, kInjected, "download of the gradient of chunk 'chunk 2'"},
      {"copy_to_host", "download", 2, kInjected, "download of the gradient of chunk 'chunk 2'"},
      {"copy_to_host", "download", 5, kInjected, "download of the gradient of chunk 'chunk 1'"},
      {"stream_wait_event", "download", 1, kInjected, "download of the gradient of chunk 'chunk 1'"},
      {"event_record", "download", 1, kInjected, "download of the gradient of chunk 'chunk 2'"},
      {"event_synchronize", "update", 1, kInjected, "update of chunk 'chunk 2', bytes "},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE("call " + std::to_string(c.nth) + " of " + c.function + " on the " + c.lane + " lane");
    std::atomic<int> calls{0};
    HookedDevice hooked([&](const char* function) {
      char thread[16] = "";
      pthread_getname_np(pthread_self(), thread, sizeof(thread));
      if (function != c.function || thread != c.lane) return 0;
      return calls++ == c.nth ? c.code : 0;
    });
    Rig rig(hooked.device(), equal_chunks(3, 4 * 4096 + 5), {1}, 2);
    rig.scheduler->set_schedule(training_schedule(3));
    const std::vector<std::string> parts = {c.lane + " lane", c.what, "injected fault"};
    const Code code = c.code == kDeviceOutOfMemory ? Code::out_of_memory : Code::device;
    expect_error(code, parts, [&] {
      for (;;) rig.step();
    });
    expect_stopped(rig, code, parts);
  }
  expect_no_more_threads(threads);
}

TEST(SchedulerFailure, ASavedInputThatFailsStopsEverything) {
  for (const std::string function : {"copy_to_device", "copy_to_host"}) {
    HookedDevice hooked([&](const char* called) { return called == function ? kInjected : 0; });
    Rig rig(hooked.device(), equal_chunks(1, 100), {1}, 3);
    Bytes host(10), memory(10);
    const bool fetches = function == "copy_to_device";
    const Ticket ticket = fetches ? rig.scheduler->fetch_input(0, memory.data(), host.data(), 10, 0)
                                  : rig.scheduler->save_input(0, host.data(), memory.data(), 10, 0);
    const std::vector<std::string> parts = {fetches ? "upload lane: fetch of an input of chunk 'chunk 0'"
                                                    : "download lane: save of an input of chunk 'chunk 0'",
                                            "copy_to", "10 bytes"};
    expect_error(Code::device, parts, [&] { rig.scheduler->synchronize_ticket(ticket); });
    expect_error(Code::device, parts, [&] { rig.scheduler->wait(ticket, 0); });
    expect_stopped(rig, Code::device, parts);
  }
}

TEST(SchedulerFailure, DestructionDropsWhatIsQueued) {
  const std::size_t threads = threads_now();
  for (int round = 0; round < 20; ++round) {
    const unsigned seed = new_seed();
    SCOPED_TRACE(seed_text(seed));
    Random random(seed);
    Rig rig(host_device(), {{50'000}, {60'001}, {70'002}}, {2}, seed);
    if (round == 0) continue;  // at once
    rig.scheduler->set_schedule(training_schedule(3));
    if (round == 1) continue;
    if (round % 2 == 0) rig.scheduler->start_trace();
    std::vector<Bytes> buffers(4, Bytes(1000));
    for (int call = draw<int>(random, 0, 12); call > 0; --call) {
      const auto chunk = draw<std::uint32_t>(random, 0, 2);
      rig.visit(chunk, Phase::backward);
      rig.submit(chunk);
      const Ticket saved = rig.scheduler->save_input(0, buffers[0].data(), buffers[1].data(), 1000, 0);
      rig.scheduler->fetch_input(0, buffers[2].data(), buffers[3].data(), 1000, 0, saved);
    }
    if (round % 3 == 0) rig.acquire(1, Phase::forward);  // never released
    if (round % 5 == 0) {
      rig.scheduler->submit_gradient(0, rig.device->alloc(50'000), 50'000, 0);
      rig.scheduler->submit_gradient(1, rig.device->alloc(60'001), 60'001, 0);
    }
    rig.scheduler.reset();
  }
  expect_no_more_threads(threads);
}

// The update lane is inside the sink when the scheduler ends; what is queued behind that is not consumed.
TEST(SchedulerFailure, DestructionWaitsForTheSinkOnly) {
  Rig rig(host_device(), equal_chunks(1, 20 * 4096), {1}, 4);
  Gate gate;
  rig.sink->set_before([&](const std::string& call, std::uint32_t) {
    if (call == "consume") gate.pass();
  });
  rig.submit(0);
  gate.wait_for_arrival();
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    gate.open();
  });
  rig.scheduler.reset();
  opener.join();
  EXPECT_EQ(rig.sink->submissions, 0u);
}

TEST(SchedulerFailure, ArgumentsThatCannotWorkAreRefused) {
  const std::size_t threads = threads_now();
  const auto device = host_device();
  Bytes plane(100), slot(100);
  const auto sink = std::make_shared<SubtractSink>();
  const ChunkSpec chunk{"first", plane.data(), 100, 0};
  const WindowSpec window{{slot.data()}, 100};
  const auto refused = [&](const std::vector<std::string>& parts, const auto& construct) {
    expect_error(Code::invalid_argument, parts, construct);
  };
  refused({"device"}, [&] { Scheduler(nullptr, {chunk}, {window}, sink); });
  refused({"at least one slot"}, [&] { Scheduler(device, {chunk}, {{{}, 100}}, sink); });
  refused({"'first'", "no window 0"}, [&] { Scheduler(device, {chunk}, {}, sink); });
  refused({"'wide'", "101", "100"}, [&] { Scheduler(device, {{"wide", plane.data(), 101, 0}}, {window}, sink); });
  refused({"piece_bytes"}, [&] { Scheduler(device, {chunk}, {window}, sink, {.piece_bytes = 0}); });
  refused({"4096"}, [&] { Scheduler(device, {chunk}, {window}, sink, {.piece_bytes = 5000}); });
  refused({"ring_pieces"}, [&] { Scheduler(device, {chunk}, {window}, sink, {.ring_pieces = 1}); });
  expect_no_more_threads(threads);

  Scheduler without_sink(device, {chunk}, {window}, nullptr);
  expect_error(Code::state, {"no sink"}, [&] { without_sink.submit_gradient(0, plane.data(), 100, 0); });
  without_sink.acquire(0, Phase::forward, 0);
  without_sink.release(0, Phase::forward, 0);
  without_sink.wait_updates();
  without_sink.synchronize();
  Scheduler without_chunks(device, {}, {window}, sink, kSmallPieces);
  without_chunks.set_schedule({});
  without_chunks.synchronize();
  expect_error(Code::invalid_argument, {"no chunk 0", "there are 0"},
               [&] { without_chunks.acquire(0, Phase::forward, 0); });
}

}  // namespace
}  // namespace slidecore
