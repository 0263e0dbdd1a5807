#include "memory/numa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <climits>
#include <fstream>
#include <sstream>

namespace slidecore::memory {
namespace {

constexpr unsigned long kPreferred = 1;  // MPOL_PREFERRED of linux/mempolicy.h; the kernel takes it as a long
constexpr int kMaxNodes = 1024;  // the kernel's own limit; it ignores the mask's last bit, which no node reaches
constexpr int kBitsPerWord = sizeof(unsigned long) * CHAR_BIT;

int online_nodes() {
  std::ifstream file("/sys/devices/system/node/online");
  std::string list;
  return std::getline(file, list) ? count_nodes(list) : 0;
}

}  // namespace

int count_nodes(const std::string& list) {
  std::istringstream input(list);
  int count = 0;
  for (;;) {
    int first = 0;
    if (!(input >> first) || first < 0) return 0;
    int last = first;
    if (input.peek() == '-') {
      input.get();
      if (!(input >> last) || last < first) return 0;
    }
    count += last - first + 1;
    const int next = input.get();
    if (next == std::char_traits<char>::eof()) return count;
    if (next != ',') return 0;
  }
}

bool prefer_node(void* data, std::size_t size, int node) {
  if (node < 0 || node >= kMaxNodes - 1 || size == 0 || online_nodes() < 2) return false;
  std::array<unsigned long, kMaxNodes / kBitsPerWord> mask{};
  mask[static_cast<std::size_t>(node / kBitsPerWord)] = 1ul << (node % kBitsPerWord);
  return syscall(SYS_mbind, data, size, kPreferred, mask.data(), static_cast<unsigned long>(kMaxNodes), 0u) == 0;
}

}  // namespace slidecore::memory
