// The scheduler on the CUDA and HIP tables, over the fake driver libraries, which check every handle and range.

#include <dlfcn.h>
#include <unistd.h>

#include <climits>
#include <ostream>

#include "fake_driver/fake_driver_control.h"
#include "scheduler_support.h"
#include "slidecore/scheduler.h"

namespace slidecore {
namespace {

using namespace testing_support;

struct Backend {
  const char* name;
  const char* environment;
  const char* library;
  const char* stream_create;
};

void PrintTo(const Backend& backend, std::ostream* out) {
  *out << backend.name;
}

std::string fake_library(const std::string& file) {
  char path[PATH_MAX + 1] = "";
  if (readlink("/proc/self/exe", path, PATH_MAX) <= 0) return file;
  const std::string executable(path);
  return executable.substr(0, executable.rfind('/')) + "/fake_driver/" + file;
}

class SchedulerOnDriver : public testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    const std::string path = fake_library(GetParam().library);
    ASSERT_EQ(setenv(GetParam().environment, path.c_str(), 1), 0);
    library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    ASSERT_NE(library_, nullptr) << dlerror();
    device = std::make_shared<Device>(GetParam().name, 1);
  }
  void TearDown() override {
    device.reset();
    dlclose(library_);
  }
  template <class Signature>
  Signature* control(const char* function) {
    return reinterpret_cast<Signature*>(dlsym(library_, function));
  }
  FakeLive live() { return control<FakeLiveObjects>("fake_live")(); }

  std::shared_ptr<Device> device;

 private:
  void* library_ = nullptr;
};

TEST_P(SchedulerOnDriver, TrainsAndGivesEverythingBack) {
  const FakeLive before = live();
  const unsigned seed = new_seed();
  SCOPED_TRACE(seed_text(seed));
  const StreamHandle stream = device->create_stream();
  {
    Rig rig(device, {{30'001}, {7}, {8'192}, {12'345, 1}}, {2, 1}, seed);
    rig.scheduler->set_schedule(training_schedule(4));
    rig.scheduler->start_trace();
    for (int step = 0; step < 3; ++step) {
      rig.step(step % 2 == 0 ? 0 : stream);
      rig.check_visits();
    }
    rig.acquire(0, Phase::forward, stream);  // held, with its trace, until the end
    rig.check_visits();
    rig.scheduler->stop_trace();
    rig.check_planes();
    EXPECT_GT(rig.scheduler->trace().spans().size(), 0u);
  }
  device->destroy_stream(stream);
  EXPECT_EQ(live().events, before.events);
  EXPECT_EQ(live().streams, before.streams);
  EXPECT_EQ(live().registrations, before.registrations);
}

TEST_P(SchedulerOnDriver, WorkThatIsDroppedGivesItsEventsBack) {
  const FakeLive before = live();
  {
    Rig rig(device, equal_chunks(4, 60'000), {2}, 1);
    rig.scheduler->start_trace();
    Gate gate;
    rig.sink->set_before([&](const char*, std::uint32_t) {
      gate.pass();
      throw Error(Code::io, "no more");
    });
    for (std::uint32_t c = 0; c < 4; ++c) {
      rig.visit(c, Phase::backward);
      if (c < 2) rig.submit(c);
    }
    gate.wait_for_arrival();
    rig.scheduler->fetch_input(0, nullptr, nullptr, 0, 0, rig.scheduler->save_input(0, nullptr, nullptr, 0, 0));
    gate.open();
  }
  EXPECT_EQ(live().events, before.events);
  EXPECT_EQ(live().streams, before.streams);
  EXPECT_EQ(live().registrations, before.registrations);
}

TEST_P(SchedulerOnDriver, AConstructorThatFailsLeavesNothing) {
  const FakeLive before = live();
  const std::size_t threads = threads_now();
  std::vector<char> plane(100);
  const WindowSpec window{{device->alloc(100), device->alloc(100)}, 100};
  const auto construct = [&](std::size_t bytes) {
    Scheduler(device, {{"first", plane.data(), 100, 0}, {"last", plane.data(), bytes, 0}}, {window},
              std::make_shared<SubtractSink>(), kSmallPieces);
  };
  const std::size_t allocations = live().allocations;
  expect_error(Code::invalid_argument, {"'last'", "101 bytes", "100"}, [&] { construct(101); });
  for (const int skip : {0, 1}) {
    control<FakeFail>("fake_fail")(GetParam().stream_create, 2, skip);
    expect_error(Code::out_of_memory, {"stream_create"}, [&] { construct(100); });
  }
  EXPECT_EQ(live().events, before.events);
  EXPECT_EQ(live().streams, before.streams);
  EXPECT_EQ(live().registrations, before.registrations);
  EXPECT_EQ(live().allocations, allocations);
  expect_no_more_threads(threads);
  construct(100);
}

// The framework's threads keep the device that they had made current.
TEST_P(SchedulerOnDriver, CallsLeaveTheThreadsDeviceAlone) {
  std::thread([&] {
    control<FakeSetCurrent>("fake_set_current")(0);
    {
      Rig rig(device, equal_chunks(3, 5'000), {2}, 2);
      rig.scheduler->set_schedule(training_schedule(3));
      rig.scheduler->start_trace();
      rig.step();
      Bytes host(8);
      void* memory = device->alloc(8);
      const Ticket saved = rig.scheduler->save_input(0, host.data(), memory, 8, 0);
      const Ticket fetched = rig.scheduler->fetch_input(0, memory, host.data(), 8, 0, saved);
      rig.scheduler->wait(fetched, 0);
      rig.scheduler->synchronize_ticket(fetched);
      EXPECT_TRUE(rig.scheduler->done(saved));
      rig.check_planes();
      rig.scheduler->stop_trace();
      rig.scheduler->chrome_trace();
      EXPECT_EQ(control<FakeCurrent>("fake_current")(), 0);
    }
    EXPECT_EQ(control<FakeCurrent>("fake_current")(), 0);
  }).join();
}

INSTANTIATE_TEST_SUITE_P(Fake, SchedulerOnDriver,
                         testing::Values(Backend{"cuda", "SLIDECORE_CUDA_LIBRARY", "libfake_cuda.so", "cuStreamCreate"},
                                         Backend{"hip", "SLIDECORE_HIP_LIBRARY", "libamdhip64.so",
                                                 "hipStreamCreateWithFlags"}),
                         [](const testing::TestParamInfo<Backend>& backend) { return backend.param.name; });

}  // namespace
}  // namespace slidecore
