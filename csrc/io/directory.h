#pragma once
// One directory of a Storage: what its file system offers, and the lock that makes it one Storage's own.

#include <memory>
#include <string>

#include "io/system_calls.h"
#include "slidecore/io.h"

namespace slidecore::io {

// What is assumed where the kernel does not say: a page satisfies every drive in use.
inline constexpr std::size_t kAssumedAlignment = 4096;

// Fills in everything but `directory` from the status of an open file, which O_DIRECT was accepted for or not.
DirectoryFacts facts_of(const std::string& directory, const FileStatus& status, int direct_error);

// Opens a file for direct reads and writes if that is possible, else through the page cache; what came of it is in
// `facts`. Throws Error(io). The file must not exist.
int open_direct(SystemCalls& calls, const std::string& path, DirectoryFacts& facts);

// An exclusive lock on a directory, by a locked file that holds the owner's process id and command. The file is removed
// with the lock; one that a dead process left is taken over.
class DirectoryLock {
 public:
  DirectoryLock(std::shared_ptr<SystemCalls> calls, const std::string& directory);
  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

  void remove_name() noexcept;  // the lock itself lasts until destruction

 private:
  bool try_lock();  // false: the file was removed by its owner in between
  [[noreturn]] void held_by_another(int fd) const;

  std::shared_ptr<SystemCalls> calls_;
  std::string directory_, path_;
  int fd_ = -1;
  bool named_ = false;
};

}  // namespace slidecore::io
