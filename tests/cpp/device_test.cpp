// What every device does, run on the host backend and on each driver that this machine has a card for, and what
// only the host backend lets a test see.

#include "slidecore/device.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "device/host_event.h"
#include "device/host_stream.h"
#include "slidecore/memory.h"
#include "slidecore/status.h"

// Sanitizers end the process where malloc would return null, which is what a test here asks for.
extern "C" const char* __asan_default_options() {
  return "allocator_may_return_null=1";
}
extern "C" const char* __tsan_default_options() {
  return "allocator_may_return_null=1";
}

namespace slidecore {
namespace {

using Random = std::mt19937_64;

// The seed is part of every failure's message.
Random seeded() {
  const unsigned seed = std::random_device{}();
  testing::Test::RecordProperty("seed", std::to_string(seed));
  std::printf("seed %u\n", seed);
  return Random(seed);
}

void fill(void* data, std::size_t bytes, Random& random) {
  auto* at = static_cast<unsigned char*>(data);
  for (std::size_t i = 0; i < bytes; ++i) at[i] = static_cast<unsigned char>(random());
}

class AnyDevice : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    try {
      const DeviceOps& ops = ops_by_name(GetParam());
      int count = 0;
      if (ops.device_count(&count) != 0) GTEST_SKIP() << ops.last_error();
      if (count == 0) GTEST_SKIP() << "no " << GetParam() << " device here";
      device = std::make_shared<Device>(ops, 0);
    } catch (const Error& error) {
      // The host backend is there everywhere; a driver need not be, but what fails with a card is a failure.
      if (error.code() != Code::unsupported || std::string(GetParam()) == "host") throw;
      GTEST_SKIP() << error.what();
    }
  }
  std::shared_ptr<Device> device;
};

TEST_P(AnyDevice, RoundTripsOddSizes) {
  Random random = seeded();
  const StreamHandle streams[] = {0, device->create_stream()};
  for (const StreamHandle stream : streams) {
    for (const std::size_t bytes : {1u, 3u, 255u, 4097u, 65'537u, 3'000'017u}) {
      HostBuffer source(device, bytes, true), target(device, bytes, true);
      fill(source.data(), bytes, random);
      void* memory = device->alloc(bytes);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 256, 0u);
      device->to_device(memory, source.data(), bytes, stream);
      device->to_host(target.data(), memory, bytes, stream);
      device->synchronize(stream);
      EXPECT_EQ(std::memcmp(source.data(), target.data(), bytes), 0) << bytes << " bytes";
      device->free(memory);
    }
  }
  device->destroy_stream(streams[1]);
}

