#pragma once
// The table over a driver library, for what CUDA and HIP have in common. `Api` supplies the rest:
//   Symbols, Pointer, Stream, Event, Current       types; Current is what is current on a thread
//   kName and the flags of streams, events and registrations
//   symbols()                                      the loaded library
//   error_name(code), error_string(code), clear_error()
//   get_current(Current*), set_current(Current), open(ordinal, Current*), describe(ordinal, DeviceInfo*)
//   to_api(void*), from_api(Pointer)

#include <cstddef>
#include <cstdint>

#include "device/allocations.h"
#include "device/driver_library.h"
#include "device/error_text.h"
#include "slidecore/device.h"

namespace slidecore::device {

template <typename Api>
int failed(const char* function, int code) {
  Api::clear_error();
  return fail(code, "%s: %s: %s", function, Api::error_name(code), Api::error_string(code));
}

// Calls a driver function; a failure's text names the function and the driver's reason.
template <typename Api, typename... Parameters>
int call(const DriverFunction<int(Parameters...)>& function, Parameters... arguments) {
  const int code = function.pointer(arguments...);
  return code == kSuccess ? kSuccess : failed<Api>(function.name, code);
}

template <typename Api>
class DriverOps {
 public:
  static constexpr DeviceOps table() {
    return {
        .version = kDeviceOpsVersion,
        .struct_size = sizeof(DeviceOps),
        .name = Api::kName,
        .flags = kDeviceNeedsPinning,
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
        .copy_to_device = copy_to_device,
        .copy_to_host = copy_to_host,
    };
  }

 private:
  using Pointer = typename Api::Pointer;
  using Stream = typename Api::Stream;
  using Event = typename Api::Event;
  static_assert(sizeof(Pointer) == sizeof(void*) && sizeof(Stream) == sizeof(StreamHandle) &&
                sizeof(Event) == sizeof(EventHandle));

  struct Context {
    int ordinal;
    typename Api::Current current;
    Allocations allocations;
  };

  static Context& context(void* ctx) { return *static_cast<Context*>(ctx); }
  static Stream stream_of(StreamHandle handle) { return reinterpret_cast<Stream>(handle); }
  static Event event_of(EventHandle handle) { return reinterpret_cast<Event>(handle); }

  // Runs `body` with the device current on this thread, and restores what was. The question is answered from the
  // driver's own thread-local state, so it is cheap; a copy of that state kept here would go stale whenever the
  // framework changes it.
  template <typename Body>
  static int on_device(void* ctx, Body&& body) noexcept {
    typename Api::Current before{};
    if (const int code = Api::get_current(&before); code != kSuccess) return code;
    const auto& current = context(ctx).current;
    if (before == current) return guarded(body);
    if (const int code = Api::set_current(current); code != kSuccess) return code;
    const int result = guarded(body);
    const int restored = Api::set_current(before);
    return result != kSuccess ? result : restored;
  }

  // At exit the driver may be gone before the last owner: what it held is gone too, so there is nothing to give back.
  static int released(int code) {
    constexpr int kDeinitialized = 4;  // CUDA_ERROR_DEINITIALIZED, hipErrorDeinitialized
    return code == kDeinitialized ? kSuccess : code;
  }

  static int device_count(int* count) {
    *count = 0;
    const int code = call<Api>(Api::symbols().init, 0u);
    if (code == kNoDevice) return kSuccess;
    if (code != kSuccess) return code;
    const int counted = call<Api>(Api::symbols().device_count, count);
    return counted == kNoDevice ? kSuccess : counted;
  }

  static int open(int ordinal, void** ctx) {
    return guarded([&] {
      if (const int code = call<Api>(Api::symbols().init, 0u); code != kSuccess) return code;
      typename Api::Current current{};
      if (const int code = Api::open(ordinal, &current); code != kSuccess) return code;
      *ctx = new Context{ordinal, current, {}};
      return kSuccess;
    });
  }

  static int close(void* ctx) {
    int result = kSuccess;
    const int code = on_device(ctx, [&] {
      for (void* pointer : context(ctx).allocations.remove_all()) {
        const int freed = call<Api>(Api::symbols().memory_free, Api::to_api(pointer));
        if (result == kSuccess) result = freed;
      }
      return result;
    });
    delete &context(ctx);
    return released(code);
  }

  static int describe(void* ctx, DeviceInfo* info) {
    return guarded([&] {
      *info = DeviceInfo{};
      return Api::describe(context(ctx).ordinal, info);
    });
  }

  static int bind_thread(void* ctx) {
    typename Api::Current before{};
    if (const int code = Api::get_current(&before); code != kSuccess) return code;
    return before == context(ctx).current ? kSuccess : Api::set_current(context(ctx).current);
  }

  static int alloc(void* ctx, std::size_t bytes, void** pointer) {
    return on_device(ctx, [&] {
      if (bytes == 0) return fail(kInvalidValue, "0 bytes asked for");
      const auto& symbols = Api::symbols();
      Pointer address{};
      const int code = symbols.memory_alloc.pointer(&address, bytes);
      if (code != kSuccess) return no_memory(code, bytes);
      try {
        context(ctx).allocations.add(Api::from_api(address), bytes);
      } catch (...) {
        static_cast<void>(symbols.memory_free.pointer(address));
        throw;
      }
      *pointer = Api::from_api(address);
      return kSuccess;
    });
  }

