#include "memory/registration.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <string>

#include "slidecore/status.h"

namespace slidecore::memory {
namespace {

std::string lock_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0) return "unknown";
  return limit.rlim_cur == RLIM_INFINITY ? "unlimited" : std::to_string(limit.rlim_cur) + " bytes";
}

}  // namespace

std::vector<void*> register_pieces(const Device& device, void* data, std::size_t bytes, std::size_t piece_bytes) {
  std::vector<void*> pieces;
  pieces.reserve((bytes + piece_bytes - 1) / piece_bytes);
  for (std::size_t at = 0; at < bytes; at += piece_bytes) {
    void* piece = static_cast<char*>(data) + at;
    try {
      device.register_host(piece, std::min(piece_bytes, bytes - at));
    } catch (const Error& error) {
      unregister_pieces(device, pieces);
      throw Error(error.code(), "pinning " + std::to_string(bytes) + " bytes of host memory failed at byte " +
                                    std::to_string(at) + ": " + error.what() + ". Check `ulimit -l` (now " +
                                    lock_limit() + ") and the container's memlock limit, or pin less");
    }
    pieces.push_back(piece);
  }
  return pieces;
}

void unregister_pieces(const Device& device, std::vector<void*>& pieces) noexcept {
  while (!pieces.empty()) {
    try {
      device.unregister_host(pieces.back());
    } catch (const std::exception& error) {
      std::fprintf(stderr, "slidecore: %s\n", error.what());
    }
    pieces.pop_back();
  }
}

}  // namespace slidecore::memory