TEST_P(AnyDevice, AccountsForWhatItAllocates) {
  EXPECT_EQ(device->memory_in_use().now, 0u);
  void* first = device->alloc(1001);
  void* second = device->alloc(30'011);
  EXPECT_EQ(device->memory_in_use().now, 31'012u);
  device->free(first);
  EXPECT_EQ(device->memory_in_use().now, 30'011u);
  device->free(device->alloc(7));
  device->free(second);
  device->free(nullptr);
  EXPECT_EQ(device->memory_in_use().now, 0u);
  EXPECT_EQ(device->memory_in_use().peak, 31'012u);
}

TEST_P(AnyDevice, RunningOutOfMemoryIsItsOwnError) {
  try {
    device->alloc(std::size_t{1} << 50);
    FAIL() << "a pebibyte was allocated";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::out_of_memory);
    const std::string text = error.what();
    for (const char* part : {"alloc of 1125899906842624 bytes", GetParam(), "device 0"}) {
      EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
    }
  }
  EXPECT_EQ(device->memory_in_use().peak, 0u);
  EXPECT_THROW(device->alloc(0), Error);
}

TEST_P(AnyDevice, EventsStartDone) {
  const EventHandle event = device->create_event();
  const StreamHandle stream = device->create_stream();
  EXPECT_TRUE(device->done(event));
  device->synchronize_event(event);
  device->wait(stream, event);
  device->wait(0, event);
  device->synchronize(stream);
  device->destroy_stream(stream);
  device->destroy_event(event);
}

TEST_P(AnyDevice, TimesBetweenEvents) {
  const StreamHandle stream = device->create_stream();
  const EventHandle start = device->create_event(true), end = device->create_event(true),
                    plain = device->create_event();
  double ms = 0;
  EXPECT_THROW(ms = device->elapsed_ms(start, end), Error) << "never recorded: " << ms;
  const std::size_t bytes = 1'000'003;
  HostBuffer host(device, bytes, true);
  void* memory = device->alloc(bytes);
  device->record(start, stream);
  device->to_device(memory, host.data(), bytes, stream);
  device->record(end, stream);
  device->record(plain, stream);
  device->synchronize_event(end);
  EXPECT_GT(device->elapsed_ms(start, end), 0.0);
  EXPECT_LT(device->elapsed_ms(end, start), 0.0);
  device->synchronize(stream);
  EXPECT_THROW(ms = device->elapsed_ms(start, plain), Error) << "without timing: " << ms;
  device->free(memory);
  for (const EventHandle event : {start, end, plain}) device->destroy_event(event);
  device->destroy_stream(stream);
}

// Copies between host and device regions on many streams, in the order that their data dependencies ask for and no
// more. Each stream has one event that it records again after every copy, so that waits must refer to the record
// that was the latest when they were asked for.
class CopyGraph {
 public:
  CopyGraph(std::shared_ptr<Device> device, Random& random, std::size_t streams, std::size_t regions)
      : device_(std::move(device)), random_(random), regions_(2 * regions), host_(device_, regions * kBytes, true) {
    fill(host_.data(), host_.size(), random_);
    streams_.push_back(0);
    while (streams_.size() < streams) streams_.push_back(device_->create_stream());
    for (std::size_t i = 0; i < streams; ++i) events_.push_back(device_->create_event());
    for (std::size_t i = 0; i < regions; ++i) {
      actual_.push_back(static_cast<unsigned char*>(host_.data()) + i * kBytes);
      expected_.emplace_back(actual_.back(), actual_.back() + kBytes);
    }
    for (std::size_t i = 0; i < regions; ++i) {
      actual_.push_back(static_cast<unsigned char*>(device_->alloc(kBytes)));
      expected_.push_back(expected_[i]);
      device_->to_device(actual_.back(), actual_[i], kBytes, 0);
    }
    device_->synchronize(0);
  }

  ~CopyGraph() {
    for (std::size_t i = 0; i < streams_.size(); ++i) {
      device_->destroy_event(events_[i]);
      if (streams_[i] != 0) device_->destroy_stream(streams_[i]);
    }
    for (std::size_t i = actual_.size() / 2; i < actual_.size(); ++i) device_->free(actual_[i]);
  }
  CopyGraph(const CopyGraph&) = delete;
  CopyGraph& operator=(const CopyGraph&) = delete;

  void copy() {
    const std::size_t half = actual_.size() / 2;
    const bool up = random_() % 2 == 0;
    const std::size_t from = random_() % half + (up ? 0 : half), to = random_() % half + (up ? half : 0);
    const std::size_t stream = random_() % streams_.size();
    const std::size_t bytes = 1 + random_() % kBytes;
    const std::size_t source = random_() % (kBytes - bytes + 1), target = random_() % (kBytes - bytes + 1);

    std::vector<bool> before(streams_.size(), false);
    if (regions_[from].written) before[regions_[from].writer] = true;
    if (regions_[to].written) before[regions_[to].writer] = true;
    for (const std::size_t reader : regions_[to].readers) before[reader] = true;
    for (std::size_t other = 0; other < streams_.size(); ++other) {
      if (before[other] && other != stream) device_->wait(streams_[stream], events_[other]);
    }
    if (up) {
      device_->to_device(actual_[to] + target, actual_[from] + source, bytes, streams_[stream]);
    } else {
      device_->to_host(actual_[to] + target, actual_[from] + source, bytes, streams_[stream]);
    }
    device_->record(events_[stream], streams_[stream]);

    std::memcpy(expected_[to].data() + target, expected_[from].data() + source, bytes);
    regions_[from].readers.push_back(stream);
    regions_[to] = {true, stream, {}};
  }

  // Number of regions that differ from the sequential result.
  int wrong() {
    for (const StreamHandle stream : streams_) device_->synchronize(stream);
    const std::size_t half = actual_.size() / 2;
    int count = 0;
    for (std::size_t i = 0; i < half; ++i) count += std::memcmp(actual_[i], expected_[i].data(), kBytes) != 0;
    for (std::size_t i = 0; i < half; ++i) {
      device_->to_host(actual_[i], actual_[half + i], kBytes, 0);
      device_->synchronize(0);
      count += std::memcmp(actual_[i], expected_[half + i].data(), kBytes) != 0;
    }
    return count;
  }

 private:
  static constexpr std::size_t kBytes = 150'001;
  struct Region {
    bool written = false;
    std::size_t writer = 0;
    std::vector<std::size_t> readers;
  };
  std::shared_ptr<Device> device_;
  Random& random_;
  std::vector<Region> regions_;
  HostBuffer host_;
  std::vector<StreamHandle> streams_;
  std::vector<EventHandle> events_;
  std::vector<unsigned char*> actual_;
  std::vector<std::vector<unsigned char>> expected_;
};

TEST_P(AnyDevice, CopiesOnManyStreamsEndAsInSequence) {
  Random random = seeded();
  for (const std::size_t streams : {2, 7}) {
    CopyGraph graph(device, random, streams, 5);
    for (int i = 0; i < 1'500; ++i) graph.copy();
    EXPECT_EQ(graph.wrong(), 0);
  }
}

TEST_P(AnyDevice, DestroyingLetsPendingWorkRun) {
  Random random = seeded();
  const std::size_t bytes = 2'000'003;
  HostBuffer source(device, bytes, true), target(device, bytes, true);
  fill(source.data(), bytes, random);
  void* memory = device->alloc(bytes);
  const StreamHandle first = device->create_stream(), second = device->create_stream();
  const EventHandle middle = device->create_event(), end = device->create_event();
  for (int i = 0; i < 5; ++i) device->to_device(memory, source.data(), bytes, first);
  device->record(middle, first);
  device->wait(second, middle);
  device->destroy_event(middle);  // a wait for it is queued
  device->to_host(target.data(), memory, bytes, second);
  device->record(end, second);
  device->destroy_stream(second);
  device->destroy_stream(first);
  device->synchronize_event(end);
  device->destroy_event(end);
  EXPECT_EQ(std::memcmp(source.data(), target.data(), bytes), 0);
  device->free(memory);
}

TEST_P(AnyDevice, ThreadsShareIt) {
  std::random_device seeds;
  std::vector<std::jthread> threads;
  for (int thread = 0; thread < 5; ++thread) {
    threads.emplace_back([this, seed = seeds(), thread] {
      if (thread % 2 == 0) device->bind_thread();
      Random random(seed);
      CopyGraph graph(device, random, 3, 2);
      for (int i = 0; i < 100; ++i) graph.copy();
      EXPECT_EQ(graph.wrong(), 0) << "seed " << seed;
    });
  }
  threads.clear();
  EXPECT_EQ(device->memory_in_use().now, 0u);
}

INSTANTIATE_TEST_SUITE_P(Backends, AnyDevice, testing::Values("host", "cuda", "hip"),
                         [](const auto& suite) { return std::string(suite.param); });

TEST(Ops, AreFoundByName) {
  EXPECT_EQ(&ops_by_name("host"), &host_ops());
  try {
    ops_by_name("abacus");
    FAIL() << "found";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Code::invalid_argument);
    EXPECT_NE(std::string(error.what()).find("abacus"), std::string::npos);
  }
}

TEST(Ops, ATableOfAnotherVersionIsRefused) {
  DeviceOps other = host_ops();
  other.version += 1;
  EXPECT_THROW(Device(other, 0), Error);
  other = host_ops();
  other.struct_size -= 8;
  EXPECT_THROW(Device(other, 0), Error);
}

TEST(HostDevice, HasOneOrdinalAndNoMemoryOfItsOwn) {
  const Device device("host", 0);
  EXPECT_TRUE(device.is_host());
  EXPECT_FALSE(device.needs_pinning());
  EXPECT_EQ(device.info().total_bytes, 0u);
  EXPECT_EQ(device.info().numa_node, -1);
  EXPECT_THROW(Device("host", 1), Error);
}

TEST(HostDevice, StaleAndForeignHandlesAreErrors) {
  const Device device("host", 0), other("host", 0);
  const StreamHandle stream = device.create_stream();
  const EventHandle event = device.create_event();
  EXPECT_THROW(other.synchronize(stream), Error);
  EXPECT_THROW(other.record(event, 0), Error);
  EXPECT_THROW(device.record(event, stream + 1), Error);
  EXPECT_THROW(device.wait(event, event), Error);
  device.destroy_stream(stream);
  EXPECT_THROW(device.destroy_stream(stream), Error);
  EXPECT_THROW(device.record(event, stream), Error);
  device.destroy_event(event);
  EXPECT_THROW(static_cast<void>(device.done(event)), Error);
  int local = 0;
  EXPECT_THROW(device.free(&local), Error);
  EXPECT_THROW(device.to_device(nullptr, &local, 4, 0), Error);
  EXPECT_NO_THROW(device.to_device(nullptr, nullptr, 0, 0));
}

TEST(HostDevice, StreamZeroIsTheCallingThread) {
  const Device device("host", 0);
  const int source = 12345;
  int target = 0;
  device.to_device(&target, &source, sizeof(source), 0);
  EXPECT_EQ(target, 12345);  // without any synchronisation
  const EventHandle event = device.create_event(true);
  device.record(event, 0);
  EXPECT_TRUE(device.done(event));
  device.destroy_event(event);
}

// A stream that stands still until open(): what is queued behind it is pending for sure.
class HeldStream {
 public:
  HeldStream() { stream.enqueue(device::HostTask::make_wait(gate_)); }
  ~HeldStream() { open(); }
  HeldStream(const HeldStream&) = delete;
  HeldStream& operator=(const HeldStream&) = delete;
  void open() {
    if (!gate_->done()) gate_->complete();
  }

 private:
  std::shared_ptr<device::HostRecord> gate_ = std::make_shared<device::HostRecord>();

 public:
  device::HostStream stream;  // drains after the gate opened, while the gate still exists
};

TEST(HostEvents, AWaitRefersToTheLatestRecordAtItsCall) {
  HeldStream held;
  device::HostEvent event(false);
  EXPECT_EQ(event.latest(), nullptr);
  event.record(&held.stream);
  const auto first = event.latest();
  EXPECT_FALSE(first->done());
  event.record(nullptr);  // recorded again, by a thread that is ahead
  EXPECT_TRUE(event.latest()->done());
  EXPECT_FALSE(first->done());
  held.open();
  first->wait();
  EXPECT_TRUE(first->done());
}

TEST(HostEvents, ALaterRecordDoesNotHoldAnEarlierWaitBack) {
  HeldStream held;
  device::HostStream other;
  device::HostEvent event(false);
  event.record(nullptr);
  other.enqueue(device::HostTask::make_wait(event.latest()));
  event.record(&held.stream);
  other.synchronize();  // would hang if the wait were for the second record
  EXPECT_FALSE(event.latest()->done());
}

TEST(HostEvents, OrderIsThatOfTheStream) {
  HeldStream held;
  device::HostEvent first(true), second(true);
  first.record(&held.stream);
  second.record(&held.stream);
  EXPECT_FALSE(first.latest()->done());
  held.open();
  second.latest()->wait();
  EXPECT_TRUE(first.latest()->done());
  EXPECT_LE(first.latest()->time(), second.latest()->time());
}

TEST(HostEvents, ADestroyedEventStillCompletesItsWaits) {
  HeldStream held;
  device::HostStream other;
  const int source = 77;
  int target = 0;
  {
    device::HostEvent event(false);
    event.record(&held.stream);
    other.enqueue(device::HostTask::make_wait(event.latest()));
  }
  other.enqueue(device::HostTask::make_copy(&target, &source, sizeof(source)));
  held.open();
  other.synchronize();
  EXPECT_EQ(target, 77);
}

TEST(HostStreams, DestructionDrains) {
  std::vector<unsigned> source(100'003), target(source.size());
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<unsigned>(i * 2'654'435'761u);
  {
    HeldStream held;
    for (std::size_t i = 0; i < source.size(); i += 1000) {
      const std::size_t count = std::min<std::size_t>(1000, source.size() - i);
      held.stream.enqueue(device::HostTask::make_copy(&target[i], &source[i], count * sizeof(unsigned)));
    }
    EXPECT_EQ(target[source.size() - 1], 0u);
  }
  EXPECT_EQ(source, target);
}

TEST(HostStreams, AClosedStreamTakesNoWork) {
  device::HostStream stream;
  stream.close();
  stream.close();
  EXPECT_THROW(stream.enqueue(device::HostTask::make_copy(nullptr, nullptr, 0)), std::runtime_error);
}

TEST(HostStreams, ManyThreadsFeedOne) {
  const Device device("host", 0);
  const StreamHandle stream = device.create_stream();
  const EventHandle event = device.create_event();  // shared: waits may meet any thread's record
  std::vector<std::vector<int>> targets(5, std::vector<int>(200, 0));
  std::vector<std::vector<int>> sources = targets;
  std::vector<std::jthread> threads;
  for (std::size_t t = 0; t < targets.size(); ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t i = 0; i < sources[t].size(); ++i) {
        sources[t][i] = static_cast<int>(t * 1000 + i);
        device.to_device(&targets[t][i], &sources[t][i], sizeof(int), stream);
        device.record(event, stream);
        device.wait(stream, event);
        static_cast<void>(device.done(event));
      }
    });
  }
  threads.clear();
  device.synchronize(stream);
  EXPECT_EQ(sources, targets);
  device.destroy_event(event);
  device.destroy_stream(stream);
}

}  // namespace
}  // namespace slidecore