  static int no_memory(int code, std::size_t bytes) {
    Api::clear_error();
    const auto& symbols = Api::symbols();
    std::size_t available = 0, total = 0;
    if (symbols.memory_info.pointer(&available, &total) != kSuccess) {
      Api::clear_error();
      available = total = 0;
    }
    return fail(code, "%s: %s: %s; %zu bytes asked for, %zu of %zu bytes free", symbols.memory_alloc.name,
                Api::error_name(code), Api::error_string(code), bytes, available, total);
  }

  static int free(void* ctx, void* pointer) {
    if (pointer == nullptr) return kSuccess;
    return released(on_device(ctx, [&] {
      if (!context(ctx).allocations.remove(pointer)) {
        return fail(kInvalidValue, "%p was not allocated by this device", pointer);
      }
      return call<Api>(Api::symbols().memory_free, Api::to_api(pointer));
    }));
  }

  static int memory_in_use(void* ctx, std::uint64_t* now, std::uint64_t* peak) {
    return guarded([&] {
      context(ctx).allocations.in_use(now, peak);
      return kSuccess;
    });
  }

  static int register_host(void* ctx, void* pointer, std::size_t bytes) {
    return on_device(
        ctx, [&] { return call<Api>(Api::symbols().host_register, pointer, bytes, Api::kHostRegisterPortable); });
  }

  static int unregister_host(void* ctx, void* pointer) {
    return released(on_device(ctx, [&] { return call<Api>(Api::symbols().host_unregister, pointer); }));
  }

  static int stream_create(void* ctx, StreamHandle* stream) {
    return on_device(ctx, [&] {
      Stream created{};
      const int code = call<Api>(Api::symbols().stream_create, &created, Api::kStreamNonBlocking);
      if (code == kSuccess) *stream = reinterpret_cast<StreamHandle>(created);
      return code;
    });
  }

  static int stream_destroy(void* ctx, StreamHandle stream) {
    if (stream == 0) return fail(kInvalidHandle, "stream 0 is not ours to destroy");
    return released(on_device(ctx, [&] { return call<Api>(Api::symbols().stream_destroy, stream_of(stream)); }));
  }

  static int stream_synchronize(void* ctx, StreamHandle stream) {
    return on_device(ctx, [&] { return call<Api>(Api::symbols().stream_synchronize, stream_of(stream)); });
  }

  static int stream_wait_event(void* ctx, StreamHandle stream, EventHandle event) {
    return on_device(
        ctx, [&] { return call<Api>(Api::symbols().stream_wait_event, stream_of(stream), event_of(event), 0u); });
  }

  static int event_create(void* ctx, int timing, EventHandle* event) {
    return on_device(ctx, [&] {
      Event created{};
      const unsigned flags = Api::kEventBlockingSync | (timing != 0 ? 0u : Api::kEventDisableTiming);
      const int code = call<Api>(Api::symbols().event_create, &created, flags);
      if (code == kSuccess) *event = reinterpret_cast<EventHandle>(created);
      return code;
    });
  }

  static int event_destroy(void* ctx, EventHandle event) {
    return released(on_device(ctx, [&] { return call<Api>(Api::symbols().event_destroy, event_of(event)); }));
  }

  static int event_record(void* ctx, EventHandle event, StreamHandle stream) {
    return on_device(ctx, [&] { return call<Api>(Api::symbols().event_record, event_of(event), stream_of(stream)); });
  }

  static int event_query(void* ctx, EventHandle event, int* done) {
    return on_device(ctx, [&] {
      const auto& query = Api::symbols().event_query;
      const int code = query.pointer(event_of(event));
      if (code == kNotReady) {
        Api::clear_error();
      } else if (code != kSuccess) {
        return failed<Api>(query.name, code);
      }
      *done = code == kSuccess ? 1 : 0;
      return kSuccess;
    });
  }

  static int event_synchronize(void* ctx, EventHandle event) {
    return on_device(ctx, [&] { return call<Api>(Api::symbols().event_synchronize, event_of(event)); });
  }

  static int event_elapsed_ms(void* ctx, EventHandle start, EventHandle end, double* ms) {
    return on_device(ctx, [&] {
      float elapsed = 0;
      const int code = call<Api>(Api::symbols().event_elapsed, &elapsed, event_of(start), event_of(end));
      if (code == kSuccess) *ms = elapsed;
      return code;
    });
  }

  static int copy_to_device(void* ctx, void* device, const void* host, std::size_t bytes, StreamHandle stream) {
    if (bytes == 0) return kSuccess;
    return on_device(ctx, [&] {
      return call<Api>(Api::symbols().copy_to_device, Api::to_api(device), host, bytes, stream_of(stream));
    });
  }

  static int copy_to_host(void* ctx, void* host, const void* device, std::size_t bytes, StreamHandle stream) {
    if (bytes == 0) return kSuccess;
    return on_device(ctx, [&] {
      return call<Api>(Api::symbols().copy_to_host, host, Api::to_api(const_cast<void*>(device)), bytes,
                       stream_of(stream));
    });
  }
};

}  // namespace slidecore::device
