#include "optimizer/cpu_quota.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace slidecore {
namespace {

constexpr double unlimited = std::numeric_limits<double>::infinity();

struct Mount {
  std::string group;  // the group that is visible at `point`
  std::string point;
};

bool listed(const std::string& list, const std::string& word) {
  return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

// v2: the cgroup2 mount; v1: the one whose options name the cpu controller.
std::vector<Mount> mounts(const std::string& root, bool v2) {
  std::vector<Mount> found;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string id, parent, device, field, type, source, options;
    Mount mount;
    fields >> id >> parent >> device >> mount.group >> mount.point;
    while (fields >> field && field != "-") {
    }
    fields >> type >> source >> options;
    if (v2 ? type == "cgroup2" : (type == "cgroup" && listed(options, "cpu"))) found.push_back(mount);
  }
  return found;
}

double read_quota(const std::string& directory, bool v2) {
  double quota = 0, period = 0;
  if (v2) {
    std::ifstream file(directory + "/cpu.max");  // "max 100000" where there is no limit: no number, no quota
    if (!(file >> quota >> period)) return unlimited;
  } else {
    std::ifstream quota_file(directory + "/cpu.cfs_quota_us"), period_file(directory + "/cpu.cfs_period_us");
    if (!(quota_file >> quota) || !(period_file >> period)) return unlimited;
  }
  return quota > 0 && period > 0 ? quota / period : unlimited;
}

double tightest(const Mount& mount, const std::string& root, std::string group, bool v2) {
  // In a container the mount may show only part of the tree, or the group may have no place under it.
  if (mount.group != "/") {
    const bool below = group == mount.group || group.rfind(mount.group + "/", 0) == 0;
    group = below ? group.substr(mount.group.size()) : "";
  }
  while (!group.empty() && group.back() == '/') group.pop_back();
  double quota = read_quota(root + mount.point, v2);
  while (!group.empty()) {
    quota = std::min(quota, read_quota(root + mount.point + group, v2));
    group.resize(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
  }
  return quota;
}

}  // namespace

double cgroup_cpu_quota(const std::string& root) {
  double quota = unlimited;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // "hierarchy:controllers:group"; v2 has "0::group"
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && !listed(controllers, "cpu")) continue;
    for (const Mount& mount : mounts(root, v2)) {
      quota = std::min(quota, tightest(mount, root, line.substr(second + 1), v2));
    }
  }
  return quota;
}

}  // namespace slidecore
