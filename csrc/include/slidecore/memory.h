#pragma once
// Host memory: exact-size planes and the pinned ring that gradients land in.

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "slidecore/device.h"

namespace slidecore {

// One anonymous mapping: huge pages advised, kept from forked children, touched in parallel, registered with the
// device (in pieces of at most 64 GiB) when `pinned` and the device needs it. Zero-filled. Size is exact up to
// the page, 0 is allowed (data() is then nullptr). On machines with several memory nodes the card's node is
// preferred. Throws Error(out_of_memory) with the sizes; a failed registration undoes everything and says what to
// check.
// Thread-safe after construction.
class HostBuffer {
 public:
  HostBuffer(std::shared_ptr<Device> device, std::size_t bytes, bool pinned);
  ~HostBuffer();
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  // Registered with the device: false where it needs no pinning, even if asked for.
  bool pinned() const { return !registered_.empty(); }

  // Bytes mapped by all HostBuffers of this process now, and the most there ever were.
  static std::uint64_t mapped_now();
  static std::uint64_t mapped_peak();

 private:
  std::shared_ptr<Device> device_;
  pid_t owner_ = 0;  // the process that mapped it
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t mapped_ = 0;
  std::vector<void*> registered_;
};

// A fixed number of equal pinned pieces. acquire() blocks while all are out: this is the backpressure between the
// download and the update lane. stop() wakes every waiter, whose acquire() then returns nullptr, as every later one.
// Pieces start on a page of 4096 bytes. Releasing what is not out is an Error(invalid_argument). No call may be
// under way when the Ring is destroyed.
class Ring {
 public:
  Ring(std::shared_ptr<Device> device, std::size_t piece_bytes, std::size_t pieces);
  void* acquire();
  void release(void* piece);
  void stop();
  std::size_t piece_bytes() const { return piece_bytes_; }

 private:
  HostBuffer buffer_;
  std::size_t piece_bytes_;
  std::mutex mutex_;
  std::condition_variable free_changed_;
  std::vector<void*> free_;
  bool stopped_ = false;
};

}  // namespace slidecore
