#include "device/host_event.h"

#include "device/host_stream.h"

namespace slidecore::device {

void HostRecord::complete() {
  {
    std::lock_guard lock(mutex_);
    time_ = std::chrono::steady_clock::now();
    done_ = true;
  }
  // Safe after unlocking: the stream's task keeps the record alive beyond this call.
  completed_.notify_all();
}

void HostRecord::wait() {
  std::unique_lock lock(mutex_);
  completed_.wait(lock, [this] { return done_; });
}

bool HostRecord::done() {
  std::lock_guard lock(mutex_);
  return done_;
}

HostRecord::Time HostRecord::time() {
  std::lock_guard lock(mutex_);
  return time_;
}

void HostEvent::record(HostStream* stream) {
  auto record = std::make_shared<HostRecord>();
  // The record is queued before it is published, both under the lock: a wait for it that another thread queues on
  // the same stream must land behind it, or the stream would wait for itself.
  std::lock_guard lock(mutex_);
  if (stream == nullptr) {
    record->complete();
  } else {
    stream->enqueue(HostTask::make_record(record));
  }
  latest_ = std::move(record);
}

std::shared_ptr<HostRecord> HostEvent::latest() {
  std::lock_guard lock(mutex_);
  return latest_;
}

}  // namespace slidecore::device
