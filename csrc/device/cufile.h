#pragma once
// NVIDIA's cuFile library: reads and writes between files and device memory.

#include <cstdint>
#include <string>
#include <vector>

#include "device/cufile_symbols.h"

namespace slidecore::device {

// The library, loaded but not opened. It stays in the process, as drivers do.
class CuFileLibrary {
 public:
  // Takes what SLIDECORE_CUFILE_LIBRARY names; else what the process has mapped already, what the loader finds, or the
  // first of `paths` that is there. Throws Error(unsupported) naming every attempt, or every function that is missing.
  explicit CuFileLibrary(const std::vector<std::string>& paths);

  const cufile::Symbols& symbols() const { return symbols_; }
  const std::string& path() const { return path_; }
  std::string version() const;  // "1.14"; empty if the library does not say

 private:
  cufile::Symbols symbols_;
  std::string path_;
};

// The opened driver. Calls need the device's context current on their thread. Thread-safe.
class CuFileDriver {
 public:
  // Throws Error(unsupported) with cuFile's reason.
  explicit CuFileDriver(CuFileLibrary library);
  ~CuFileDriver();
  CuFileDriver(const CuFileDriver&) = delete;
  CuFileDriver& operator=(const CuFileDriver&) = delete;

  // Throws Error(unsupported) with cuFile's reason. The descriptor must stay open until the handle is removed.
  cufile::Handle add_file(int fd, const std::string& path) const;
  void remove_file(cufile::Handle handle) const;

  // Bytes moved, or a negative code for failure_text().
  std::int64_t read(cufile::Handle handle, void* memory, std::size_t bytes, std::uint64_t file_offset,
                    std::uint64_t memory_offset) const;
  std::int64_t write(cufile::Handle handle, const void* memory, std::size_t bytes, std::uint64_t file_offset,
                     std::uint64_t memory_offset) const;

  const CuFileLibrary& library() const { return library_; }
  // Whether anything lets drives reach device memory: the nvidia-fs module, or PCI peer-to-peer. Else cuFile copies
  // through host memory.
  bool direct() const;
  std::string describe() const;

 private:
  CuFileLibrary library_;
  cufile::Properties properties_{};
  bool opened_ = false;  // by this object: what others opened they close
};

// Of a negative errno or a negative CUfileOpError: name, number and what it means.
std::string failure_text(std::int64_t code);

}  // namespace slidecore::device
