#include "device/cuda_symbols.h"
#include "device/driver_ops.h"
#include "device/pci_numa.h"
#include "slidecore/device.h"

namespace slidecore {
namespace device {
namespace {

struct CudaApi {
  using Symbols = cuda::Symbols;
  using Pointer = cuda::Pointer;
  using Stream = cuda::Stream;
  using Event = cuda::Event;
  using Current = cuda::Context;

  static constexpr const char* kName = "cuda";
  static constexpr unsigned kStreamNonBlocking = cuda::kStreamNonBlocking;
  static constexpr unsigned kEventBlockingSync = cuda::kEventBlockingSync;
  static constexpr unsigned kEventDisableTiming = cuda::kEventDisableTiming;
  static constexpr unsigned kHostRegisterPortable = cuda::kHostRegisterPortable;

  static Symbols load() {
    DriverLibrary library({"the CUDA driver", "SLIDECORE_CUDA_LIBRARY", nullptr, {"libcuda.so.1"}});
    Symbols symbols;
#define SLIDECORE_FIND(role, symbol, ...) library.find(symbols.role);
    SLIDECORE_CUDA_SYMBOLS(SLIDECORE_FIND)
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
    const char* name = nullptr;
    return symbols().error_name.pointer(code, &name) == kSuccess && name != nullptr ? name : "unknown error";
  }
  static const char* error_string(int code) {
    const char* text = nullptr;
    return symbols().error_string.pointer(code, &text) == kSuccess && text != nullptr ? text : "no description";
  }
  static void clear_error() {}  // the driver interface keeps no last error

  static int get_current(Current* current) { return call<CudaApi>(symbols().context_get, current); }
  static int set_current(Current current) { return call<CudaApi>(symbols().context_set, current); }

  // The primary context is the one that the framework's runtime library uses as well. It is retained here and never
  // released: the count is shared by the whole process, and if ours were the last one (a framework that only
  // adopted the current context, or has been shut down already), releasing it would destroy every allocation and
  // stream in it while others still hold them. The price is that the context stays until the process ends.
  static int open(int ordinal, Current* current) {
    cuda::Device device = 0;
    if (const int code = call<CudaApi>(symbols().device_get, &device, ordinal); code != kSuccess) return code;
    return call<CudaApi>(symbols().context_retain, current, device);
  }

  static int describe(int ordinal, DeviceInfo* info) {
    cuda::Device device = 0;
    if (const int code = call<CudaApi>(symbols().device_get, &device, ordinal); code != kSuccess) return code;
    const int named = call<CudaApi>(symbols().device_name, info->name, int{sizeof(info->name)}, device);
    if (named != kSuccess) return named;
    std::size_t bytes = 0;
    if (const int code = call<CudaApi>(symbols().device_total_memory, &bytes, device); code != kSuccess) return code;
    info->total_bytes = bytes;
    info->numa_node = numa_node(device);
    return kSuccess;
  }

  // Placement is a preference: where neither the driver (before CUDA 12.2) nor the kernel knows, -1 will do.
  static int numa_node(cuda::Device device) {
    int node = -1;
    if (symbols().device_attribute.pointer(&node, cuda::kAttributeHostNumaId, device) == kSuccess && node >= 0) {
      return node;
    }
    char pci_id[32] = "";
    if (symbols().device_pci_id.pointer(pci_id, sizeof(pci_id), device) != kSuccess) return -1;
    return pci_numa_node(pci_id);
  }

  static Pointer to_api(void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }
  static void* from_api(Pointer pointer) { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(pointer)); }
};

constexpr DeviceOps kCudaOps = DriverOps<CudaApi>::table();

}  // namespace
}  // namespace device

const DeviceOps& cuda_ops() {
  static_cast<void>(device::CudaApi::symbols());  // throws here, so that the table's functions need not
  return device::kCudaOps;
}

}  // namespace slidecore
