#include "scheduler/events.h"

namespace slidecore {

EventPool::~EventPool() {
  for (auto* free : {&plain_, &timing_}) {
    for (EventHandle event : *free) {
      try {
        device_->destroy_event(event);
      } catch (const Error&) {
        // The context may be gone at process exit; the event went with it.
      }
    }
  }
}

EventHandle EventPool::take(bool timing) {
  {
    std::lock_guard lock(mutex_);
    auto& free = timing ? timing_ : plain_;
    if (!free.empty()) {
      EventHandle event = free.back();
      free.pop_back();
      return event;
    }
  }
  return device_->create_event(timing);
}

void EventPool::give(EventHandle event, bool timing) {
  std::lock_guard lock(mutex_);
  (timing ? timing_ : plain_).push_back(event);
}

}  // namespace slidecore
