#pragma once
// What one context has allocated: sizes by address, the sum now and its peak.

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace slidecore::device {

class Allocations {
 public:
  void add(void* pointer, std::size_t bytes);
  bool remove(void* pointer);       // false: not one of ours
  std::vector<void*> remove_all();  // what was never freed, for close()
  void in_use(std::uint64_t* now, std::uint64_t* peak) const;

 private:
  mutable std::mutex mutex_;
  std::unordered_map<void*, std::size_t> bytes_;
  std::uint64_t now_ = 0;
  std::uint64_t peak_ = 0;
};

}  // namespace slidecore::device
