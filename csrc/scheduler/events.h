#pragma once
// Reuses events: creating one is a driver call, and a step needs thousands. The pool owns every event it made, also
// those that work which was dropped never gave back.

#include <memory>
#include <mutex>
#include <vector>

#include "slidecore/device.h"
#include "slidecore/status.h"

namespace slidecore {

class EventPool {
 public:
  explicit EventPool(std::shared_ptr<Device> device) : device_(std::move(device)) {}
  ~EventPool();
  EventHandle take(bool timing = false);
  // The event's last record may still be pending: a later record replaces it.
  void give(EventHandle event, bool timing = false);
  // An event that is given back with its last reference: while someone waits for it, nobody records it again.
  std::shared_ptr<const EventHandle> share();

 private:
  std::shared_ptr<Device> device_;
  std::mutex mutex_;
  std::vector<EventHandle> all_, plain_, timing_;
};

}  // namespace slidecore
