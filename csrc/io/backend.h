#pragma once
// How requests reach the kernel. A backend takes pieces from the queue with threads of its own.

#include <cstddef>
#include <memory>
#include <string>

#include "io/storage_impl.h"
#include "io/work_queue.h"

namespace slidecore::io {

struct BackendSettings {
  std::size_t queue_depth;
  double patience_s;
};

// Destroyed after the queue was stopped; returns when nothing is in the kernel's hands any more.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string describe() const = 0;  // its features, as parts of a sentence
  virtual bool register_memory(void*, std::size_t) { return false; }
  virtual void unregister_memory(void*) {}
};

inline constexpr std::size_t kThreadsDepth = 8, kUringDepth = 16, kMostRequests = 4096;

// Throws Error(out_of_memory) if the threads cannot be started.
std::unique_ptr<Backend> make_threads_backend(const Storage::Impl& storage, WorkQueue& queue,
                                              const BackendSettings& settings);
// Throws Error(unsupported) with the reason, where io_uring cannot be used.
std::unique_ptr<Backend> make_uring_backend(const Storage::Impl& storage, WorkQueue& queue,
                                            const BackendSettings& settings);

}  // namespace slidecore::io
