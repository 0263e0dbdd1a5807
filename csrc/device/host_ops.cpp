// The host backend: device memory is host memory, a stream is a thread, stream 0 is the caller.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "device/allocations.h"
#include "device/error_text.h"
#include "device/host_event.h"
#include "device/host_stream.h"
#include "slidecore/device.h"

namespace slidecore {
namespace device {
namespace {

constexpr std::size_t kAlignment = 256;  // what CUDA and HIP guarantee

// Live streams (or events) by handle. A stale or foreign handle is an error instead of undefined behaviour, and
// lookups share ownership, so destroying an object while another thread uses it is safe.
template <typename Object>
class Registry {
 public:
  std::uintptr_t add(std::shared_ptr<Object> object) {
    const auto handle = reinterpret_cast<std::uintptr_t>(object.get());
    std::lock_guard lock(mutex_);
    objects_.emplace(handle, std::move(object));
    return handle;
  }
  std::shared_ptr<Object> find(std::uintptr_t handle) {
    std::lock_guard lock(mutex_);
    const auto found = objects_.find(handle);
    return found == objects_.end() ? nullptr : found->second;
  }
  std::shared_ptr<Object> remove(std::uintptr_t handle) {
    std::lock_guard lock(mutex_);
    const auto found = objects_.find(handle);
    if (found == objects_.end()) return nullptr;
    auto object = std::move(found->second);
    objects_.erase(found);
    return object;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::uintptr_t, std::shared_ptr<Object>> objects_;
};

struct HostContext {
  // Order matters: streams are drained (destroyed) before the memory they copy is freed.
  ~HostContext() {
    streams.reset();
    for (void* pointer : allocations.remove_all()) std::free(pointer);
  }
  Allocations allocations;
  Registry<HostEvent> events;
  std::unique_ptr<Registry<HostStream>> streams = std::make_unique<Registry<HostStream>>();
};

HostContext& context(void* ctx) {
  return *static_cast<HostContext*>(ctx);
}

int no_stream() {
  return fail(kInvalidHandle, "not a live stream of this device");
}
int no_event() {
  return fail(kInvalidHandle, "not a live event of this device");
}

int device_count(int* count) {
  *count = 1;
  return kSuccess;
}

int open(int ordinal, void** ctx) {
  return guarded([&] {
    if (ordinal != 0) return fail(kInvalidDevice, "there is one host device, number 0");
    *ctx = new HostContext;
    return kSuccess;
  });
}

int close(void* ctx) {
  return guarded([&] {
    delete static_cast<HostContext*>(ctx);
    return kSuccess;
  });
}

int describe(void*, DeviceInfo* info) {
  *info = DeviceInfo{};
  std::snprintf(info->name, sizeof(info->name), "host");
  info->numa_node = -1;
  return kSuccess;
}

int bind_thread(void*) {
  return kSuccess;
}

int alloc(void* ctx, std::size_t bytes, void** pointer) {
  return guarded([&] {
    if (bytes == 0) return fail(kInvalidValue, "0 bytes asked for");
    if (bytes > SIZE_MAX - kAlignment) return fail(kOutOfMemory, "%zu bytes asked for", bytes);
    void* block = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (block == nullptr) return fail(kOutOfMemory, "out of host memory: %zu bytes asked for", bytes);
    try {
      context(ctx).allocations.add(block, bytes);
    } catch (...) {
      std::free(block);
      throw;
    }
    *pointer = block;
    return kSuccess;
  });
}

int free(void* ctx, void* pointer) {
  return guarded([&] {
    if (pointer == nullptr) return kSuccess;
    if (!context(ctx).allocations.remove(pointer)) {
      return fail(kInvalidValue, "%p was not allocated by this device", pointer);
    }
    std::free(pointer);
    return kSuccess;
  });
}

int memory_in_use(void* ctx, std::uint64_t* now, std::uint64_t* peak) {
  return guarded([&] {
    context(ctx).allocations.in_use(now, peak);
    return kSuccess;
  });
}

int register_host(void*, void*, std::size_t) {
  return kSuccess;
}
int unregister_host(void*, void*) {
  return kSuccess;
}

int stream_create(void* ctx, StreamHandle* stream) {
  return guarded([&] {
    *stream = context(ctx).streams->add(std::make_shared<HostStream>());
    return kSuccess;
  });
}

int stream_destroy(void* ctx, StreamHandle handle) {
  return guarded([&] {
    const auto stream = context(ctx).streams->remove(handle);
    if (stream == nullptr) return no_stream();
    stream->close();
    return kSuccess;
  });
}

int stream_synchronize(void* ctx, StreamHandle handle) {
  return guarded([&] {
    if (handle == 0) return kSuccess;
    const auto stream = context(ctx).streams->find(handle);
    if (stream == nullptr) return no_stream();
    stream->synchronize();
    return kSuccess;
  });
}

int enqueue(void* ctx, StreamHandle handle, HostTask task) {
  if (handle == 0) {
    task.run();
    return kSuccess;
  }
  const auto stream = context(ctx).streams->find(handle);
  if (stream == nullptr) return no_stream();
  stream->enqueue(std::move(task));
  return kSuccess;
}

int stream_wait_event(void* ctx, StreamHandle stream, EventHandle handle) {
  return guarded([&] {
    const auto event = context(ctx).events.find(handle);
    if (event == nullptr) return no_event();
    auto record = event->latest();
    if (record == nullptr) return kSuccess;
    return enqueue(ctx, stream, HostTask::make_wait(std::move(record)));
  });
}

int event_create(void* ctx, int timing, EventHandle* event) {
  return guarded([&] {
    *event = context(ctx).events.add(std::make_shared<HostEvent>(timing != 0));
    return kSuccess;
  });
}

int event_destroy(void* ctx, EventHandle handle) {
  return guarded([&] { return context(ctx).events.remove(handle) == nullptr ? no_event() : kSuccess; });
}

int event_record(void* ctx, EventHandle handle, StreamHandle stream_handle) {
  return guarded([&] {
    const auto event = context(ctx).events.find(handle);
    if (event == nullptr) return no_event();
    std::shared_ptr<HostStream> stream;
    if (stream_handle != 0) {
      stream = context(ctx).streams->find(stream_handle);
      if (stream == nullptr) return no_stream();
    }
    event->record(stream.get());
    return kSuccess;
  });
}

int event_query(void* ctx, EventHandle handle, int* done) {
  return guarded([&] {
    const auto event = context(ctx).events.find(handle);
    if (event == nullptr) return no_event();
    const auto record = event->latest();
    *done = record == nullptr || record->done() ? 1 : 0;
    return kSuccess;
  });
}

int event_synchronize(void* ctx, EventHandle handle) {
  return guarded([&] {
    const auto event = context(ctx).events.find(handle);
    if (event == nullptr) return no_event();
    if (const auto record = event->latest()) record->wait();
    return kSuccess;
  });
}

int event_elapsed_ms(void* ctx, EventHandle start, EventHandle end, double* ms) {
  return guarded([&] {
    const auto first = context(ctx).events.find(start);
    const auto second = context(ctx).events.find(end);
    if (first == nullptr || second == nullptr) return no_event();
    if (!first->timing() || !second->timing()) return fail(kInvalidHandle, "an event was created without timing");
    const auto from = first->latest();
    const auto to = second->latest();
    if (from == nullptr || to == nullptr) return fail(kInvalidHandle, "an event was never recorded");
    if (!from->done() || !to->done()) return fail(kNotReady, "an event is not done yet");
    *ms = std::chrono::duration<double, std::milli>(to->time() - from->time()).count();
    return kSuccess;
  });
}

int copy(void* ctx, void* to, const void* from, std::size_t bytes, StreamHandle stream) {
  return guarded([&] {
    if (bytes != 0 && (to == nullptr || from == nullptr)) return fail(kInvalidValue, "copy from or to address 0");
    return enqueue(ctx, stream, HostTask::make_copy(to, from, bytes));
  });
}

constexpr DeviceOps kHostOps = {
    .version = kDeviceOpsVersion,
    .struct_size = sizeof(DeviceOps),
    .name = "host",
    .flags = kDeviceIsHost,
    .reserved = 0,
    .last_error = [] { return last_error(); },
    .device_count = device_count,
    .open = open,
    .close = close,
    .describe = describe,
    .bind_thread = bind_thread,
    .alloc = alloc,
    .free = free,
    .memory_in_use = memory_in_use,
    .register_host = register_host,
    .unregister_host = unregister_host,
    .stream_create = stream_create,
    .stream_destroy = stream_destroy,
    .stream_synchronize = stream_synchronize,
    .stream_wait_event = stream_wait_event,
    .event_create = event_create,
    .event_destroy = event_destroy,
    .event_record = event_record,
    .event_query = event_query,
    .event_synchronize = event_synchronize,
    .event_elapsed_ms = event_elapsed_ms,
    .copy_to_device = copy,
    .copy_to_host = copy,
};

}  // namespace
}  // namespace device

const DeviceOps& host_ops() {
  return device::kHostOps;
}

}  // namespace slidecore
