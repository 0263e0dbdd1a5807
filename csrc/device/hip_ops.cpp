#include "slidecore/device.h"
#include "slidecore/status.h"

namespace slidecore {

const DeviceOps& hip_ops() {
  throw Error(Code::unsupported, "the hip backend is not built yet");
}

}  // namespace slidecore
