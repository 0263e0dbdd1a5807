#include "device/host_stream.h"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace slidecore::device {

void HostTask::run() const {
  switch (kind) {
    case Kind::copy:
      if (bytes != 0) std::memcpy(to, from, bytes);
      break;
    case Kind::wait:
      record->wait();
      break;
    case Kind::record:
      record->complete();
      break;
  }
}

HostStream::HostStream() : thread_([this] { work(); }) {}

HostStream::~HostStream() {
  close();
}

void HostStream::enqueue(HostTask task) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) throw std::runtime_error("the stream was destroyed");
    queue_.push_back(std::move(task));
  }
  queue_changed_.notify_one();
}

void HostStream::synchronize() {
  auto record = std::make_shared<HostRecord>();
  enqueue(HostTask::make_record(record));
  record->wait();
}

void HostStream::close() {
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
  }
  queue_changed_.notify_one();
  std::lock_guard lock(join_mutex_);
  if (thread_.joinable()) thread_.join();
}

void HostStream::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    queue_changed_.wait(lock, [this] { return closed_ || !queue_.empty(); });
    if (queue_.empty()) return;
    {
      const HostTask task = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      task.run();
    }
    lock.lock();
  }
}

}  // namespace slidecore::device
