#pragma once
// The part of cuFile's interface (GPUDirect Storage, libcufile.so.0) that is used, by hand: X(role, exported name,
// signature). The plain cuFileDriverClose is the one of releases before uses were counted; cufile.h maps to this one.

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

#include "device/driver_library.h"

namespace slidecore::device::cufile {

// CUfileError_t: a CUfileOpError, and a CUresult where that is kCudaDriverError.
struct Error {
  std::int32_t code;
  std::int32_t cuda;
};
static_assert(sizeof(Error) == 8 && offsetof(Error, cuda) == 4, "two C enumerations, returned in one register");

// CUfileDescr_t.
struct Description {
  std::int32_t type;
  union {
    int fd;
    void* handle;
  } file;
  const void* operations;  // of file systems in user space; null
};
static_assert(sizeof(Description) == 24 && offsetof(Description, file) == 8 && offsetof(Description, operations) == 16,
              "as cuFile lays it out");

// CUfileDrvProps_t. Later releases may append to it: what they would write there has room behind it.
struct Properties {
  std::uint32_t nvfs_major, nvfs_minor;  // of the nvidia-fs kernel module; 0: it is not loaded
  std::size_t poll_threshold, max_direct_io;
  std::uint32_t status_flags, control_flags;
  std::uint32_t feature_flags;
  std::uint32_t max_device_cache, per_buffer_cache, max_pinned, max_batch, max_batch_timeout;
  std::uint8_t later[200];
};
static_assert(offsetof(Properties, status_flags) == 24 && offsetof(Properties, feature_flags) == 32 &&
                  offsetof(Properties, later) == 56,
              "as cuFile lays it out");

using Handle = void*;  // CUfileHandle_t

inline constexpr std::int32_t kOpaqueFd = 1;            // CU_FILE_HANDLE_TYPE_OPAQUE_FD
inline constexpr std::int32_t kFirstError = 5000;       // CUFILEOP_BASE_ERR
inline constexpr std::int32_t kCudaDriverError = 5011;  // CU_FILE_CUDA_DRIVER_ERROR
inline constexpr std::int32_t kAlreadyOpen = 5026;      // CU_FILE_DRIVER_ALREADY_OPEN

// clang-format off
#define SLIDECORE_CUFILE_SYMBOLS(X)                                                                    \
  X(driver_open,       cuFileDriverOpen,          Error())                                             \
  X(driver_close,      cuFileDriverClose_v2,      Error())                                             \
  X(properties,        cuFileDriverGetProperties, Error(Properties* properties))                       \
  X(handle_register,   cuFileHandleRegister,      Error(Handle* handle, Description* description))     \
  X(handle_deregister, cuFileHandleDeregister,    void(Handle handle))                                 \
  X(read,              cuFileRead,                                                                     \
    ssize_t(Handle handle, void* memory, std::size_t bytes, off_t file_offset, off_t memory_offset))   \
  X(write,             cuFileWrite,                                                                    \
    ssize_t(Handle handle, const void* memory, std::size_t bytes, off_t file_offset, off_t memory_offset))
// clang-format on

static_assert(sizeof(off_t) == 8 && sizeof(ssize_t) == 8, "64-bit file offsets are expected");

struct Symbols {
#define SLIDECORE_MEMBER(role, symbol, ...) DriverFunction<__VA_ARGS__> role{#symbol};
  SLIDECORE_CUFILE_SYMBOLS(SLIDECORE_MEMBER)
#undef SLIDECORE_MEMBER
  DriverFunction<Error(int* version)> version{"cuFileGetVersion"};  // null in releases that lack it
};

}  // namespace slidecore::device::cufile
