#include <cstddef>
#include <cstring>

#include "slidecore/optimizer.h"

namespace slidecore {

void parallel_copy(ThreadPool& pool, void* to, const void* from, std::size_t bytes) {
  // Large enough that the C library copies past the cache, as one large memcpy would.
  constexpr std::size_t block = std::size_t{4} << 20;
  pool.run(bytes, block, [&](std::size_t begin, std::size_t end) {
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, end - begin);
  });
}

}  // namespace slidecore
