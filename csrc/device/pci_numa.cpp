#include "device/pci_numa.h"

#include <cctype>
#include <fstream>

namespace slidecore::device {

int pci_numa_node(std::string pci_id) {
  for (char& c : pci_id) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  std::ifstream file("/sys/bus/pci/devices/" + pci_id + "/numa_node");
  int node = -1;
  return file >> node && node >= 0 ? node : -1;
}

}  // namespace slidecore::device
