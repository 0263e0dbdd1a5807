#include "scheduler/events.h"

namespace slidecore {

EventPool::~EventPool() {
  for (const EventHandle event : all_) {
    try {
      device_->destroy_event(event);
    } catch (const Error&) {
      // The context may be gone at process exit; the event went with it.
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
  const EventHandle event = device_->create_event(timing);
  std::lock_guard lock(mutex_);
  all_.push_back(event);
  return event;
}

void EventPool::give(EventHandle event, bool timing) {
  std::lock_guard lock(mutex_);
  (timing ? timing_ : plain_).push_back(event);
}

std::shared_ptr<const EventHandle> EventPool::share() {
  return {new EventHandle(take()), [this](const EventHandle* event) {
            give(*event);
            delete event;
          }};
}

}  // namespace slidecore
