#pragma once
// What the scheduler's tests share: seeds that failures show, a sink with a reference that is easy to compute, a
// device table whose calls can be made to fail or to wait, and a model of planes, slots and scheduler together.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "slidecore/device.h"
#include "slidecore/memory.h"
#include "slidecore/scheduler.h"
#include "slidecore/status.h"

namespace slidecore::testing_support {

using Random = std::mt19937_64;
using Bytes = std::vector<unsigned char>;

// Put it in a SCOPED_TRACE; SLIDECORE_TEST_SEED repeats a failure.
inline unsigned new_seed() {
  const char* fixed = std::getenv("SLIDECORE_TEST_SEED");
  return fixed != nullptr ? static_cast<unsigned>(std::strtoul(fixed, nullptr, 10)) : std::random_device{}();
}

inline std::string seed_text(unsigned seed) {
  return "SLIDECORE_TEST_SEED=" + std::to_string(seed);
}

// In [low, high].
template <class Integer>
Integer draw(Random& random, Integer low, Integer high) {
  return std::uniform_int_distribution<Integer>(low, high)(random);
}

inline void randomize(void* data, std::size_t bytes, Random& random) {
  auto* at = static_cast<unsigned char*>(data);
  for (std::size_t i = 0; i < bytes; ++i) at[i] = static_cast<unsigned char>(random());
}

inline Bytes random_bytes(std::size_t bytes, Random& random) {
  Bytes out(bytes);
  randomize(out.data(), bytes, random);
  return out;
}

// Runs the call, which must throw an Error, and returns it.
template <class Call>
Error error_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return Error(Code::unsupported, "");
}

template <class Call>
void expect_error(Code code, const std::vector<std::string>& parts, const Call& call) {
  const Error error = error_of(call);
  const std::string text = error.what();
  EXPECT_EQ(error.code(), code) << text;
  for (const std::string& part : parts) {
    EXPECT_NE(text.find(part), std::string::npos) << '"' << part << "\" is not in: " << text;
  }
}

// Threads of this process. A sanitizer starts one of its own with the first that the program starts.
inline std::size_t threads_now() {
  static const bool started = [] {
    std::thread([] {}).join();
    return true;
  }();
  static_cast<void>(started);
  std::size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    static_cast<void>(entry);
    ++count;
  }
  return count;
}

