#pragma once

#include <string>

namespace slidecore::device {

// Memory node of a PCI device, e.g. "0000:3B:00.0" in either case, or -1 where the kernel does not say.
int pci_numa_node(std::string pci_id);

}  // namespace slidecore::device
