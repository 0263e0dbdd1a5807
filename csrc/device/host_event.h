#pragma once
// Events of the host backend. Each record() makes a new HostRecord and whoever waits holds the one that was the
// latest when it asked: a later record of the same event, or its destruction, cannot touch an earlier wait.

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

namespace slidecore::device {

class HostStream;

class HostRecord {
 public:
  using Time = std::chrono::steady_clock::time_point;

  void complete();  // called once, by the stream that reached it
  void wait();
  bool done();
  Time time();  // valid once done

 private:
  std::mutex mutex_;
  std::condition_variable completed_;
  bool done_ = false;
  Time time_{};
};

class HostEvent {
 public:
  explicit HostEvent(bool timing) : timing_(timing) {}
  bool timing() const { return timing_; }

  void record(HostStream* stream);       // nullptr: the calling thread, which has done everything before
  std::shared_ptr<HostRecord> latest();  // nullptr: never recorded, which counts as done

 private:
  const bool timing_;
  std::mutex mutex_;
  std::shared_ptr<HostRecord> latest_;
};

}  // namespace slidecore::device
