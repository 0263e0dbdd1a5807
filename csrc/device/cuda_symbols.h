#pragma once
// The part of the CUDA driver's interface that is used, by hand: X(role, exported name, signature). The suffixed
// names are the ones that cuda.h maps the plain ones to; the plain exports have other signatures.

#include <cstddef>
#include <cstdint>

#include "device/driver_library.h"

namespace slidecore::device::cuda {

using Result = int;                  // CUresult
using Device = int;                  // CUdevice
using Pointer = unsigned long long;  // CUdeviceptr
using Context = struct ContextTag*;  // CUcontext
using Stream = struct StreamTag*;    // CUstream
using Event = struct EventTag*;      // CUevent

static_assert(sizeof(Result) == 4 && sizeof(Device) == 4, "the driver's enums and ordinals are 32 bits wide");
static_assert(sizeof(Pointer) == 8 && sizeof(void*) == 8 && sizeof(std::size_t) == 8, "a 64-bit driver is expected");

inline constexpr unsigned kStreamNonBlocking = 1;     // CU_STREAM_NON_BLOCKING
inline constexpr unsigned kEventBlockingSync = 1;     // CU_EVENT_BLOCKING_SYNC
inline constexpr unsigned kEventDisableTiming = 2;    // CU_EVENT_DISABLE_TIMING
inline constexpr unsigned kHostRegisterPortable = 1;  // CU_MEMHOSTREGISTER_PORTABLE
inline constexpr int kAttributeHostNumaId = 134;      // CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, CUDA 12.2

// clang-format off
#define SLIDECORE_CUDA_SYMBOLS(X)                                                                         \
  X(init,                cuInit,                    Result(unsigned flags))                               \
  X(error_name,          cuGetErrorName,            Result(Result error, const char** name))              \
  X(error_string,        cuGetErrorString,          Result(Result error, const char** text))              \
  X(device_count,        cuDeviceGetCount,          Result(int* count))                                   \
  X(device_get,          cuDeviceGet,               Result(Device* device, int ordinal))                  \
  X(device_name,         cuDeviceGetName,           Result(char* name, int length, Device device))        \
  X(device_total_memory, cuDeviceTotalMem_v2,       Result(std::size_t* bytes, Device device))            \
  X(device_attribute,    cuDeviceGetAttribute,      Result(int* value, int attribute, Device device))     \
  X(device_pci_id,       cuDeviceGetPCIBusId,       Result(char* id, int length, Device device))          \
  X(context_retain,      cuDevicePrimaryCtxRetain,  Result(Context* context, Device device))              \
  X(context_get,         cuCtxGetCurrent,           Result(Context* context))                             \
  X(context_set,         cuCtxSetCurrent,           Result(Context context))                              \
  X(memory_info,         cuMemGetInfo_v2,           Result(std::size_t* free, std::size_t* total))        \
  X(memory_alloc,        cuMemAlloc_v2,             Result(Pointer* pointer, std::size_t bytes))          \
  X(memory_free,         cuMemFree_v2,              Result(Pointer pointer))                              \
  X(host_register,       cuMemHostRegister_v2,      Result(void* host, std::size_t bytes, unsigned flags)) \
  X(host_unregister,     cuMemHostUnregister,       Result(void* host))                                   \
  X(stream_create,       cuStreamCreate,            Result(Stream* stream, unsigned flags))               \
  X(stream_destroy,      cuStreamDestroy_v2,        Result(Stream stream))                                \
  X(stream_synchronize,  cuStreamSynchronize,       Result(Stream stream))                                \
  X(stream_wait_event,   cuStreamWaitEvent,         Result(Stream stream, Event event, unsigned flags))   \
  X(event_create,        cuEventCreate,             Result(Event* event, unsigned flags))                 \
  X(event_destroy,       cuEventDestroy_v2,         Result(Event event))                                  \
  X(event_record,        cuEventRecord,             Result(Event event, Stream stream))                   \
  X(event_query,         cuEventQuery,              Result(Event event))                                  \
  X(event_synchronize,   cuEventSynchronize,        Result(Event event))                                  \
  X(event_elapsed,       cuEventElapsedTime,        Result(float* ms, Event start, Event end))            \
  X(copy_to_device,      cuMemcpyHtoDAsync_v2,                                                            \
    Result(Pointer device, const void* host, std::size_t bytes, Stream stream))                           \
  X(copy_to_host,        cuMemcpyDtoHAsync_v2,                                                            \
    Result(void* host, Pointer device, std::size_t bytes, Stream stream))
// clang-format on

struct Symbols {
#define SLIDECORE_MEMBER(role, symbol, ...) DriverFunction<__VA_ARGS__> role{#symbol};
  SLIDECORE_CUDA_SYMBOLS(SLIDECORE_MEMBER)
#undef SLIDECORE_MEMBER
};

}  // namespace slidecore::device::cuda
