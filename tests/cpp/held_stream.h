#pragma once
// Work that is held back, so that an order that a missing dependency would allow does come about.

#include <chrono>
#include <memory>
#include <thread>
#include <utility>

#include "device/host_event.h"
#include "device/host_stream.h"
#include "slidecore/device.h"

namespace slidecore::testing_support {

// A stream of the host backend whose work waits until open().
class HeldStream {
 public:
  explicit HeldStream(std::shared_ptr<Device> device) : device_(std::move(device)), stream_(device_->create_stream()) {
    hold();
  }
  ~HeldStream() {
    open();
    device_->destroy_stream(stream_);
  }
  HeldStream(const HeldStream&) = delete;
  HeldStream& operator=(const HeldStream&) = delete;

  // What is enqueued from now on waits for the next open().
  void hold() {
    gate_ = std::make_shared<device::HostRecord>();
    reinterpret_cast<device::HostStream*>(stream_)->enqueue(device::HostTask::make_wait(gate_));
  }
  void open() {
    if (gate_) gate_->complete();
    gate_ = nullptr;
  }
  StreamHandle handle() const { return stream_; }

 private:
  std::shared_ptr<Device> device_;
  StreamHandle stream_;
  std::shared_ptr<device::HostRecord> gate_;
};

// Gives what is not held back the time to run ahead. Tests are right without it, but would miss a missing dependency.
inline void let_others_run() {
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

}  // namespace slidecore::testing_support
