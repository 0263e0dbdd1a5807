#include "device/allocations.h"

#include <algorithm>

namespace slidecore::device {

void Allocations::add(void* pointer, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  bytes_.emplace(pointer, bytes);
  now_ += bytes;
  peak_ = std::max(peak_, now_);
}

bool Allocations::remove(void* pointer) {
  std::lock_guard lock(mutex_);
  const auto found = bytes_.find(pointer);
  if (found == bytes_.end()) return false;
  now_ -= found->second;
  bytes_.erase(found);
  return true;
}

std::vector<void*> Allocations::remove_all() {
  std::lock_guard lock(mutex_);
  std::vector<void*> pointers;
  pointers.reserve(bytes_.size());
  for (const auto& [pointer, bytes] : bytes_) pointers.push_back(pointer);
  bytes_.clear();
  now_ = 0;
  return pointers;
}

void Allocations::in_use(std::uint64_t* now, std::uint64_t* peak) const {
  std::lock_guard lock(mutex_);
  *now = now_;
  *peak = peak_;
}

}  // namespace slidecore::device
