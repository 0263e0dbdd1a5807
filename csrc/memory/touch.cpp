#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "memory/mapping.h"
#include "slidecore/status.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace slidecore::memory {
namespace {

constexpr std::size_t kLeastBlock = std::size_t{64} << 20;
constexpr std::size_t kMaxThreads = 16;  // zeroing is bound by memory bandwidth well before that

std::size_t usable_threads() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0) return static_cast<std::size_t>(CPU_COUNT(&cpus));
  return std::max(1u, std::thread::hardware_concurrency());
}

void touch_pages(char* data, std::size_t size) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (std::size_t at = 0; at < size; at += page) static_cast<volatile char*>(data)[at] = 0;
}

// Returns 0 or an errno.
int populate(char* data, std::size_t size) {
  for (;;) {
    if (madvise(data, size, MADV_POPULATE_WRITE) == 0) return 0;
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno != EINVAL && errno != ENOSYS) return errno;
    touch_pages(data, size);  // an older kernel
    return 0;
  }
}

}  // namespace

void touch(void* data, std::size_t size) {
  // Threads that meet in one huge page would each have the kernel zero one, of which it keeps the first.
  const std::size_t block_bytes = std::max(kLeastBlock, huge_page_size());
  const std::size_t blocks = (size + block_bytes - 1) / block_bytes;
  std::atomic<std::size_t> next{0};
  std::atomic<int> failed{0};
  const auto work = [&] {
    for (std::size_t block = next.fetch_add(1); block < blocks && failed.load() == 0; block = next.fetch_add(1)) {
      const std::size_t begin = block * block_bytes;
      const int code = populate(static_cast<char*>(data) + begin, std::min(block_bytes, size - begin));
      if (code != 0) failed.store(code);
    }
  };

  std::vector<std::jthread> threads;  // joined before what they refer to goes
  const std::size_t helpers = std::min({usable_threads(), kMaxThreads, blocks});
  try {
    for (std::size_t i = 1; i < helpers; ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started and this one do it.
  }
  work();
  threads.clear();

  if (const int code = failed.load(); code != 0) {
    throw Error(Code::out_of_memory, "providing " + std::to_string(size) +
                                         " bytes of host memory failed: " + std::generic_category().message(code));
  }
}

}  // namespace slidecore::memory
