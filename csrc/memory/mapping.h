#pragma once
// One anonymous private mapping as planes want it, and what the machine says about its memory.

#include <cstddef>
#include <cstdint>
#include <optional>

namespace slidecore::memory {

// Unmapped on destruction, unless released. Zero-filled, every page present.
class Mapping {
 public:
  // `node`: preferred memory node, or -1. Throws Error(out_of_memory).
  Mapping(std::size_t bytes, int node);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return size_; }  // bytes, rounded up to the page
  void* release();

 private:
  void map();
  void advise() const;

  void* data_ = nullptr;
  std::size_t size_ = 0;
};

void unmap(void* data, std::size_t size) noexcept;

// Bytes of a transparent huge page: 2 MiB with pages of 4 KiB; 32 or 512 MiB with pages of 16 or 64 KiB, which kernels
// for aarch64 may be built for.
std::size_t huge_page_size();

// Writes to every page by several threads, so that the kernel zeroes them in parallel and not at first use.
// Throws Error(out_of_memory) if the kernel cannot provide the pages.
void touch(void* data, std::size_t size);

struct AvailableMemory {
  std::uint64_t memory;  // MemAvailable
  std::uint64_t swap;    // SwapFree
};
std::optional<AvailableMemory> available_memory();  // none where /proc does not say

}  // namespace slidecore::memory
