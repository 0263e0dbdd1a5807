#pragma once
// What the disk tier's tests share: a directory that goes with the test, a table of system calls that can be made to
// fail, and names of the backends that this machine allows.

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "io/system_calls.h"
#include "scheduler_support.h"
#include "slidecore/io.h"

namespace slidecore::testing_support {

class Directories {
 public:
  explicit Directories(std::size_t count = 1) {
    std::string pattern = (std::filesystem::current_path() / "io-test-XXXXXX").string();
    EXPECT_NE(mkdtemp(pattern.data()), nullptr) << std::strerror(errno);
    root_ = pattern;
    for (std::size_t i = 0; i < count; ++i) {
      names.push_back((root_ / std::to_string(i)).string());
      std::filesystem::create_directory(names.back());
    }
  }
  ~Directories() { std::filesystem::remove_all(root_); }
  Directories(const Directories&) = delete;
  Directories& operator=(const Directories&) = delete;

  // Paths of the files in all directories.
  std::vector<std::string> files() const {
    std::vector<std::string> found;
    for (const std::string& name : names) {
      for (const auto& entry : std::filesystem::directory_iterator(name)) found.push_back(entry.path().string());
    }
    return found;
  }

  std::vector<std::string> names;

 private:
  std::filesystem::path root_;
};

// Runs a hook before each call (and after each result of io_uring). The hook gets the call's name and the result that
// it may put in the call's place: where it changes that from kPass, the call is not made. What a hook refers to must
// outlive the calls that may still be in it.
class HookedCalls final : public io::SystemCalls {
 public:
  static constexpr long kPass = 1L << 60;
  struct Call {
    const char* name;
    std::uint64_t offset = 0;
    std::size_t bytes = 0;
    bool write = false;
  };
  using Hook = std::function<long(const Call&)>;

  void set(Hook hook) {
    auto next = std::make_shared<const Hook>(std::move(hook));
    const std::lock_guard lock(mutex_);
    hook_ = std::move(next);
  }

  int open(const char* path, int flags, unsigned mode) override {
    return made({"open"}, [&] { return SystemCalls::open(path, flags, mode); });
  }
  int close(int fd) override {
    return made({"close"}, [&] { return SystemCalls::close(fd); });
  }
  int unlink(const char* path) override {
    return made({"unlink"}, [&] { return SystemCalls::unlink(path); });
  }
  int lock(int fd) override {
    return made({"lock"}, [&] { return SystemCalls::lock(fd); });
  }
  int status(int fd, io::FileStatus* status) override {
    return made({"status"}, [&] { return SystemCalls::status(fd, status); });
  }
  std::int64_t size(int fd) override {
    const long answer = ask({"size"});
    return answer == kPass ? SystemCalls::size(fd) : answer;
  }
  int preallocate(int fd, std::uint64_t offset, std::uint64_t bytes) override {
    return made({"preallocate", offset, bytes}, [&] { return SystemCalls::preallocate(fd, offset, bytes); });
  }
  int truncate(int fd, std::uint64_t bytes) override {
    return made({"truncate", bytes}, [&] { return SystemCalls::truncate(fd, bytes); });
  }
  // A positive answer is what is said to have been moved, where it was more.
  long pread(int fd, void* memory, std::size_t bytes, std::uint64_t offset) override {
    const long answer = ask({"pread", offset, bytes, false});
    return answer <= 0 ? answer : std::min(answer, SystemCalls::pread(fd, memory, bytes, offset));
  }
  long pwrite(int fd, const void* memory, std::size_t bytes, std::uint64_t offset) override {
    const long answer = ask({"pwrite", offset, bytes, true});
    return answer <= 0 ? answer : std::min(answer, SystemCalls::pwrite(fd, memory, bytes, offset));
  }
  int kernel_version() override {
    return made({"kernel_version"}, [&] { return SystemCalls::kernel_version(); });
  }
  int uring_setup(unsigned entries, io::abi::Params* params) override {
    return made({"uring_setup", params->flags}, [&] { return SystemCalls::uring_setup(entries, params); });
  }
  int uring_enter(int ring, unsigned submit, unsigned complete, unsigned flags) override {
    return made({"uring_enter"}, [&] { return SystemCalls::uring_enter(ring, submit, complete, flags); });
  }
  int uring_register(int ring, unsigned opcode, void* argument, unsigned count) override {
    return made({"uring_register", opcode}, [&] { return SystemCalls::uring_register(ring, opcode, argument, count); });
  }
  int uring_map(int ring, std::size_t bytes, std::uint64_t offset, void** address) override {
    return made({"uring_map"}, [&] { return SystemCalls::uring_map(ring, bytes, offset, address); });
  }
  long uring_result(bool write, std::uint64_t offset, std::size_t bytes, long result) override {
    const long answer = ask({write ? "pwrite" : "pread", offset, bytes, write});
    if (answer == kPass || result < 0) return result;
    return answer <= 0 ? answer : std::min(result, answer);
  }

 private:
  long ask(const Call& call) {
    std::shared_ptr<const Hook> hook;
    {
      const std::lock_guard lock(mutex_);
      hook = hook_;
    }
    return hook != nullptr && *hook ? (*hook)(call) : kPass;
  }
  template <class Make>
  int made(const Call& call, const Make& make) {
    const long answer = ask(call);
    return answer == kPass ? make() : static_cast<int>(answer);
  }

  std::mutex mutex_;
  std::shared_ptr<const Hook> hook_;
};

inline bool is(const HookedCalls::Call& call, const char* name) {
  return std::strcmp(call.name, name) == 0;
}

// Page-aligned memory.
class Memory {
 public:
  explicit Memory(std::size_t bytes, unsigned char fill = 0)
      : bytes_(bytes), data_(static_cast<unsigned char*>(std::aligned_alloc(4096, (bytes + 8191) / 4096 * 4096))) {
    std::memset(data_, fill, bytes);
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  unsigned char* data() { return data_; }
  std::size_t size() const { return bytes_; }
  Bytes bytes() const { return Bytes(data_, data_ + bytes_); }

 private:
  std::size_t bytes_;
  unsigned char* data_;
};

// Tests that run with each backend.
class EachBackend : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (std::string(GetParam()) != "uring") return;
    const std::string reason = why_no_io_uring();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
  TransferOptions options() const {
    TransferOptions chosen;
    chosen.backend = GetParam();
    chosen.block_bytes = 16384;
    chosen.queue_depth = 4;
    return chosen;
  }
};

inline std::string backend_name(const ::testing::TestParamInfo<const char*>& info) {
  return info.param;
}

inline std::size_t open_files() {
  std::size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    static_cast<void>(entry);
    ++count;
  }
  return count;
}

}  // namespace slidecore::testing_support
