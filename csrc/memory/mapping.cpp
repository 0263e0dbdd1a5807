#include "memory/mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <system_error>

#include "memory/numa.h"
#include "slidecore/status.h"

namespace slidecore::memory {
namespace {

// With larger pages than 4 KiB, aarch64 can map a run of them that is this long as one.
constexpr std::size_t kSmallestHugePage = std::size_t{2} << 20;

std::size_t page_size() {
  return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

std::string reason(int code) {
  return std::generic_category().message(code);
}

std::string availability() {
  const auto available = available_memory();
  if (!available) return "";
  return "; MemAvailable is " + std::to_string(available->memory) + " bytes, SwapFree " +
         std::to_string(available->swap);
}

[[noreturn]] void cannot_map(std::size_t bytes, const std::string& why) {
  throw Error(Code::out_of_memory,
              "mapping " + std::to_string(bytes) + " bytes of host memory failed: " + why + availability());
}

}  // namespace

std::optional<AvailableMemory> available_memory() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  std::uint64_t kib = 0;
  AvailableMemory available{0, 0};
  bool found = false;
  while (file >> key >> kib && std::getline(file, unit)) {
    if (key == "MemAvailable:") {
      available.memory = kib * 1024;
      found = true;
    } else if (key == "SwapFree:") {
      available.swap = kib * 1024;
    }
  }
  return found ? std::optional(available) : std::nullopt;
}

std::size_t huge_page_size() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
  std::size_t bytes = 0;
  return file >> bytes && std::has_single_bit(bytes) ? bytes : kSmallestHugePage;
}

Mapping::Mapping(std::size_t bytes, int node) {
  const std::size_t page = page_size();
  if (bytes > SIZE_MAX - huge_page_size() - page) cannot_map(bytes, "the size overflows");
  size_ = (bytes + page - 1) / page * page;
  // With overcommit the kernel grants what it does not have and kills the process at the touch; refuse instead.
  if (const auto available = available_memory(); available && size_ > available->memory + available->swap) {
    cannot_map(bytes, "that is more than this machine has left");
  }
  map();
  try {
    advise();
    prefer_node(data_, size_, node);
    touch(data_, size_);
  } catch (...) {
    unmap(data_, size_);
    throw;
  }
}

Mapping::~Mapping() {
  if (data_ != nullptr) unmap(data_, size_);
}

void* Mapping::release() {
  void* data = data_;
  data_ = nullptr;
  return data;
}

void Mapping::map() {
  // Kernels before 6.7 do not align large anonymous mappings to huge pages: map more and cut both ends off.
  const std::size_t huge = huge_page_size();
  const std::size_t alignment = size_ >= huge ? huge : kSmallestHugePage;
  const std::size_t slack = size_ >= alignment ? alignment : 0;
  void* mapped = mmap(nullptr, size_ + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) cannot_map(size_, reason(errno));
  data_ = mapped;
  if (slack == 0) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(mapped);
  const std::uintptr_t aligned = (begin + alignment - 1) / alignment * alignment;
  const std::size_t head = aligned - begin;
  data_ = static_cast<char*>(mapped) + head;
  if (head != 0) unmap(mapped, head);
  if (slack != head) unmap(static_cast<char*>(data_) + size_, slack - head);
}

void Mapping::advise() const {
  // EINVAL: a kernel without transparent huge pages. Slower, not wrong.
  if (madvise(data_, size_, MADV_HUGEPAGE) != 0 && errno != EINVAL) {
    cannot_map(size_, "MADV_HUGEPAGE: " + reason(errno));
  }
  if (madvise(data_, size_, MADV_DONTFORK) != 0) {
    throw Error(Code::unsupported, "keeping host memory from forked children failed: MADV_DONTFORK: " + reason(errno));
  }
}

void unmap(void* data, std::size_t size) noexcept {
  // Fails only for a range that was never mapped, or if cutting a mapping exceeds the kernel's limit of mappings:
  // then the memory stays mapped, which is a leak but nothing that later calls can trip over.
  if (munmap(data, size) != 0) std::perror("slidecore: munmap of host memory");
}

}  // namespace slidecore::memory
