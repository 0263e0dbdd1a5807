#pragma once
// The swap file of one directory.

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "io/directory.h"

namespace slidecore::io {

// Removed with the object. Throws Error(io) where nothing else is said.
//
// Behind the bytes that are asked for lies a block that nobody writes: once something has truncated the file, no write
// of ours makes it as long as it was, however soon it comes, and why_not_whole() tells ever after. Otherwise a write
// behind the cut would leave a hole, which reads as zeros. Holes that others make in a file, and files that others make
// longer again, are not found.
class SwapFile {
 public:
  // Removes what dead processes left (the caller holds the directory's lock), makes the file and checks with one block
  // that it can be written and read back.
  SwapFile(std::shared_ptr<SystemCalls> calls, const std::string& directory);
  ~SwapFile();
  SwapFile(const SwapFile&) = delete;
  SwapFile& operator=(const SwapFile&) = delete;

  // Preallocates up to `bytes`, or (shrinking) gives back what is beyond.
  void grow(std::uint64_t bytes);
  void shrink(std::uint64_t bytes) noexcept;
  void remove_name() noexcept;
  std::uint64_t free_bytes() const;  // of the file system, for this user
  // Empty, or where the file ends too early. Thread-safe, also beside grow() and shrink().
  std::string why_not_whole() const;

  int fd() const { return fd_; }
  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }
  const DirectoryFacts& facts() const { return facts_; }
  bool preallocated() const { return preallocated_; }
  int removed_files() const { return removed_files_; }
  std::uint64_t removed_bytes() const { return removed_bytes_; }

 private:
  void remove_stale(const std::string& directory);
  void try_out();
  void reopen_buffered(const std::string& why);
  std::uint64_t guard() const;

  std::shared_ptr<SystemCalls> calls_;
  std::string path_;
  DirectoryFacts facts_;
  int fd_ = -1;
  std::uint64_t size_ = 0;
  std::atomic<std::uint64_t> length_ = 0;  // with the guard
  bool named_ = false;
  bool preallocated_ = true;  // false: this file system cannot
  int removed_files_ = 0;
  std::uint64_t removed_bytes_ = 0;
};

}  // namespace slidecore::io
