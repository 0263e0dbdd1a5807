#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "slidecore/memory.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

// Pieces start on their own page, as direct file I/O and copy engines like it, whatever size was asked for.
constexpr std::size_t kPieceAlignment = 4096;

std::size_t stride(std::size_t piece_bytes) {
  return (piece_bytes + kPieceAlignment - 1) / kPieceAlignment * kPieceAlignment;
}

std::size_t total_bytes(std::size_t piece_bytes, std::size_t pieces) {
  if (piece_bytes == 0 || pieces == 0) {
    throw Error(Code::invalid_argument, "a Ring needs at least one piece of at least one byte");
  }
  if (piece_bytes > SIZE_MAX - kPieceAlignment || stride(piece_bytes) > SIZE_MAX / pieces) {
    throw Error(Code::invalid_argument, "a Ring of " + std::to_string(pieces) + " pieces of " +
                                            std::to_string(piece_bytes) + " bytes exceeds the address space");
  }
  return stride(piece_bytes) * pieces;
}

}  // namespace

Ring::Ring(std::shared_ptr<Device> device, std::size_t piece_bytes, std::size_t pieces)
    : buffer_(std::move(device), total_bytes(piece_bytes, pieces), true), piece_bytes_(piece_bytes) {
  free_.reserve(pieces);  // release() never allocates
  for (std::size_t i = pieces; i-- > 0;) free_.push_back(static_cast<char*>(buffer_.data()) + i * stride(piece_bytes));
}

void* Ring::acquire() {
  std::unique_lock lock(mutex_);
  free_changed_.wait(lock, [this] { return stopped_ || !free_.empty(); });
  if (stopped_) return nullptr;
  void* piece = free_.back();
  free_.pop_back();
  return piece;
}

void Ring::release(void* piece) {
  const auto begin = reinterpret_cast<std::uintptr_t>(buffer_.data());
  const auto at = reinterpret_cast<std::uintptr_t>(piece);
  if (at < begin || at - begin >= buffer_.size() || (at - begin) % stride(piece_bytes_) != 0) {
    throw Error(Code::invalid_argument, "what was released is not a piece of this Ring");
  }
  {
    std::lock_guard lock(mutex_);
    // Twice in the list, it would be handed to two users at once.
    if (std::find(free_.begin(), free_.end(), piece) != free_.end()) {
      throw Error(Code::invalid_argument, "a piece of a Ring was released twice");
    }
    free_.push_back(piece);
  }
  free_changed_.notify_one();
}

void Ring::stop() {
  {
    std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  free_changed_.notify_all();
}

}  // namespace slidecore
