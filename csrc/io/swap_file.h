#pragma once
// The swap file of one directory.

#include <cstdint>
#include <memory>
#include <string>

#include "io/directory.h"

namespace slidecore::io {

// Removed with the object. Throws Error(io) where nothing else is said.
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

  std::shared_ptr<SystemCalls> calls_;
  std::string path_;
  DirectoryFacts facts_;
  int fd_ = -1;
  std::uint64_t size_ = 0;
  bool named_ = false;
  bool preallocated_ = true;  // false: this file system cannot
  int removed_files_ = 0;
  std::uint64_t removed_bytes_ = 0;
};

}  // namespace slidecore::io
