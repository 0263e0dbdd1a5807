#pragma once
// Memory whose pages a ring keeps pinned, so that requests to it need not pin them. Used by the ring's thread.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "io/uring.h"

namespace slidecore::io {

class RegisteredBuffers {
 public:
  // Where the kernel lacks the table, or would cut requests up, add() refuses.
  RegisteredBuffers(Uring& ring, SystemCalls& calls);
  // Returns whether all of it was registered; else none of it is, and why_not() says why.
  bool add(void* memory, std::size_t bytes);
  void remove(void* memory);
  // The number of the buffer that holds all of the range.
  std::optional<std::uint16_t> find(const void* memory, std::size_t bytes) const;
  const std::string& why_not() const { return why_not_; }

 private:
  struct Buffer {
    std::size_t bytes;
    std::uint16_t number;
    std::uintptr_t owner;  // address that add() was given
  };
  int update(std::uint16_t number, void* memory, std::size_t bytes);

  Uring& ring_;
  std::string why_not_;
  std::vector<std::uint16_t> free_;
  std::map<std::uintptr_t, Buffer> buffers_;  // by address
};

}  // namespace slidecore::io
