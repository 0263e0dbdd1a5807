#pragma once
// The planes of a chunk's update that lie on disk, as parts that are staged piece by piece.

#include <cstddef>
#include <string>
#include <vector>

#include "scheduler/staging.h"
#include "slidecore/adamw_sink.h"
#include "slidecore/optimizer.h"

namespace slidecore {

// Throws Error(invalid_argument), beginning with `label`, unless each plane that the update of n elements needs is
// given once, in memory or on disk.
void check_places(const std::string& label, const AdamWPlanes& planes, const AdamWRegions& regions, std::size_t n);

bool any_on_disk(const AdamWRegions& regions);

// Of the elements [first, first + count), one part for each plane on disk.
std::vector<StagedPart> parts_on_disk(const AdamWRegions& regions, std::size_t first, std::size_t count);

// `planes`, with the parts' `places` in memory in the place of what is on disk. To be used for those elements only.
AdamWPlanes with_staged(AdamWPlanes planes, const AdamWRegions& regions, const std::vector<char*>& places,
                        std::size_t first);

// The most that the parts of `elements` elements take.
std::size_t most_staged_bytes(std::size_t elements);

}  // namespace slidecore
