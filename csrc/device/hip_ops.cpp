#include "device/driver_ops.h"
#include "device/hip_symbols.h"
#include "device/pci_numa.h"
#include "slidecore/device.h"

namespace slidecore {
namespace device {
namespace {

struct HipApi {
  using Symbols = hip::Symbols;
  using Pointer = hip::Pointer;
  using Stream = hip::Stream;
  using Event = hip::Event;
  using Current = int;  // HIP has no contexts to speak of: a thread has a current device, and 0 to begin with

  static constexpr const char* kName = "hip";
  static constexpr unsigned kStreamNonBlocking = hip::kStreamNonBlocking;
  static constexpr unsigned kEventBlockingSync = hip::kEventBlockingSync;
  static constexpr unsigned kEventDisableTiming = hip::kEventDisableTiming;
  static constexpr unsigned kHostRegisterPortable = hip::kHostRegisterPortable;

  static Symbols load() {
    DriverLibrary library({"the HIP library",
                           "SLIDECORE_HIP_LIBRARY",
                           "libamdhip64.so",
                           {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"}});
    Symbols symbols;
#define SLIDECORE_FIND(role, symbol, ...) library.find(symbols.role);
    SLIDECORE_HIP_SYMBOLS(SLIDECORE_FIND)
#undef SLIDECORE_FIND
    library.keep();
    return symbols;
  }

  // Loaded once, by whichever thread comes first. If load() throws, the next call tries again.
  static const Symbols& symbols() {
    static const Symbols loaded = load();
    return loaded;
  }

  static const char* error_name(int code) {
    const char* name = symbols().error_name.pointer(code);
    return name != nullptr ? name : "unknown error";
  }
  static const char* error_string(int code) {
    const char* text = symbols().error_string.pointer(code);
    return text != nullptr ? text : "no description";
  }
  // HIP remembers a thread's last failure, even "not ready", and the framework would take it for its own.
  static void clear_error() { static_cast<void>(symbols().error_clear.pointer()); }

  static int get_current(Current* current) { return call<HipApi>(symbols().current_get, current); }
  static int set_current(Current current) { return call<HipApi>(symbols().current_set, current); }

  static int open(int ordinal, Current* current) {
    hip::Device device = 0;
    *current = ordinal;
    return call<HipApi>(symbols().device_get, &device, ordinal);  // checks the ordinal
  }

  static int describe(int ordinal, DeviceInfo* info) {
    hip::Device device = 0;
    if (const int code = call<HipApi>(symbols().device_get, &device, ordinal); code != kSuccess) return code;
    const int named = call<HipApi>(symbols().device_name, info->name, int{sizeof(info->name)}, device);
    if (named != kSuccess) return named;
    std::size_t bytes = 0;
    if (const int code = call<HipApi>(symbols().device_total_memory, &bytes, device); code != kSuccess) return code;
    info->total_bytes = bytes;
    info->numa_node = numa_node(ordinal);
    return kSuccess;
  }

  static int numa_node(int ordinal) {
    char pci_id[32] = "";
    if (symbols().device_pci_id.pointer(pci_id, sizeof(pci_id), ordinal) != kSuccess) {
      clear_error();
      return -1;
    }
    return pci_numa_node(pci_id);
  }

  static Pointer to_api(void* pointer) { return pointer; }
  static void* from_api(Pointer pointer) { return pointer; }
};

constexpr DeviceOps kHipOps = DriverOps<HipApi>::table();

}  // namespace
}  // namespace device

const DeviceOps& hip_ops() {
  static_cast<void>(device::HipApi::symbols());  // throws here, so that the table's functions need not
  return device::kHipOps;
}

}  // namespace slidecore
