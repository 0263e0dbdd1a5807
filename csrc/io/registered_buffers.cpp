#include "io/registered_buffers.h"

#include <sys/resource.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <span>

#include "io/errors.h"
#include "memory/mapping.h"

namespace slidecore::io {
namespace {

constexpr unsigned kSlots = 1024;
// The kernel takes up to 1 GiB at once. It hands drives whole huge pages only of a registration that consists of them:
// one small page, and each 4 KiB are a segment, of which drives take a hundred or two in a request. Memory that is not
// registered goes in whole huge pages by any kernel.
constexpr std::size_t kLargest = std::size_t{64} << 20;
constexpr int kWholePages = 6012;  // Linux 6.12 is the first that does so for more than one huge page

// The range in pieces to register: whole huge pages, and what is left at both ends by itself.
std::vector<std::span<char>> registrations(char* memory, std::size_t bytes) {
  const std::size_t huge = memory::huge_page_size(), largest = std::max(kLargest, huge);
  const std::size_t past = reinterpret_cast<std::uintptr_t>(memory) % huge;
  const std::size_t head = std::min(bytes, past == 0 ? 0 : huge - past);
  std::vector<std::span<char>> ranges;
  if (head != 0) ranges.emplace_back(memory, head);
  for (std::size_t at = head; at < bytes;) {
    const std::size_t left = bytes - at, length = left < huge ? left : std::min(largest, left / huge * huge);
    ranges.emplace_back(memory + at, length);
    at += length;
  }
  return ranges;
}

}  // namespace

RegisteredBuffers::RegisteredBuffers(Uring& ring, SystemCalls& calls) : ring_(ring) {
  if (const int version = calls.kernel_version(); version < kWholePages) {
    why_not_ = "before Linux 6.12 requests to them are cut up";
    return;
  }
  abi::ResourceRegister table{};
  table.count = kSlots;
  table.flags = abi::kSparse;
  if (const int code = ring.enroll(abi::kRegisterBuffers2, &table, sizeof table); code < 0) {
    why_not_ = "the kernel refuses a table of buffers (" + errno_text(code) + "; Linux 5.19 or newer is needed)";
    return;
  }
  for (unsigned i = kSlots; i-- > 0;) free_.push_back(static_cast<std::uint16_t>(i));
}

int RegisteredBuffers::update(std::uint16_t number, void* memory, std::size_t bytes) {
  iovec range{memory, bytes};
  abi::ResourceUpdate update{};
  update.offset = number;
  update.data = reinterpret_cast<std::uintptr_t>(&range);
  update.count = 1;
  const int code = ring_.enroll(abi::kUpdateBuffers, &update, sizeof update);
  return code == 0 ? -EINVAL : std::min(code, 0);
}

bool RegisteredBuffers::add(void* memory, std::size_t bytes) {
  const auto owner = reinterpret_cast<std::uintptr_t>(memory);
  if (bytes == 0 || buffers_.contains(owner)) return true;
  const std::vector<std::span<char>> ranges = registrations(static_cast<char*>(memory), bytes);
  if (ranges.size() > free_.size()) {
    if (why_not_.empty()) why_not_ = "all " + std::to_string(kSlots) + " places are taken";
    return false;
  }
  for (const std::span<char> range : ranges) {
    if (const int code = update(free_.back(), range.data(), range.size()); code < 0) {
      rlimit limit{};
      getrlimit(RLIMIT_MEMLOCK, &limit);
      why_not_ = "the kernel refused " + size_text(bytes) + ": " + errno_text(code);
      if (code == -ENOMEM) why_not_ += " (`ulimit -l` is " + std::to_string(limit.rlim_cur / 1024) + " KiB)";
      remove(memory);
      return false;
    }
    buffers_[reinterpret_cast<std::uintptr_t>(range.data())] = {range.size(), free_.back(), owner};
    free_.pop_back();
  }
  return true;
}

void RegisteredBuffers::remove(void* memory) {
  const auto owner = reinterpret_cast<std::uintptr_t>(memory);
  for (auto it = buffers_.lower_bound(owner); it != buffers_.end() && it->second.owner == owner;) {
    // Requests that are in flight keep the pages until they are done.
    if (update(it->second.number, nullptr, 0) >= 0) free_.push_back(it->second.number);
    it = buffers_.erase(it);
  }
}

std::optional<std::uint16_t> RegisteredBuffers::find(const void* memory, std::size_t bytes) const {
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  auto it = buffers_.upper_bound(address);
  if (it == buffers_.begin()) return std::nullopt;
  --it;
  const std::size_t within = address - it->first;
  if (within > it->second.bytes || bytes > it->second.bytes - within) return std::nullopt;
  return it->second.number;
}

}  // namespace slidecore::io
