#include "io/directory.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <utility>

#include "io/errors.h"
#include "slidecore/status.h"

namespace slidecore::io {
namespace {

struct Filesystem {
  std::uint64_t magic;
  const char* name;
  bool in_memory;
};
// From linux/magic.h.
constexpr Filesystem kFilesystems[] = {
    {0xef53, "ext4", false},        {0x58465342, "xfs", false},     {0x9123683e, "btrfs", false},
    {0xf2f52010, "f2fs", false},    {0x01021994, "tmpfs", true},    {0x858458f6, "ramfs", true},
    {0x6969, "nfs", false},         {0x794c7630, "overlay", false}, {0x2fc12fc1, "zfs", false},
    {0x65735546, "fuse", false},    {0x01021997, "9p", false},      {0xff534d42, "cifs", false},
    {0xca451a4e, "bcachefs", false}};

std::string command_of(const std::string& pid) {
  std::ifstream file("/proc/" + pid + "/cmdline");
  std::string command((std::istreambuf_iterator<char>(file)), {});
  for (char& c : command) {
    if (c == '\0') c = ' ';
  }
  while (!command.empty() && command.back() == ' ') command.pop_back();
  return command.substr(0, 120);
}

constexpr int kNewFile = O_RDWR | O_CREAT | O_CLOEXEC;

}  // namespace

DirectoryFacts facts_of(const std::string& directory, const FileStatus& status, int direct_error) {
  DirectoryFacts facts;
  facts.directory = directory;
  char number[32];
  std::snprintf(number, sizeof number, "0x%llx", static_cast<unsigned long long>(status.filesystem));
  facts.filesystem = number;
  for (const Filesystem& known : kFilesystems) {
    if (known.magic != status.filesystem) continue;
    facts.filesystem = known.name;
    facts.in_memory = known.in_memory;
  }
  facts.free_bytes = status.free_bytes;
  facts.total_bytes = status.total_bytes;
  facts.device_major = status.device_major;
  facts.device_minor = status.device_minor;
  facts.offset_alignment = kAssumedAlignment;
  facts.memory_alignment = 1;  // the page cache takes any address
  if (direct_error != 0) {
    facts.why_not_direct = "opening with O_DIRECT: " + errno_text(direct_error);
  } else if (status.has_direct_alignment && status.direct_offset_alignment == 0) {
    facts.why_not_direct = "the file system offers no direct transfers for this file";
  } else {
    facts.direct = true;
    facts.memory_alignment = kAssumedAlignment;
    if (status.has_direct_alignment) {
      facts.alignment_reported = true;
      facts.memory_alignment = status.direct_memory_alignment > 0 ? status.direct_memory_alignment : 1;
      facts.offset_alignment = status.direct_offset_alignment;
    }
  }
  return facts;
}

int open_direct(SystemCalls& calls, const std::string& path, DirectoryFacts& facts) {
  int direct_error = 0;
  int fd = calls.open(path.c_str(), kNewFile | O_EXCL | O_DIRECT, 0600);
  if (fd == -EINVAL) {
    direct_error = EINVAL;
    // Some file systems have made the file by the time they refuse the flag.
    fd = calls.open(path.c_str(), kNewFile, 0600);
  }
  if (fd < 0) throw Error(Code::io, "making the file " + path + " failed: " + errno_text(fd));
  FileStatus status{};
  if (const int code = calls.status(fd, &status); code < 0) {
    calls.close(fd);
    calls.unlink(path.c_str());
    throw Error(Code::io, "asking the file system about " + path + " failed: " + errno_text(code));
  }
  facts = facts_of(facts.directory, status, direct_error);
  if (!facts.direct && direct_error == 0) {
    calls.close(fd);
    fd = calls.open(path.c_str(), kNewFile, 0600);
    if (fd < 0) {
      calls.unlink(path.c_str());
      throw Error(Code::io, "opening the file " + path + " without O_DIRECT failed: " + errno_text(fd));
    }
  }
  return fd;
}

DirectoryLock::DirectoryLock(std::shared_ptr<SystemCalls> calls, const std::string& directory)
    : calls_(std::move(calls)), directory_(directory), path_(directory + "/slidecore-swap.lock") {
  while (!try_lock()) {
  }
  named_ = true;
  const std::string owner = std::to_string(getpid()) + "\n";
  long code = calls_->truncate(fd_, 0);
  if (code >= 0) code = calls_->pwrite(fd_, owner.data(), owner.size(), 0);
  if (code < 0) {
    remove_name();
    calls_->close(fd_);
    throw Error(Code::io, "writing the lock " + path_ + " failed: " + errno_text(code));
  }
}

bool DirectoryLock::try_lock() {
  const int fd = calls_->open(path_.c_str(), kNewFile, 0600);
  if (fd < 0) {
    throw Error(Code::io, "making the lock " + path_ + " failed: " + errno_text(fd) +
                              ". The directory must be writable; give another one, or change its permissions");
  }
  if (const int code = calls_->lock(fd); code < 0) {
    if (code == -EINTR) {
      calls_->close(fd);
      return false;
    }
    if (code == -EWOULDBLOCK) held_by_another(fd);
    calls_->close(fd);
    throw Error(Code::io, "locking " + path_ + " failed: " + errno_text(code) +
                              ". Swap files need a file system with locks; give a directory on a local drive");
  }
  // The owner before may have removed the name between our open and our lock: then the lock is on a file that nobody
  // else will find.
  FileStatus mine{}, named{};
  int code = calls_->status(fd, &mine);
  const int again = code < 0 ? code : calls_->open(path_.c_str(), O_RDONLY | O_CLOEXEC, 0);
  code = again;
  if (again >= 0) {
    code = calls_->status(again, &named);
    calls_->close(again);
  }
  if (code < 0 && code != -ENOENT) {
    calls_->close(fd);
    throw Error(Code::io, "asking the file system about " + path_ + " failed: " + errno_text(code));
  }
  if (code < 0 || mine.inode != named.inode) {
    calls_->close(fd);
    return false;
  }
  fd_ = fd;
  return true;
}

void DirectoryLock::held_by_another(int fd) const {
  char text[32] = {};
  const long read = calls_->pread(fd, text, sizeof text - 1, 0);
  calls_->close(fd);
  std::string pid;
  for (long i = 0; i < read && text[i] >= '0' && text[i] <= '9'; ++i) pid += text[i];
  std::string owner = "another process";
  if (!pid.empty()) {
    const std::string command = command_of(pid);
    owner = "process " + pid;
    owner += command.empty() ? " or, as that has ended, a process that it started" : " (" + command + ")";
  }
  throw Error(Code::state, "the swap directory " + directory_ + " is in use by " + owner +
                               ": give another directory, or end that process");
}

void DirectoryLock::remove_name() noexcept {
  if (!named_) return;
  named_ = false;
  calls_->unlink(path_.c_str());  // while it is locked, so that it is ours for certain
}

DirectoryLock::~DirectoryLock() {
  remove_name();
  calls_->close(fd_);
}

}  // namespace slidecore::io

namespace slidecore {

DirectoryFacts inspect_directory(const std::string& directory) {
  io::SystemCalls calls;
  const int found = calls.open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (found < 0) {
    throw Error(Code::invalid_argument, directory + " cannot be used as a directory: " + io::errno_text(found));
  }
  calls.close(found);
  static std::atomic<unsigned> number{0};
  const std::string path =
      directory + "/slidecore-inspect." + std::to_string(getpid()) + "." + std::to_string(number.fetch_add(1));
  DirectoryFacts facts;
  facts.directory = directory;
  calls.close(io::open_direct(calls, path, facts));
  calls.unlink(path.c_str());
  return facts;
}

}  // namespace slidecore
