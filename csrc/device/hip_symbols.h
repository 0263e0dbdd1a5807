#pragma once
// The part of HIP's interface that is used, by hand: X(role, exported name, signature).

#include <cstddef>
#include <cstdint>

#include "device/driver_library.h"

namespace slidecore::device::hip {

using Result = int;                // hipError_t
using Device = int;                // hipDevice_t
using Pointer = void*;             // hipDeviceptr_t
using Stream = struct StreamTag*;  // hipStream_t
using Event = struct EventTag*;    // hipEvent_t

static_assert(sizeof(Result) == 4 && sizeof(Device) == 4, "HIP's enums and ordinals are 32 bits wide");
static_assert(sizeof(Pointer) == 8 && sizeof(std::size_t) == 8, "a 64-bit driver is expected");

inline constexpr unsigned kStreamNonBlocking = 1;     // hipStreamNonBlocking
inline constexpr unsigned kEventBlockingSync = 1;     // hipEventBlockingSync
inline constexpr unsigned kEventDisableTiming = 2;    // hipEventDisableTiming
inline constexpr unsigned kHostRegisterPortable = 1;  // hipHostRegisterPortable

// clang-format off
#define SLIDECORE_HIP_SYMBOLS(X)                                                                          \
  X(init,                hipInit,                   Result(unsigned flags))                               \
  X(error_name,          hipGetErrorName,           const char*(Result error))                            \
  X(error_string,        hipGetErrorString,         const char*(Result error))                            \
  X(error_clear,         hipGetLastError,           Result())                                             \
  X(device_count,        hipGetDeviceCount,         Result(int* count))                                   \
  X(device_get,          hipDeviceGet,              Result(Device* device, int ordinal))                  \
  X(device_name,         hipDeviceGetName,          Result(char* name, int length, Device device))        \
  X(device_total_memory, hipDeviceTotalMem,         Result(std::size_t* bytes, Device device))            \
  X(device_pci_id,       hipDeviceGetPCIBusId,      Result(char* id, int length, int ordinal))            \
  X(current_get,         hipGetDevice,              Result(int* ordinal))                                 \
  X(current_set,         hipSetDevice,              Result(int ordinal))                                  \
  X(memory_info,         hipMemGetInfo,             Result(std::size_t* free, std::size_t* total))        \
  X(memory_alloc,        hipMalloc,                 Result(Pointer* pointer, std::size_t bytes))          \
  X(memory_free,         hipFree,                   Result(Pointer pointer))                              \
  X(host_register,       hipHostRegister,           Result(void* host, std::size_t bytes, unsigned flags)) \
  X(host_unregister,     hipHostUnregister,         Result(void* host))                                   \
  X(stream_create,       hipStreamCreateWithFlags,  Result(Stream* stream, unsigned flags))               \
  X(stream_destroy,      hipStreamDestroy,          Result(Stream stream))                                \
  X(stream_synchronize,  hipStreamSynchronize,      Result(Stream stream))                                \
  X(stream_wait_event,   hipStreamWaitEvent,        Result(Stream stream, Event event, unsigned flags))   \
  X(event_create,        hipEventCreateWithFlags,   Result(Event* event, unsigned flags))                 \
  X(event_destroy,       hipEventDestroy,           Result(Event event))                                  \
  X(event_record,        hipEventRecord,            Result(Event event, Stream stream))                   \
  X(event_query,         hipEventQuery,             Result(Event event))                                  \
  X(event_synchronize,   hipEventSynchronize,       Result(Event event))                                  \
  X(event_elapsed,       hipEventElapsedTime,       Result(float* ms, Event start, Event end))            \
  X(copy_to_device,      hipMemcpyHtoDAsync,                                                              \
    Result(Pointer device, const void* host, std::size_t bytes, Stream stream))                           \
  X(copy_to_host,        hipMemcpyDtoHAsync,                                                              \
    Result(void* host, Pointer device, std::size_t bytes, Stream stream))
// clang-format on

struct Symbols {
#define SLIDECORE_MEMBER(role, symbol, ...) DriverFunction<__VA_ARGS__> role{#symbol};
  SLIDECORE_HIP_SYMBOLS(SLIDECORE_MEMBER)
#undef SLIDECORE_MEMBER
};

}  // namespace slidecore::device::hip
