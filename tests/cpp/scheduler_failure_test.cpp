// Device calls, sinks and users that fail: errors that say what happened, no hang, no thread left, nothing lost.

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

}  // namespace
}  // namespace slidecore
