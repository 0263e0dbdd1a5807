#include "bindings.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native core of slidecore. Addresses, streams and events are integers; blocking calls release the GIL.";
  slidecore::bindings::bind_status(m);
  slidecore::bindings::bind_device(m);
  slidecore::bindings::bind_memory(m);
  slidecore::bindings::bind_io(m);
  slidecore::bindings::bind_gpu_direct(m);
  slidecore::bindings::bind_optimizer(m);
  slidecore::bindings::bind_scheduler(m);
}
