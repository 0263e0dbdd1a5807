#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include "slidecore/optimizer.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

constexpr int max_threads = 4096;
constexpr std::chrono::microseconds spin_time{30};

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

int default_threads() {
  const char* text = std::getenv("SLIDECORE_THREADS");
  if (text == nullptr || *text == '\0') return std::max(1, usable_cpus() - 1);
  char* end = nullptr;
  errno = 0;
  const long value = std::strtol(text, &end, 10);
  if (errno != 0 || *end != '\0' || value < 1 || value > max_threads) {
    throw Error(Code::invalid_argument, std::string("SLIDECORE_THREADS is '") + text +
                                            "', must be a whole number from 1 to " + std::to_string(max_threads));
  }
  return static_cast<int>(value);
}

// The pool whose work this thread is doing: a run() inside a body has no free worker to wait for.
thread_local const void* current_pool = nullptr;

class CurrentPool {
 public:
  explicit CurrentPool(const void* pool) : previous_(current_pool) { current_pool = pool; }
  ~CurrentPool() { current_pool = previous_; }
  CurrentPool(const CurrentPool&) = delete;
  CurrentPool& operator=(const CurrentPool&) = delete;

 private:
  const void* previous_;
};

}  // namespace

// A job lives on run()'s stack frame. A worker may touch it only between entering (under the mutex, while the job
// is open) and leaving; run() closes the job when no block is left and returns when the last one has left, so it
// never waits for a worker that has not woken up yet.
struct ThreadPool::Impl {
  struct Job {
    const std::function<void(std::size_t, std::size_t)>& body;
    std::size_t n;
    std::size_t block;
    std::size_t blocks;
    std::atomic<std::size_t> next{0};
    std::atomic<std::size_t> inside{0};  // changed under the mutex
    std::exception_ptr error;            // guarded by the mutex
  };

  explicit Impl(int count) : owner(::getpid()), spin(usable_cpus() > 2) {
    try {
      for (int i = 1; i < count; ++i) workers.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      stop_workers();
      throw Error(Code::state, "thread pool: cannot start thread " + std::to_string(workers.size() + 2) + " of " +
                                   std::to_string(count) + ": " + error.what());
    }
  }

  void stop_workers() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
      generation.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    for (std::thread& worker : workers) worker.join();
  }

  template <typename Condition>
  void spin_until(const Condition& condition) const {
    if (!spin) return;
    const auto end = std::chrono::steady_clock::now() + spin_time;
    while (!condition() && std::chrono::steady_clock::now() < end) {
      for (int i = 0; i < 16; ++i) pause();
    }
  }

  void do_blocks(Job& job) {
    const CurrentPool current(this);
    try {
      for (;;) {
        const std::size_t index = job.next.fetch_add(1, std::memory_order_relaxed);
        if (index >= job.blocks) return;
        const std::size_t begin = index * job.block;
        job.body(begin, begin + std::min(job.block, job.n - begin));
      }
    } catch (...) {
      job.next.store(job.blocks, std::memory_order_relaxed);  // the others take no further block
      const std::lock_guard lock(mutex);
      if (!job.error) job.error = std::current_exception();
    }
  }

  void work() {
    ::pthread_setname_np(::pthread_self(), "slidecore-pool");
    std::uint64_t seen = 0;
    for (;;) {
      spin_until([&] { return generation.load(std::memory_order_acquire) != seen; });
      Job* job = nullptr;
      {
        std::unique_lock lock(mutex);
        wake.wait(lock, [&] { return generation.load(std::memory_order_relaxed) != seen; });
        if (stop) return;
        seen = generation.load(std::memory_order_relaxed);
        if (open == nullptr) continue;
        job = open;
        job->inside.fetch_add(1, std::memory_order_relaxed);
      }
      do_blocks(*job);
      {
        const std::lock_guard lock(mutex);
        // Notified under the mutex: after it is released, run() may return and the pool may be destroyed.
        if (job->inside.fetch_sub(1, std::memory_order_release) == 1) left.notify_one();
      }
    }
  }

  void run(Job& job) {
    const std::lock_guard one_at_a_time(running);
    {
      const std::lock_guard lock(mutex);
      open = &job;
      generation.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    do_blocks(job);
    {
      const std::lock_guard lock(mutex);
      open = nullptr;
    }
    spin_until([&] { return job.inside.load(std::memory_order_acquire) == 0; });
    std::unique_lock lock(mutex);
    left.wait(lock, [&] { return job.inside.load(std::memory_order_relaxed) == 0; });
    if (job.error) std::rethrow_exception(job.error);
  }

  const pid_t owner;
  const bool spin;
  std::mutex running;
  std::mutex mutex;
  std::condition_variable wake;
  std::condition_variable left;
  std::atomic<std::uint64_t> generation{0};  // changed under the mutex
  Job* open = nullptr;                       // guarded by the mutex
  bool stop = false;                         // guarded by the mutex
  std::vector<std::thread> workers;
};

ThreadPool::ThreadPool(int threads) {
  if (threads < 0 || threads > max_threads) {
    throw Error(Code::invalid_argument, "thread pool: threads is " + std::to_string(threads) + ", must be from 1 to " +
                                            std::to_string(max_threads) +
                                            ", or 0 for as many as the usable CPUs suggest");
  }
  impl_ = std::make_unique<Impl>(threads == 0 ? default_threads() : threads);
}

ThreadPool::~ThreadPool() {
  if (impl_->owner == ::getpid()) {
    impl_->stop_workers();
  } else {
    // A forked child has a copy of the pool but none of its threads: there is nothing to join, and the copied
    // mutexes may be held by threads that do not exist here.
    static_cast<void>(impl_.release());
  }
}

int ThreadPool::threads() const {
  return static_cast<int>(impl_->workers.size()) + 1;
}

void ThreadPool::run(std::size_t n, std::size_t block, const std::function<void(std::size_t, std::size_t)>& body) {
  if (block == 0) throw Error(Code::invalid_argument, "thread pool: the block size is 0");
  if (n == 0) return;
  const std::size_t blocks = n / block + (n % block != 0);
  if (blocks == 1 || impl_->workers.empty() || current_pool == impl_.get() || impl_->owner != ::getpid()) {
    for (std::size_t i = 0; i < blocks; ++i) body(i * block, i * block + std::min(block, n - i * block));
    return;
  }
  Impl::Job job{.body = body, .n = n, .block = block, .blocks = blocks, .error = {}};
  impl_->run(job);
}

}  // namespace slidecore
