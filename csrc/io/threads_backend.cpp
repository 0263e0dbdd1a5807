// pread and pwrite by as many threads for each drive as requests may be in flight.

#include <pthread.h>

#include <system_error>
#include <thread>
#include <vector>

#include "io/backend.h"
#include "slidecore/status.h"

namespace slidecore::io {
namespace {

class ThreadsBackend final : public Backend {
 public:
  ThreadsBackend(const Storage::Impl& storage, WorkQueue& queue, const BackendSettings& settings)
      : storage_(storage), queue_(queue), settings_(settings) {
    try {
      for (std::uint32_t drive = 0; drive < storage.files.size(); ++drive) {
        for (std::size_t i = 0; i < settings.queue_depth; ++i) threads_.emplace_back([this, drive] { work(drive); });
      }
    } catch (const std::system_error& error) {
      queue_.stop();
      threads_.clear();
      throw Error(Code::out_of_memory, "starting " + std::to_string(storage.files.size() * settings.queue_depth) +
                                           " threads for file transfers failed: " + error.what());
    }
  }

  std::string describe() const override { return std::to_string(threads_.size()) + " threads with pread and pwrite"; }

 private:
  void work(std::uint32_t drive) {
    pthread_setname_np(pthread_self(), "slidecore-io");
    Execution execution(storage_, settings_.patience_s);
    while (const auto piece = queue_.take(drive)) {
      try {
        transfer(*piece, execution);
      } catch (...) {
        queue_.failed(*piece, std::current_exception());
        continue;
      }
      queue_.finished(*piece, execution);
    }
  }

  void transfer(const Piece& piece, Execution& execution) {
    SystemCalls& calls = *storage_.calls;
    const int fd = storage_.files[piece.drive]->fd();
    execution.begin(piece);
    for (;;) {
      const Request request = execution.request();
      const long result = request.write ? calls.pwrite(fd, request.memory, request.bytes, request.offset)
                                        : calls.pread(fd, request.memory, request.bytes, request.offset);
      const Execution::Next next = execution.complete(result);
      if (next == Execution::Next::done) return;
      if (queue_.abandoned()) throw Error(Code::state, "the transfers are closed");
      if (next == Execution::Next::request_later) std::this_thread::sleep_for(execution.delay());
    }
  }

  const Storage::Impl& storage_;
  WorkQueue& queue_;
  const BackendSettings settings_;
  std::vector<std::jthread> threads_;
};

}  // namespace

std::unique_ptr<Backend> make_threads_backend(const Storage::Impl& storage, WorkQueue& queue,
                                              const BackendSettings& settings) {
  return std::make_unique<ThreadsBackend>(storage, queue, settings);
}

}  // namespace slidecore::io
