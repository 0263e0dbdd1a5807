#pragma once

#include <string>

namespace slidecore {

// CPUs' worth of time per period that the control groups (v1 and v2) grant this process, the tightest of the
// group and its ancestors; infinity where none is set or nothing can be read. `root` is "" but in tests, where it
// is a directory that holds a made-up proc/self/{cgroup,mountinfo} and the mounts they name.
double cgroup_cpu_quota(const std::string& root);

}  // namespace slidecore
