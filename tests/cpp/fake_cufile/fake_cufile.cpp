// A libcufile that moves bytes between files and host memory, strictly checked, for the tests of the host backend.

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "fake_cufile_control.h"

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr std::size_t kBlock = 4096;
constexpr int kNotInitialized = 5001, kInvalidValue = 5022, kNotRegistered = 5027, kRegistered = 5028;

struct Result {
  int code, cuda;
};

struct Description {
  int type;
  union {
    int fd;
    void* handle;
  } file;
  const void* operations;
};

struct Properties {
  struct {
    unsigned major, minor;
    std::size_t poll_threshold, max_direct_io;
    unsigned status, control;
  } nvfs;
  unsigned features, device_cache, buffer_cache, pinned, batch, timeout;
};

struct Failure {
  long result;
  int error, skip;
};

struct File {
  int fd;
};

struct State {
  std::mutex mutex;
  FakeCuFileState live{};
  std::map<std::string, Failure> failures;
  std::map<void*, std::unique_ptr<File>> files;
  unsigned nvfs_major = 0, status = 0, features = 0;
};

// Never destroyed: threads of the code under test may outlive static objects.
State& state() {
  static State& the_state = *new State;
  return the_state;
}

// Whether the call is one that was asked to fail. With the lock held.
bool fails(const char* function, Failure* failure) {
  const auto found = state().failures.find(function);
  if (found == state().failures.end() || found->second.skip-- > 0) return false;
  *failure = found->second;
  state().failures.erase(found);
  return true;
}

Result failed(const Failure& failure) {
  return {static_cast<int>(failure.result), failure.error};
}

ssize_t move(const char* function, bool write, void* handle, char* memory, std::size_t bytes, off_t offset) {
  State& s = state();
  int fd = -1;
  {
    const std::lock_guard lock(s.mutex);
    ++(write ? s.live.writes : s.live.reads);
    if (s.live.opens == 0) return -kNotInitialized;
    const auto file = s.files.find(handle);
    if (file == s.files.end()) return -kNotRegistered;
    // What comes here is whole blocks of a file.
    if (memory == nullptr || bytes == 0 || bytes % kBlock != 0 || offset < 0 || offset % kBlock != 0) {
      return -kInvalidValue;
    }
    fd = file->second->fd;
    Failure failure{};
    if (fails(function, &failure)) {
      if (failure.result == -1) errno = failure.error;
      if (failure.result <= 0) return failure.result;
      bytes = std::min(bytes, static_cast<std::size_t>(failure.result));
    }
  }
  // The descriptor takes aligned memory and whole blocks only.
  const std::size_t padded = (bytes + kBlock - 1) / kBlock * kBlock;
  const std::unique_ptr<char, decltype(&std::free)> block(static_cast<char*>(std::aligned_alloc(kBlock, padded)),
                                                          &std::free);
  if (write) {
    std::memset(block.get() + bytes, 0, padded - bytes);
    std::memcpy(block.get(), memory, bytes);
    const ssize_t moved = pwrite(fd, block.get(), padded, offset);
    return moved < 0 ? -1 : std::min(moved, static_cast<ssize_t>(bytes));
  }
  const ssize_t moved = pread(fd, block.get(), padded, offset);
  if (moved < 0) return -1;
  std::memcpy(memory, block.get(), std::min(static_cast<std::size_t>(moved), bytes));
  return std::min(moved, static_cast<ssize_t>(bytes));
}

}  // namespace

FAKE_EXPORT Result cuFileDriverOpen() {
  const std::lock_guard lock(state().mutex);
  Failure failure{};
  if (fails(__func__, &failure)) return failed(failure);
  ++state().live.opens;
  return {0, 0};
}
FAKE_EXPORT Result cuFileDriverClose_v2() {
  const std::lock_guard lock(state().mutex);
  if (state().live.opens == 0) return {kNotInitialized, 0};
  --state().live.opens;
  return {0, 0};
}
#ifndef FAKE_INCOMPLETE
FAKE_EXPORT Result cuFileDriverGetProperties(Properties* properties) {
  const std::lock_guard lock(state().mutex);
  *properties = {};
  properties->nvfs.major = state().nvfs_major;
  properties->nvfs.minor = state().nvfs_major > 0 ? 17 : 0;
  properties->nvfs.status = state().status;
  properties->features = state().features;
  return {0, 0};
}
FAKE_EXPORT Result cuFileGetVersion(int* version) {
  *version = 1140;
  return {0, 0};
}
#endif
FAKE_EXPORT Result cuFileHandleRegister(void** handle, Description* description) {
  const std::lock_guard lock(state().mutex);
  Failure failure{};
  if (fails(__func__, &failure)) return failed(failure);
  if (state().live.opens == 0) return {kNotInitialized, 0};
  if (description->type != 1 || description->operations != nullptr) return {kInvalidValue, 0};
  for (const auto& [other, file] : state().files) {
    if (file->fd == description->file.fd) return {kRegistered, 0};
  }
  auto file = std::make_unique<File>(File{description->file.fd});
  *handle = file.get();
  state().files[*handle] = std::move(file);
  ++state().live.handles;
  return {0, 0};
}
#ifndef FAKE_INCOMPLETE
FAKE_EXPORT void cuFileHandleDeregister(void* handle) {
  const std::lock_guard lock(state().mutex);
  if (state().files.erase(handle) == 1) --state().live.handles;
}
#endif
FAKE_EXPORT ssize_t cuFileRead(void* handle, void* memory, std::size_t bytes, off_t offset, off_t memory_offset) {
  return move(__func__, false, handle, static_cast<char*>(memory) + memory_offset, bytes, offset);
}
FAKE_EXPORT ssize_t cuFileWrite(void* handle, const void* memory, std::size_t bytes, off_t offset,
                                off_t memory_offset) {
  return move(__func__, true, handle, static_cast<char*>(const_cast<void*>(memory)) + memory_offset, bytes, offset);
}

FAKE_EXPORT void fake_cufile_fail(const char* function, long result, int error, int skip) {
  const std::lock_guard lock(state().mutex);
  state().failures[function] = {result, error, skip};
}
FAKE_EXPORT void fake_cufile_properties(unsigned nvfs_major, unsigned status, unsigned features) {
  const std::lock_guard lock(state().mutex);
  state().nvfs_major = nvfs_major;
  state().status = status;
  state().features = features;
}
FAKE_EXPORT FakeCuFileState fake_cufile_live() {
  const std::lock_guard lock(state().mutex);
  return state().live;
}
