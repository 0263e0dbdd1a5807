#include "scheduler/disk_planes.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "optimizer/adamw_block.h"
#include "slidecore/status.h"

namespace slidecore {
namespace {

// Calls each(plane, region, name, elements that share one of the plane's) for every kind of plane.
template <class Planes, class Regions, class Each>
void for_each_plane(Planes& planes, Regions& regions, const Each& each) {
  each(planes.weight, regions.weight, "weight", std::size_t{1});
  each(planes.residual, regions.residual, "residual", std::size_t{1});
  each(planes.weight32, regions.weight32, "weight32", std::size_t{1});
  each(planes.exp_avg, regions.exp_avg, "exp_avg", std::size_t{1});
  each(planes.exp_avg_sq, regions.exp_avg_sq, "exp_avg_sq", std::size_t{1});
  each(planes.exp_avg8, regions.exp_avg8, "exp_avg8", std::size_t{1});
  each(planes.exp_avg_sq8, regions.exp_avg_sq8, "exp_avg_sq8", std::size_t{1});
  each(planes.exp_avg_scale, regions.exp_avg_scale, "exp_avg_scale", moments_group);
  each(planes.exp_avg_sq_scale, regions.exp_avg_sq_scale, "exp_avg_sq_scale", moments_group);
}

constexpr std::size_t kPage = 4096;
constexpr std::size_t kPlanes = 6;  // that an update has at once, at most

}  // namespace

void check_places(const std::string& label, const AdamWPlanes& planes, const AdamWRegions& regions, std::size_t n) {
  AdamWPlanes all = planes;
  for_each_plane(all, regions, [&](auto& plane, const auto& region, const char* name, std::size_t group) {
    if (region == nullptr) return;
    using Element = std::remove_pointer_t<std::remove_reference_t<decltype(plane)>>;
    if (plane != nullptr) {
      throw Error(Code::invalid_argument, label + ": the plane " + name + " is given in memory and on disk");
    }
    const std::size_t needed = (n + group - 1) / group * sizeof(Element);
    if (region->size() < needed) {
      throw Error(Code::invalid_argument, label + ": the plane " + name + " of " + std::to_string(needed) +
                                              " bytes does not fit in the region '" + region->name() + "' of " +
                                              std::to_string(region->size()));
    }
    plane = reinterpret_cast<Element*>(kPage);  // stands for memory, in the check only
  });
  check_planes(all, n);
}

bool any_on_disk(const AdamWRegions& regions) {
  bool any = false;
  const AdamWPlanes none;
  for_each_plane(none, regions,
                 [&](const auto&, const auto& region, const char*, std::size_t) { any = any || region != nullptr; });
  return any;
}

std::vector<StagedPart> parts_on_disk(const AdamWRegions& regions, std::size_t first, std::size_t count) {
  std::vector<StagedPart> parts;
  const AdamWPlanes none;
  for_each_plane(none, regions, [&](const auto& plane, const auto& region, const char*, std::size_t group) {
    if (region == nullptr) return;
    parts.push_back({region, first / group * sizeof(*plane), (count + group - 1) / group * sizeof(*plane)});
  });
  return parts;
}

AdamWPlanes with_staged(AdamWPlanes planes, const AdamWRegions& regions, const std::vector<char*>& places,
                        std::size_t first) {
  std::size_t next = 0;
  for_each_plane(planes, regions, [&](auto& plane, const auto& region, const char*, std::size_t group) {
    if (region == nullptr) return;
    // Of the chunk's first element, wherever that would be.
    const std::size_t before = first / group * sizeof(*plane);
    plane = reinterpret_cast<std::remove_reference_t<decltype(plane)>>(
        reinterpret_cast<std::uintptr_t>(places[next++]) - before);
  });
  return planes;
}

std::size_t most_staged_bytes(std::size_t elements) {
  // float32 moments beside weight and residual, or beside float32 weights; 8-bit moments take less.
  return elements * 12 + kPlanes * kPage;
}

}  // namespace slidecore
