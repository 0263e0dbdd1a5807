#include "io/registered_buffers.h"

#include <sys/resource.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>

#include "io/errors.h"

namespace slidecore::io {
namespace {

constexpr unsigned kSlots = 1024;
constexpr std::size_t kLargest = std::size_t{1} << 30;  // the kernel's limit for one

}  // namespace

RegisteredBuffers::RegisteredBuffers(Uring& ring) : ring_(ring) {
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
  const std::size_t pieces = (bytes + kLargest - 1) / kLargest;
  if (pieces == 0 || buffers_.contains(owner)) return true;
  if (pieces > free_.size()) {
    if (why_not_.empty()) why_not_ = "all " + std::to_string(kSlots) + " places are taken";
    return false;
  }
  for (std::size_t at = 0; at < bytes; at += kLargest) {
    const std::size_t length = std::min(kLargest, bytes - at);
    if (const int code = update(free_.back(), static_cast<char*>(memory) + at, length); code < 0) {
      rlimit limit{};
      getrlimit(RLIMIT_MEMLOCK, &limit);
      why_not_ = "the kernel refused " + size_text(bytes) + ": " + errno_text(code);
      if (code == -ENOMEM) why_not_ += " (`ulimit -l` is " + std::to_string(limit.rlim_cur / 1024) + " KiB)";
      remove(memory);
      return false;
    }
    buffers_[owner + at] = {length, free_.back(), owner};
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
