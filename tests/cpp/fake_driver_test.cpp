// The CUDA and HIP tables over fake driver libraries: loading, failing calls, and what reaches the driver.

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fake_driver/fake_driver_control.h"
#include "memory/registration.h"
#include "slidecore/device.h"
#include "slidecore/memory.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

std::string fake_library(const std::string& file) {
  char path[PATH_MAX + 1] = "";
  const ssize_t length = readlink("/proc/self/exe", path, PATH_MAX);
  if (length <= 0) return file;
  const std::string executable(path, static_cast<std::size_t>(length));
  return executable.substr(0, executable.rfind('/')) + "/fake_driver/" + file;
}

struct Backend {
  const char* name;
  const char* environment;
  const char* library;
  const char* incomplete_library;
  const char* missing[2];
  const char* init;
  const char* alloc;
  const char* free;
  const char* host_register;
  const char* event_query;
  const char* event_create;
  const char* stream_create;
  const char* set_current;
  int numa_node;  // of device 1
};

void PrintTo(const Backend& backend, std::ostream* out) {
  *out << backend.name;
}

constexpr Backend kCuda = {"cuda",
                           "SLIDECORE_CUDA_LIBRARY",
                           "libfake_cuda.so",
                           "libfake_cuda_incomplete.so",
                           {"cuMemHostRegister_v2", "cuEventElapsedTime"},
                           "cuInit",
                           "cuMemAlloc_v2",
                           "cuMemFree_v2",
                           "cuMemHostRegister_v2",
                           "cuEventQuery",
                           "cuEventCreate",
                           "cuStreamCreate",
                           "cuCtxSetCurrent",
                           4};
constexpr Backend kHip = {"hip",
                          "SLIDECORE_HIP_LIBRARY",
                          "libamdhip64.so",
                          "libfake_hip_incomplete.so",
                          {"hipStreamCreateWithFlags", "hipStreamDestroy"},
                          "hipInit",
                          "hipMalloc",
                          "hipFree",
                          "hipHostRegister",
                          "hipEventQuery",
                          "hipEventCreateWithFlags",
                          "hipStreamCreateWithFlags",
                          "hipSetDevice",
                          -1};

void use_library(const Backend& backend, const std::string& path) {
  ASSERT_EQ(setenv(backend.environment, path.c_str(), 1), 0);
}

// The controls of the library that the backend under test has loaded: the same file, hence the same state.
class Control {
 public:
  explicit Control(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) ADD_FAILURE() << dlerror();
  }
  ~Control() {
    if (handle_ != nullptr) dlclose(handle_);
  }
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  void fail(const char* function, int code, int skip = 0) { get<FakeFail>("fake_fail")(function, code, skip); }
  long calls(const char* function) { return get<FakeCalls>("fake_calls")(function); }
  unsigned flags(const char* function) { return get<FakeFlags>("fake_flags")(function); }
  FakeLive live() { return get<FakeLiveObjects>("fake_live")(); }
  int current() { return get<FakeCurrent>("fake_current")(); }
  void set_current(int device) { get<FakeSetCurrent>("fake_set_current")(device); }
  template <typename Signature>
  Signature* get(const char* name) {
    return reinterpret_cast<Signature*>(dlsym(handle_, name));
  }

 private:
  void* handle_;
};

// Runs the call, which must throw, and returns what it threw.
template <typename Call>
Error error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return Error(Code::state, "nothing was thrown");
}

bool contains(const Error& error, const std::string& text) {
  return std::string(error.what()).find(text) != std::string::npos;
}

class FakeDriver : public testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    testing::GTEST_FLAG(death_test_style) = "threadsafe";
    use_library(GetParam(), fake_library(GetParam().library));
  }
  // Opens the control only in tests that may load the library in this process.
  Control& control() {
    if (control_ == nullptr) control_ = std::make_unique<Control>(fake_library(GetParam().library));
    return *control_;
  }
  std::shared_ptr<Device> open(int ordinal = 0) { return std::make_shared<Device>(GetParam().name, ordinal); }

 private:
  std::unique_ptr<Control> control_;
};

// Loading is once per process: what it does is watched in fresh ones, which report by their exit status.
int check(bool condition, const char* what) {
  if (!condition) std::fprintf(stderr, "not so: %s\n", what);
  return condition ? 0 : 1;
}

