#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <memory>
#include <thread>

#include "optimizer/cpu_quota.h"
#include "slidecore/optimizer.h"

namespace slidecore {
namespace {

int affinity_cpus() {
  // The kernel refuses a set smaller than its own, whose size it does not tell.
  for (std::size_t cpus = CPU_SETSIZE; cpus <= (std::size_t{1} << 20); cpus *= 2) {
    const std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> set(CPU_ALLOC(cpus), [](cpu_set_t* s) { CPU_FREE(s); });
    if (set == nullptr) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(cpus);
    if (::sched_getaffinity(0, bytes, set.get()) == 0) return std::max(1, CPU_COUNT_S(bytes, set.get()));
    if (errno != EINVAL) break;
  }
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

int usable_cpus() {
  const int cpus = affinity_cpus();
  const double quota = std::ceil(cgroup_cpu_quota(""));  // 1.5 CPUs' worth of time keeps 2 threads busy
  return quota < cpus ? std::max(1, static_cast<int>(quota)) : cpus;
}

}  // namespace slidecore