// A joined thread's entry may outlive the join by a moment, also in the number that was taken before.
inline void expect_no_more_threads(std::size_t than) {
  for (int i = 0; i < 5000 && threads_now() > than; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_LE(threads_now(), than);
}

// Holds back who passes it until it is opened.
class Gate {
 public:
  void open() {
    {
      const std::lock_guard lock(mutex_);
      open_ = true;
    }
    changed_.notify_all();
  }
  void pass() {
    std::unique_lock lock(mutex_);
    ++arrived_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
  }
  void wait_for_arrival(int count = 1) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return arrived_ >= count; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  int arrived_ = 0;
};

// The host backend with a hook that runs before each call which the scheduler makes on its streams and events. The
// hook is given the function's name and returns nonzero to make the call fail. A table has no place for a context,
// so there is one hook; it is set while nothing runs.
class HookedDevice {
 public:
  using Hook = std::function<int(const char* function)>;

  explicit HookedDevice(Hook hook) {
    current() = std::move(hook);
    static const DeviceOps table = make_table();
    device_ = std::make_shared<Device>(table, 0);
  }
  ~HookedDevice() {
    EXPECT_EQ(device_.use_count(), 1) << "the device outlives its hook";
    device_.reset();
    current() = nullptr;
  }
  HookedDevice(const HookedDevice&) = delete;
  HookedDevice& operator=(const HookedDevice&) = delete;

  const std::shared_ptr<Device>& device() const { return device_; }

 private:
  static Hook& current() {
    static Hook hook;
    return hook;
  }
  static bool& injected() {
    static thread_local bool value = false;
    return value;
  }
  static int before(const char* function) {
    const int code = current() ? current()(function) : 0;
    injected() = code != 0;
    return code;
  }
  static DeviceOps make_table() {
    DeviceOps t = host_ops();
    t.last_error = [] { return injected() ? "injected fault" : host_ops().last_error(); };
    t.stream_create = [](void* c, StreamHandle* s) {
      const int code = before("stream_create");
      return code != 0 ? code : host_ops().stream_create(c, s);
    };
    t.stream_wait_event = [](void* c, StreamHandle s, EventHandle e) {
      const int code = before("stream_wait_event");
      return code != 0 ? code : host_ops().stream_wait_event(c, s, e);
    };
    t.event_create = [](void* c, int timing, EventHandle* e) {
      const int code = before("event_create");
      return code != 0 ? code : host_ops().event_create(c, timing, e);
    };
    t.event_record = [](void* c, EventHandle e, StreamHandle s) {
      const int code = before("event_record");
      return code != 0 ? code : host_ops().event_record(c, e, s);
    };
    t.event_query = [](void* c, EventHandle e, int* done) {
      const int code = before("event_query");
      return code != 0 ? code : host_ops().event_query(c, e, done);
    };
    t.event_synchronize = [](void* c, EventHandle e) {
      const int code = before("event_synchronize");
      return code != 0 ? code : host_ops().event_synchronize(c, e);
    };
    t.copy_to_device = [](void* c, void* to, const void* from, std::size_t bytes, StreamHandle s) {
      const int code = before("copy_to_device");
      return code != 0 ? code : host_ops().copy_to_device(c, to, from, bytes, s);
    };
    t.copy_to_host = [](void* c, void* to, const void* from, std::size_t bytes, StreamHandle s) {
      const int code = before("copy_to_host");
      return code != 0 ? code : host_ops().copy_to_host(c, to, from, bytes, s);
    };
    return t;
  }

  std::shared_ptr<Device> device_;
};

// Applies plane -= gradient, byte by byte, and checks that each chunk's calls come in order. `before` runs first in
// each call.
class SubtractSink final : public GradientSink {
 public:
  using Before = std::function<void(const char* call, std::uint32_t chunk)>;

  void set_planes(const std::vector<std::unique_ptr<HostBuffer>>& planes) {
    for (const auto& plane : planes) planes_.push_back(plane.get());
  }
  void set_before(Before before) { before_ = std::move(before); }  // while the update lane is idle

  void begin(std::uint32_t chunk) override {
    if (before_) before_("begin", chunk);
    EXPECT_EQ(offsets_.count(chunk), 0u) << "a submission of a chunk began inside another";
    offsets_[chunk] = 0;
  }
  void consume(std::uint32_t chunk, std::size_t offset, const void* piece, std::size_t bytes) override {
    if (before_) before_("consume", chunk);
    ASSERT_EQ(offsets_.count(chunk), 1u);
    EXPECT_EQ(offsets_[chunk], offset);
    EXPECT_GT(bytes, 0u);
    ASSERT_LE(offset + bytes, planes_.at(chunk)->size());
    auto* weight = static_cast<unsigned char*>(planes_[chunk]->data()) + offset;
    const auto* gradient = static_cast<const unsigned char*>(piece);
    for (std::size_t i = 0; i < bytes; ++i) weight[i] = static_cast<unsigned char>(weight[i] - gradient[i]);
    offsets_[chunk] += bytes;
    ++pieces;
  }
  void end(std::uint32_t chunk) override {
    if (before_) before_("end", chunk);
    ASSERT_EQ(offsets_.count(chunk), 1u);
    EXPECT_EQ(offsets_[chunk], planes_.at(chunk)->size());
    offsets_.erase(chunk);
    ++submissions;
  }

  std::atomic<std::uint64_t> pieces{0}, submissions{0};

 private:
  std::vector<const HostBuffer*> planes_;
  Before before_;
  std::map<std::uint32_t, std::size_t> offsets_;  // of submissions that have begun
};

struct ChunkShape {
  std::size_t bytes;
  std::uint32_t window = 0;
};

inline std::vector<ChunkShape> equal_chunks(std::size_t count, std::size_t bytes) {
  return std::vector<ChunkShape>(count, ChunkShape{bytes, 0});
}

inline const SchedulerOptions kSmallPieces{.piece_bytes = 4096, .ring_pieces = 3, .trace_spans = 4096};

// F0 .. F(n-1), B(n-1) .. B0, each backward followed by its chunk's update.
inline std::vector<Visit> training_schedule(std::size_t chunks, bool updates = true) {
  std::vector<Visit> visits;
  for (std::size_t i = 0; i < chunks; ++i) visits.push_back({static_cast<std::uint32_t>(i), Phase::forward});
  for (std::size_t i = chunks; i-- > 0;) {
    visits.push_back({static_cast<std::uint32_t>(i), Phase::backward, true, updates});
  }
  return visits;
}

inline std::vector<Visit> forward_schedule(std::size_t chunks) {
  std::vector<Visit> visits;
  for (std::size_t i = 0; i < chunks; ++i) visits.push_back({static_cast<std::uint32_t>(i), Phase::forward});
  return visits;
}

// Planes with random bytes, slots, a sink and a scheduler; `expected` is what each plane holds after all gradients
// submitted so far, computed in the order of the calls. Gradients are made in a few device buffers, which are filled
// with other bytes as soon as their tickets are done.
class Rig {
 public:
  Rig(std::shared_ptr<Device> device_, const std::vector<ChunkShape>& chunks, const std::vector<std::size_t>& windows,
      unsigned seed, SchedulerOptions options = kSmallPieces)
      : device(std::move(device_)), sink(std::make_shared<SubtractSink>()), random_(seed) {
    std::vector<WindowSpec> window_specs(windows.size());
    std::vector<ChunkSpec> chunk_specs;
    std::size_t largest = 1;
    for (std::size_t c = 0; c < chunks.size(); ++c) {
      const auto& [bytes, window] = chunks[c];
      planes.push_back(std::make_unique<HostBuffer>(device, bytes, true));
      randomize(planes.back()->data(), bytes, random_);
      const auto* plane = static_cast<const unsigned char*>(planes.back()->data());
      expected.emplace_back(plane, plane + bytes);
      chunk_specs.push_back({name(c), plane, bytes, window});
      window_specs[window].slot_bytes = std::max(window_specs[window].slot_bytes, bytes);
      largest = std::max(largest, bytes);
    }
    for (std::size_t w = 0; w < windows.size(); ++w) {
      window_specs[w].slot_bytes = std::max<std::size_t>(window_specs[w].slot_bytes, 1);
      for (std::size_t s = 0; s < windows[w]; ++s) {
        window_specs[w].slots.push_back(device->alloc(window_specs[w].slot_bytes));
      }
    }
    for (GradientBuffer& buffer : gradients_) {
      buffer.device = device->alloc(largest);
      buffer.source = std::make_unique<HostBuffer>(device, largest, true);
    }
    sink->set_planes(planes);
    scheduler = std::make_unique<Scheduler>(device, std::move(chunk_specs), std::move(window_specs), sink, options);
  }

  static std::string name(std::size_t chunk) { return "chunk " + std::to_string(chunk); }

  // What a visit's work does here: copies the slot. On stream 0 it is compared at once, else by check_visits().
  void* acquire(std::uint32_t chunk, Phase phase, StreamHandle stream = 0) {
    void* slot = scheduler->acquire(chunk, phase, stream);
    read(slot, chunk, stream);
    return slot;
  }
  void read(const void* slot, std::uint32_t chunk, StreamHandle stream) {
    auto read = std::make_unique<Read>();
    read->chunk = chunk;
    read->visit = ++visits_;
    read->stream = stream;
    read->expected = expected[chunk];
    read->seen = std::make_unique<HostBuffer>(device, read->expected.size(), true);
    device->to_host(read->seen->data(), slot, read->expected.size(), stream);
    reads_.push_back(std::move(read));
    if (stream == 0 && device->is_host()) check(*reads_.back());
  }
  void visit(std::uint32_t chunk, Phase phase, StreamHandle stream = 0) {
    acquire(chunk, phase, stream);
    scheduler->release(chunk, phase, stream);
  }
  void check_visits() {
    for (const auto& read : reads_) {
      device->synchronize(read->stream);
      check(*read);
    }
    reads_.clear();
  }

  Ticket submit(std::uint32_t chunk, StreamHandle stream = 0) {
    GradientBuffer& buffer = gradients_[next_gradient_++ % gradients_.size()];
    const std::size_t bytes = expected[chunk].size();
    scheduler->synchronize_ticket(buffer.ticket);
    EXPECT_TRUE(scheduler->done(buffer.ticket));
    device->synchronize(stream);  // the source may still be read by this buffer's last fill
    randomize(buffer.source->data(), bytes, random_);
    const auto* gradient = static_cast<const unsigned char*>(buffer.source->data());
    device->to_device(buffer.device, gradient, bytes, stream);
    for (std::size_t i = 0; i < bytes; ++i)
      expected[chunk][i] = static_cast<unsigned char>(expected[chunk][i] - gradient[i]);
    buffer.ticket = scheduler->submit_gradient(chunk, buffer.device, bytes, stream);
    return buffer.ticket;
  }

  void step(StreamHandle stream = 0) {
    const auto chunks = static_cast<std::uint32_t>(planes.size());
    for (std::uint32_t c = 0; c < chunks; ++c) visit(c, Phase::forward, stream);
    for (std::uint32_t c = chunks; c-- > 0;) {
      visit(c, Phase::backward, stream);
      if (!expected[c].empty()) submit(c, stream);
    }
  }

  void check_planes() {
    scheduler->synchronize();
    for (std::size_t c = 0; c < planes.size(); ++c) {
      if (expected[c].empty()) continue;
      EXPECT_EQ(std::memcmp(planes[c]->data(), expected[c].data(), expected[c].size()), 0) << "plane of " << name(c);
    }
  }

  // Uploads once everything that is queued has run.
  std::uint64_t uploads() {
    scheduler->synchronize();
    return scheduler->counters().uploads;
  }

  std::shared_ptr<Device> device;
  std::vector<std::unique_ptr<HostBuffer>> planes;
  std::vector<Bytes> expected;
  std::shared_ptr<SubtractSink> sink;

 private:
  struct Read {
    std::uint32_t chunk;
    std::uint64_t visit;
    StreamHandle stream;
    Bytes expected;
    std::unique_ptr<HostBuffer> seen;
  };
  struct GradientBuffer {
    void* device = nullptr;
    std::unique_ptr<HostBuffer> source;
    Ticket ticket = 0;
  };

  static void check(const Read& read) {
    if (read.expected.empty()) return;
    EXPECT_EQ(std::memcmp(read.seen->data(), read.expected.data(), read.expected.size()), 0)
        << "visit " << read.visit << " found wrong weights of " << name(read.chunk);
  }

  Random random_;
  std::vector<std::unique_ptr<Read>> reads_;
  std::uint64_t visits_ = 0;
  std::vector<GradientBuffer> gradients_ = std::vector<GradientBuffer>(3);
  std::size_t next_gradient_ = 0;

 public:
  std::unique_ptr<Scheduler> scheduler;  // ends before what its lanes use
};

inline std::shared_ptr<Device> host_device() {
  return std::make_shared<Device>("host", 0);
}

}  // namespace slidecore::testing_support