[[noreturn]] void loads_later(const Backend& backend) {
  int wrong = 0;
  use_library(backend, "/nonexistent/driver.so");
  Error error = error_of([&] { ops_by_name(backend.name); });
  wrong += check(error.code() == Code::unsupported, "a missing library is unsupported");
  wrong += check(contains(error, "/nonexistent/driver.so"), "the missing library is named");
  wrong += check(contains(error, backend.environment), "the variable is named");

  use_library(backend, fake_library(backend.incomplete_library));
  error = error_of([&] { ops_by_name(backend.name); });
  wrong += check(error.code() == Code::unsupported, "an incomplete library is unsupported");
  wrong += check(contains(error, backend.incomplete_library), "the incomplete library is named");
  for (const char* missing : backend.missing) wrong += check(contains(error, missing), missing);
  wrong += check(!contains(error, backend.init), "no function that is there is named");

  use_library(backend, fake_library(backend.library));
  const DeviceOps& ops = ops_by_name(backend.name);
  Control control(fake_library(backend.library));
  wrong += check(control.calls(backend.init) == 0, "loading does not initialise the driver");
  int count = 0;
  wrong += check(ops.device_count(&count) == 0 && count == 2, "two devices");
  wrong += check(control.calls(backend.init) == 1, "counting does");
  std::exit(wrong);
}

TEST_P(FakeDriver, FailedLoadNamesEverythingAndMayBeRepeated) {
  EXPECT_EXIT(loads_later(GetParam()), testing::ExitedWithCode(0), "");
}

[[noreturn]] void loads_by_many_threads(const Backend& backend) {
  std::vector<std::jthread> threads;
  std::atomic<const DeviceOps*> seen{nullptr};
  std::atomic<int> wrong{0};
  for (int i = 0; i < 11; ++i) {
    threads.emplace_back([&] {
      const DeviceOps* ops = &ops_by_name(backend.name);
      const DeviceOps* other = seen.exchange(ops);
      if (other != nullptr && other != ops) ++wrong;
      Device device(*ops, 1);
      device.free(device.alloc(77));
    });
  }
  threads.clear();
  std::exit(wrong.load());
}

TEST_P(FakeDriver, FirstUseByManyThreads) {
  EXPECT_EXIT(loads_by_many_threads(GetParam()), testing::ExitedWithCode(0), "");
}

[[noreturn]] void reuses_mapped_hip() {
  unsetenv(kHip.environment);
  Control framework(fake_library(kHip.library));
  int count = 0;
  int wrong = check(hip_ops().device_count(&count) == 0 && count == 2, "the mapped library answers");
  wrong += check(framework.calls(kHip.init) == 1, "it is the framework's copy");
  std::exit(wrong);
}

TEST(HipLibrary, OneThatIsMappedAlreadyIsReused) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  EXPECT_EXIT(reuses_mapped_hip(), testing::ExitedWithCode(0), "");
}

TEST(HipLibrary, FailuresOfOursAreNotLeftForTheFramework) {
  use_library(kHip, fake_library(kHip.library));
  Control control(fake_library(kHip.library));
  const Device device("hip", 0);
  const auto last_error = control.get<int()>("hipGetLastError");
  const EventHandle event = device.create_event();
  control.fail(kHip.event_query, 600);
  EXPECT_FALSE(device.done(event));
  EXPECT_EQ(last_error(), 0);
  error_of([&] { device.alloc(std::size_t{1} << 40); });
  EXPECT_EQ(last_error(), 0);
  error_of([&] { device.synchronize(12345); });
  EXPECT_EQ(last_error(), 0);
  device.destroy_event(event);
}

TEST_P(FakeDriver, Describes) {
  const auto device = open(1);
  EXPECT_STREQ(device->info().name, "fake device 1");
  EXPECT_EQ(device->info().total_bytes, std::uint64_t{64} << 20);
  EXPECT_EQ(device->info().numa_node, GetParam().numa_node);
  EXPECT_TRUE(device->needs_pinning());
  EXPECT_FALSE(device->is_host());
  EXPECT_STREQ(device->ops().name, GetParam().name);
}

TEST_P(FakeDriver, UnknownOrdinalIsAnError) {
  const Error error = error_of([&] { open(7); });
  EXPECT_EQ(error.code(), Code::device);
  for (const char* part : {"open", GetParam().name, "7", "FAKE_ERROR_INVALID_DEVICE", "DeviceGet"}) {
    EXPECT_TRUE(contains(error, part)) << part << " is not in: " << error.what();
  }
}

