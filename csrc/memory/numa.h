#pragma once
// Placement on machines with several memory nodes, through the raw system call: libnuma is not needed.

#include <cstddef>
#include <string>

namespace slidecore::memory {

// Number of nodes in a kernel list such as "0-1,4"; 0 if it is malformed.
int count_nodes(const std::string& list);

// Asks for pages of `node` before they are touched. A preference only: planes may exceed one node, and where the
// call is not permitted (some containers) or the node is not ours, pages come from wherever the kernel likes.
// Does nothing on machines with one node or for node -1. Returns whether a preference was set.
bool prefer_node(void* data, std::size_t size, int node);

}  // namespace slidecore::memory
