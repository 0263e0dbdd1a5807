#include <unistd.h>

#include <atomic>
#include <utility>

#include "memory/mapping.h"
#include "memory/registration.h"
#include "slidecore/memory.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

std::atomic<std::uint64_t> now{0};
std::atomic<std::uint64_t> peak{0};

void count_mapped(std::uint64_t bytes) {
  const std::uint64_t sum = now.fetch_add(bytes) + bytes;
  std::uint64_t highest = peak.load();
  while (highest < sum && !peak.compare_exchange_weak(highest, sum)) {
  }
}

}  // namespace

HostBuffer::HostBuffer(std::shared_ptr<Device> device, std::size_t bytes, bool pinned)
    : device_(std::move(device)), bytes_(bytes) {
  if (device_ == nullptr) throw Error(Code::invalid_argument, "a HostBuffer needs a device");
  if (bytes == 0) return;
  memory::Mapping mapping(bytes, device_->info().numa_node);
  if (pinned && device_->needs_pinning()) {
    registered_ = memory::register_pieces(*device_, mapping.data(), mapping.size());
  }
  // Nothing below throws: from here the destructor is responsible.
  mapped_ = mapping.size();
  data_ = mapping.release();
  owner_ = getpid();
  count_mapped(mapped_);
}

HostBuffer::~HostBuffer() {
  // A child of fork() has nothing mapped there (MADV_DONTFORK) but what it mapped itself since.
  if (data_ == nullptr || owner_ != getpid()) return;
  memory::unregister_pieces(*device_, registered_);  // before unmapping: the driver holds the pages
  memory::unmap(data_, mapped_);
  now.fetch_sub(mapped_);
}

std::uint64_t HostBuffer::mapped_now() {
  return now.load();
}
std::uint64_t HostBuffer::mapped_peak() {
  return peak.load();
}

}  // namespace slidecore