TEST_P(FakeDriver, RoundTrip) {
  const auto device = open();
  std::mt19937 random(std::random_device{}());
  const StreamHandle stream = device->create_stream();
  const EventHandle start = device->create_event(true), end = device->create_event(true);
  EXPECT_EQ(control().flags(GetParam().stream_create), 1u);  // non-blocking
  EXPECT_EQ(control().flags(GetParam().event_create), 1u);   // blocking sync, timing
  const EventHandle plain = device->create_event();
  EXPECT_EQ(control().flags(GetParam().event_create), 3u);  // no timing

  for (const std::size_t bytes : {std::size_t{1}, std::size_t{4097}, std::size_t{(1 << 20) + 13}}) {
    std::vector<unsigned char> source(bytes), target(bytes, 0);
    for (auto& byte : source) byte = static_cast<unsigned char>(random());
    void* memory = device->alloc(bytes);
    device->record(start, stream);
    device->to_device(memory, source.data(), bytes, stream);
    device->record(end, stream);
    device->wait(0, end);
    device->to_host(target.data(), memory, bytes, 0);
    device->synchronize(0);
    device->synchronize(stream);
    device->synchronize_event(end);
    EXPECT_TRUE(device->done(end));
    EXPECT_DOUBLE_EQ(device->elapsed_ms(start, end), 1.5);
    EXPECT_EQ(source, target);
    EXPECT_EQ(device->memory_in_use().now, bytes);
    device->free(memory);
  }
  EXPECT_EQ(device->memory_in_use().now, 0u);
  EXPECT_EQ(device->memory_in_use().peak, std::uint64_t{(1 << 20) + 13});
  device->to_device(nullptr, nullptr, 0, stream);  // nothing to copy
  device->free(nullptr);
  for (const EventHandle event : {start, end, plain}) device->destroy_event(event);
  device->destroy_stream(stream);
  EXPECT_EQ(control().live().streams, 0u);
  EXPECT_EQ(control().live().events, 0u);
}

TEST_P(FakeDriver, OutOfMemoryIsItsOwnCode) {
  const auto device = open();
  const Error error = error_of([&] { device->alloc(std::size_t{1} << 40); });
  EXPECT_EQ(error.code(), Code::out_of_memory);
  for (const char* part : {"alloc of 1099511627776 bytes", GetParam().name, "device 0", "FAKE_ERROR_OUT_OF_MEMORY",
                           GetParam().alloc, " of 67108864 bytes free"}) {
    EXPECT_TRUE(contains(error, part)) << part << " is not in: " << error.what();
  }
  EXPECT_EQ(device->memory_in_use().peak, 0u);
}

TEST_P(FakeDriver, BadArgumentsReachTheCaller) {
  const auto device = open();
  EXPECT_TRUE(contains(error_of([&] { device->synchronize(12345); }), "FAKE_ERROR_INVALID_HANDLE"));
  EXPECT_TRUE(contains(error_of([&] { device->alloc(0); }), "0 bytes"));
  int local = 0;
  EXPECT_TRUE(contains(error_of([&] { device->free(&local); }), "not allocated by this device"));
  EXPECT_EQ(error_of([&] { device->destroy_stream(0); }).code(), Code::device);
}

TEST_P(FakeDriver, NotReadyIsNotDone) {
  const auto device = open();
  const EventHandle event = device->create_event();
  control().fail(GetParam().event_query, 600);
  EXPECT_FALSE(device->done(event));
  EXPECT_TRUE(device->done(event));
  control().fail(GetParam().event_query, 719);
  EXPECT_EQ(error_of([&] { static_cast<void>(device->done(event)); }).code(), Code::device);
  device->destroy_event(event);
}

TEST_P(FakeDriver, AThreadKeepsTheDeviceItsFrameworkSet) {
  const auto device = open(0);
  std::jthread([&] {
    control().set_current(1);
    device->free(device->alloc(33));
    EXPECT_EQ(control().current(), 1);
    error_of([&] { device->alloc(std::size_t{1} << 40); });
    EXPECT_EQ(control().current(), 1);
    HostBuffer buffer(device, 4099, true);
    EXPECT_EQ(control().current(), 1);
    device->bind_thread();
    EXPECT_EQ(control().current(), 0);
    const long set = control().calls(GetParam().set_current);
    device->bind_thread();
    device->free(device->alloc(33));
    EXPECT_EQ(control().calls(GetParam().set_current), set);  // bound threads do not switch
  });
}

TEST_P(FakeDriver, AFailedSwitchIsReportedAndNothingElseIsCalled) {
  const auto device = open(1);
  std::jthread([&] {
    const long before = control().calls(GetParam().alloc);
    control().fail(GetParam().set_current, 46);
    EXPECT_EQ(error_of([&] { device->alloc(5); }).code(), Code::device);
    EXPECT_EQ(control().calls(GetParam().alloc), before);
  });
}

