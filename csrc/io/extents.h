#pragma once
// Which ranges of an address space are free.

#include <cstdint>
#include <map>
#include <optional>

namespace slidecore::io {

class Extents {
 public:
  // The smallest free range that fits, the lowest of these.
  std::optional<std::uint64_t> take(std::uint64_t bytes);
  void give(std::uint64_t begin, std::uint64_t bytes);  // what was taken, or space that is new
  // Free bytes that end at `end`: what growing there would add to.
  std::uint64_t free_at_end(std::uint64_t end) const;
  // Takes `bytes`, which are free, from there: they are no part of the space any more.
  void cut_end(std::uint64_t bytes);
  std::uint64_t free_bytes() const { return free_; }

 private:
  std::map<std::uint64_t, std::uint64_t> ranges_;  // begin -> bytes; never adjacent
  std::uint64_t free_ = 0;
};

}  // namespace slidecore::io
