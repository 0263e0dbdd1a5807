#include "io/system_calls.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

namespace slidecore::io {
namespace {

// The same numbers on every architecture that came after the calls were made uniform.
#ifdef SYS_io_uring_setup
constexpr long kSetup = SYS_io_uring_setup, kEnter = SYS_io_uring_enter, kRegister = SYS_io_uring_register;
#else
constexpr long kSetup = 425, kEnter = 426, kRegister = 427;
#endif

// struct statx, up to what is used: older headers lack the last two fields.
struct Statx {
  std::uint32_t mask, block_size;
  std::uint64_t attributes;
  std::uint32_t links, uid, gid;
  std::uint16_t mode, unused;
  std::uint64_t inode, size, blocks, attributes_mask;
  std::uint64_t times[4][2];
  std::uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
  std::uint64_t mount_id;
  std::uint32_t dio_memory_alignment, dio_offset_alignment;
  std::uint64_t spare[12];
};
static_assert(sizeof(Statx) == 256 && offsetof(Statx, mode) == 28 && offsetof(Statx, inode) == 32);
static_assert(offsetof(Statx, size) == 40 && offsetof(Statx, dev_major) == 136);
static_assert(offsetof(Statx, dio_memory_alignment) == 152);

constexpr unsigned kBasicStats = 0x7ff, kDirectAlignment = 0x2000;

template <class Result>
Result checked(Result result) {
  return result < 0 ? static_cast<Result>(-errno) : result;
}

}  // namespace

int SystemCalls::open(const char* path, int flags, unsigned mode) {
  return checked(::open(path, flags, mode));
}
int SystemCalls::close(int fd) {
  return checked(::close(fd));
}
int SystemCalls::unlink(const char* path) {
  return checked(::unlink(path));
}
int SystemCalls::lock(int fd) {
  return checked(::flock(fd, LOCK_EX | LOCK_NB));
}

int SystemCalls::status(int fd, FileStatus* status) {
  Statx file{};
  if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kBasicStats | kDirectAlignment, &file) != 0) return -errno;
  struct statfs system{};
  if (::fstatfs(fd, &system) != 0) return -errno;
  const auto unit = static_cast<std::uint64_t>(system.f_frsize > 0 ? system.f_frsize : system.f_bsize);
  *status = FileStatus{};
  status->size = file.size;
  status->inode = file.inode;
  status->free_bytes = static_cast<std::uint64_t>(system.f_bavail) * unit;
  status->total_bytes = static_cast<std::uint64_t>(system.f_blocks) * unit;
  status->device_major = file.dev_major;
  status->device_minor = file.dev_minor;
  status->directory = S_ISDIR(file.mode);
  status->regular = S_ISREG(file.mode);
  status->has_direct_alignment = (file.mask & kDirectAlignment) != 0;
  status->direct_memory_alignment = file.dio_memory_alignment;
  status->direct_offset_alignment = file.dio_offset_alignment;
  status->filesystem = static_cast<std::uint32_t>(system.f_type);
  return 0;
}

std::int64_t SystemCalls::size(int fd) {
  struct stat file{};
  return ::fstat(fd, &file) != 0 ? -errno : static_cast<std::int64_t>(file.st_size);
}

int SystemCalls::preallocate(int fd, std::uint64_t offset, std::uint64_t bytes) {
  return checked(::fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(bytes)));
}
int SystemCalls::truncate(int fd, std::uint64_t bytes) {
  return checked(::ftruncate(fd, static_cast<off_t>(bytes)));
}
long SystemCalls::pread(int fd, void* memory, std::size_t bytes, std::uint64_t offset) {
  return checked(static_cast<long>(::pread(fd, memory, bytes, static_cast<off_t>(offset))));
}
long SystemCalls::pwrite(int fd, const void* memory, std::size_t bytes, std::uint64_t offset) {
  return checked(static_cast<long>(::pwrite(fd, memory, bytes, static_cast<off_t>(offset))));
}

int SystemCalls::kernel_version() {
  utsname name{};
  if (::uname(&name) != 0) return -errno;
  int major = 0, minor = 0;
  return std::sscanf(name.release, "%d.%d", &major, &minor) == 2 ? 1000 * major + minor : -EINVAL;
}

int SystemCalls::uring_setup(unsigned entries, abi::Params* params) {
  return static_cast<int>(checked(syscall(kSetup, entries, params)));
}
int SystemCalls::uring_enter(int ring, unsigned submit, unsigned complete, unsigned flags) {
  return static_cast<int>(checked(syscall(kEnter, ring, submit, complete, flags, nullptr, 0)));
}
int SystemCalls::uring_register(int ring, unsigned opcode, void* argument, unsigned count) {
  return static_cast<int>(checked(syscall(kRegister, ring, opcode, argument, count)));
}
int SystemCalls::uring_map(int ring, std::size_t bytes, std::uint64_t offset, void** address) {
  *address =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, static_cast<off_t>(offset));
  return *address == MAP_FAILED ? -errno : 0;
}
long SystemCalls::uring_result(bool, std::uint64_t, std::size_t, long result) {
  return result;
}

}  // namespace slidecore::io