TEST_P(FakeDriver, ClosingFreesWhatWasForgotten) {
  const std::size_t before = control().live().allocations;
  {
    const auto device = open();
    device->alloc(1001);
    device->alloc(17);
    EXPECT_EQ(control().live().allocations, before + 2);
  }
  EXPECT_EQ(control().live().allocations, before);
}

TEST_P(FakeDriver, ReleasingIsQuietWhenTheDriverIsGone) {
  const auto device = open();
  void* memory = device->alloc(55);
  control().fail(GetParam().free, 4);  // deinitialized
  EXPECT_NO_THROW(device->free(memory));
  memory = device->alloc(55);
  control().fail(GetParam().free, 719);
  EXPECT_THROW(device->free(memory), Error);
}

TEST_P(FakeDriver, ManyThreads) {
  const auto device = open();
  const std::size_t before = control().live().allocations;
  std::random_device seeds;
  std::vector<std::jthread> threads;
  for (int thread = 0; thread < 7; ++thread) {
    threads.emplace_back([&, seed = seeds()] {
      std::mt19937 random(seed);
      device->bind_thread();
      const StreamHandle stream = device->create_stream();
      const EventHandle event = device->create_event();
      for (int i = 0; i < 50; ++i) {
        std::vector<unsigned> source(1 + random() % 1000), target(source.size());
        for (auto& word : source) word = static_cast<unsigned>(random());
        const std::size_t bytes = source.size() * sizeof(unsigned);
        void* memory = device->alloc(bytes);
        device->to_device(memory, source.data(), bytes, stream);
        device->record(event, stream);
        device->wait(stream, event);
        device->to_host(target.data(), memory, bytes, stream);
        device->synchronize(stream);
        EXPECT_EQ(source, target);
        device->free(memory);
      }
      device->destroy_event(event);
      device->destroy_stream(stream);
    });
  }
  threads.clear();
  EXPECT_EQ(device->memory_in_use().now, 0u);
  EXPECT_EQ(control().live().allocations, before);
}

TEST_P(FakeDriver, BuffersAreRegisteredUntilTheyGo) {
  const auto device = open();
  {
    HostBuffer pinned(device, 12345, true), plain(device, 12345, false), empty(device, 0, true);
    EXPECT_TRUE(pinned.pinned());
    EXPECT_FALSE(plain.pinned());
    EXPECT_FALSE(empty.pinned());
    EXPECT_EQ(control().live().registrations, 1u);
  }
  EXPECT_EQ(control().live().registrations, 0u);
}

TEST_P(FakeDriver, AFailedRegistrationUndoesTheBuffer) {
  const auto device = open();
  const std::uint64_t mapped = HostBuffer::mapped_now();
  control().fail(GetParam().host_register, 2);
  const Error error = error_of([&] { HostBuffer(device, 12345, true); });
  EXPECT_EQ(error.code(), Code::out_of_memory);
  for (const char* part : {"bytes of host memory", "FAKE_ERROR_OUT_OF_MEMORY", "ulimit -l", "memlock"}) {
    EXPECT_TRUE(contains(error, part)) << part << " is not in: " << error.what();
  }
  EXPECT_EQ(HostBuffer::mapped_now(), mapped);
  EXPECT_EQ(control().live().registrations, 0u);
}

TEST_P(FakeDriver, LongRangesAreRegisteredInPieces) {
  const auto device = open();
  std::vector<char> memory(10'007);
  auto pieces = memory::register_pieces(*device, memory.data(), memory.size(), 1000);
  EXPECT_EQ(pieces.size(), 11u);
  EXPECT_EQ(control().live().registrations, 11u);
  memory::unregister_pieces(*device, pieces);
  EXPECT_TRUE(pieces.empty());
  EXPECT_EQ(control().live().registrations, 0u);

  control().fail(GetParam().host_register, 712, 6);
  const Error error = error_of([&] { memory::register_pieces(*device, memory.data(), memory.size(), 1000); });
  EXPECT_EQ(error.code(), Code::device);
  EXPECT_TRUE(contains(error, "10007 bytes")) << error.what();
  EXPECT_TRUE(contains(error, "at byte 6000")) << error.what();
  EXPECT_EQ(control().live().registrations, 0u);
}

INSTANTIATE_TEST_SUITE_P(Drivers, FakeDriver, testing::Values(kCuda, kHip),
                         [](const auto& suite) { return std::string(suite.param.name); });

}  // namespace

}  // namespace slidecore
