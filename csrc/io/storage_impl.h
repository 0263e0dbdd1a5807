#pragma once
// A Storage's state: the striped space over its files, and what of it is free.

#include <sys/types.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "io/directory.h"
#include "io/extents.h"
#include "io/swap_file.h"
#include "slidecore/io.h"

namespace slidecore {

struct Storage::Impl {
  Impl(const std::vector<std::string>& given, const StorageOptions& options);
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  bool in_child() const;  // of fork(): files and locks are the parent's
  std::uint64_t padded(std::uint64_t bytes) const { return (bytes + unit - 1) / unit * unit; }
  std::uint64_t take(std::uint64_t bytes, const std::string& name);
  void give(std::uint64_t base, std::uint64_t bytes);
  void grow(std::uint64_t capacity);  // needs the mutex
  void trim();
  void check_space(std::uint64_t file_bytes) const;
  // Throws Error(io) if a file has been truncated, whichever a transfer of this region uses: what another one has lost
  // is not to be trained on either. To be asked before writing, and after reading.
  void check_files(bool write, const Region& region) const;
  void remove_files() noexcept;
  std::string describe() const;

  // Where a byte of the striped space lies, and how many at most follow it there.
  struct Place {
    std::uint32_t drive;
    std::uint64_t offset, bytes;
  };
  Place place(std::uint64_t at) const;

  const std::shared_ptr<io::SystemCalls> calls;
  const std::uint64_t stripe;
  const pid_t owner;
  std::vector<std::unique_ptr<io::DirectoryLock>> locks;
  std::vector<std::unique_ptr<io::SwapFile>> files;
  std::vector<DirectoryFacts> facts;
  std::vector<std::string> paths;
  std::size_t unit = io::kAssumedAlignment;  // of offsets and sizes, for every drive
  std::size_t memory_alignment = 1;

  mutable std::mutex mutex;
  io::Extents space;
  std::uint64_t capacity = 0;   // of the striped space
  std::uint64_t allocated = 0;  // with padding
};

}  // namespace slidecore
