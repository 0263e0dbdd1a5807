#include "slidecore/device.h"
#include "slidecore/status.h"

namespace slidecore {

const DeviceOps& cuda_ops() {
  throw Error(Code::unsupported, "the cuda backend is not built yet");
}

}  // namespace slidecore
