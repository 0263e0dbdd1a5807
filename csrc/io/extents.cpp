#include "io/extents.h"

#include <iterator>

namespace slidecore::io {

std::optional<std::uint64_t> Extents::take(std::uint64_t bytes) {
  auto best = ranges_.end();
  for (auto it = ranges_.begin(); it != ranges_.end(); ++it) {
    if (it->second >= bytes && (best == ranges_.end() || it->second < best->second)) best = it;
  }
  if (best == ranges_.end()) return std::nullopt;
  const auto [begin, length] = *best;
  ranges_.erase(best);
  if (length > bytes) ranges_.emplace(begin + bytes, length - bytes);
  free_ -= bytes;
  return begin;
}

void Extents::give(std::uint64_t begin, std::uint64_t bytes) {
  if (bytes == 0) return;
  free_ += bytes;
  auto next = ranges_.lower_bound(begin);
  if (next != ranges_.end() && begin + bytes == next->first) {
    bytes += next->second;
    next = ranges_.erase(next);
  }
  if (next != ranges_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == begin) {
      before->second += bytes;
      return;
    }
  }
  ranges_.emplace(begin, bytes);
}

std::uint64_t Extents::free_at_end(std::uint64_t end) const {
  if (ranges_.empty()) return 0;
  const auto& [begin, bytes] = *ranges_.rbegin();
  return begin + bytes == end ? bytes : 0;
}

void Extents::cut_end(std::uint64_t bytes) {
  if (bytes == 0) return;
  const auto last = std::prev(ranges_.end());
  free_ -= bytes;
  last->second -= bytes;
  if (last->second == 0) ranges_.erase(last);
}

}  // namespace slidecore::io
