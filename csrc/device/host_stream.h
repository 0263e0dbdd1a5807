#pragma once
// A stream of the host backend: one worker thread and its ordered queue.

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "device/host_event.h"

namespace slidecore::device {

struct HostTask {
  enum class Kind { copy, wait, record };

  static HostTask make_copy(void* to, const void* from, std::size_t bytes) {
    return {Kind::copy, to, from, bytes, nullptr};
  }
  static HostTask make_wait(std::shared_ptr<HostRecord> record) {
    return {Kind::wait, nullptr, nullptr, 0, std::move(record)};
  }
  static HostTask make_record(std::shared_ptr<HostRecord> record) {
    return {Kind::record, nullptr, nullptr, 0, std::move(record)};
  }

  void run() const;

  Kind kind;
  void* to;
  const void* from;
  std::size_t bytes;
  std::shared_ptr<HostRecord> record;
};

class HostStream {
 public:
  HostStream();
  ~HostStream();  // runs what is queued, then ends the thread
  HostStream(const HostStream&) = delete;
  HostStream& operator=(const HostStream&) = delete;

  void enqueue(HostTask task);  // throws std::runtime_error after close()
  void synchronize();
  void close();  // drains; later enqueues fail

 private:
  void work();

  std::mutex mutex_;
  std::condition_variable queue_changed_;
  std::deque<HostTask> queue_;
  bool closed_ = false;
  std::mutex join_mutex_;
  std::thread thread_;  // last: it starts when all above exist
};

}  // namespace slidecore::device
