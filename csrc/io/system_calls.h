#pragma once
// The system calls of the disk tier behind one table, so that tests can make each of them fail. Every function returns
// what the call returns, or -errno.

#include <cstddef>
#include <cstdint>

#include "io/uring_abi.h"

namespace slidecore::io {

// The part of statx(2) and statfs(2) that is used.
struct FileStatus {
  std::uint64_t size, inode, free_bytes, total_bytes;
  std::uint32_t device_major, device_minor;
  bool directory, regular;
  bool has_direct_alignment;  // the kernel (6.1 or newer) and the file system say what direct I/O needs
  std::uint32_t direct_memory_alignment, direct_offset_alignment;  // 0: no direct I/O on this file
  std::uint64_t filesystem;                                        // its magic number
};

class SystemCalls {
 public:
  virtual ~SystemCalls() = default;
  virtual int open(const char* path, int flags, unsigned mode);
  virtual int close(int fd);
  virtual int unlink(const char* path);
  virtual int lock(int fd);  // flock, exclusive, not waiting
  virtual int status(int fd, FileStatus* status);
  virtual std::int64_t size(int fd);  // of the file; much less work than status()
  virtual int preallocate(int fd, std::uint64_t offset, std::uint64_t bytes);
  virtual int truncate(int fd, std::uint64_t bytes);
  virtual long pread(int fd, void* memory, std::size_t bytes, std::uint64_t offset);
  virtual long pwrite(int fd, const void* memory, std::size_t bytes, std::uint64_t offset);

  virtual int kernel_version();  // 6012 for 6.12
  virtual int uring_setup(unsigned entries, abi::Params* params);
  virtual int uring_enter(int ring, unsigned submit, unsigned complete, unsigned flags);
  virtual int uring_register(int ring, unsigned opcode, void* argument, unsigned count);
  virtual int uring_map(int ring, std::size_t bytes, std::uint64_t offset, void** address);
  // Sees the result of each read and write that io_uring completed, and may put another in its place.
  virtual long uring_result(bool write, std::uint64_t offset, std::size_t bytes, long result);
};

}  // namespace slidecore::io
