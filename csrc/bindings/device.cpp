#include "slidecore/device.h"

#include "bindings.h"

namespace slidecore::bindings {

void bind_device(py::module_& m) {
  py::class_<Device, std::shared_ptr<Device>>(m, "Device")
      .def(py::init<const std::string&, int>(), py::arg("backend"), py::arg("ordinal") = 0)
      .def_property_readonly("backend", [](const Device& d) { return std::string(d.ops().name); })
      .def_property_readonly("ordinal", &Device::ordinal)
      .def_property_readonly("name", [](const Device& d) { return std::string(d.info().name); })
      .def_property_readonly("total_bytes", [](const Device& d) { return d.info().total_bytes; })
      .def_property_readonly("numa_node", [](const Device& d) { return d.info().numa_node; })
      .def_property_readonly("is_host", &Device::is_host)
      .def_property_readonly("needs_pinning", &Device::needs_pinning)
      .def_property_readonly("memory_in_use", [](const Device& d) { return d.memory_in_use().now; })
      .def_property_readonly("memory_peak", [](const Device& d) { return d.memory_in_use().peak; })
      .def(
          "alloc",
          [](const Device& d, std::size_t n) {
            d.bind_thread();
            return address(d.alloc(n));
          },
          py::arg("nbytes"), ReleaseGil())
      .def(
          "free",
          [](const Device& d, std::uintptr_t p) {
            d.bind_thread();
            d.free(pointer<void>(p));
          },
          py::arg("address"), ReleaseGil())
      .def(
          "create_stream",
          [](const Device& d) {
            d.bind_thread();
            return d.create_stream();
          },
          ReleaseGil())
      .def(
          "destroy_stream",
          [](const Device& d, StreamHandle s) {
            d.bind_thread();
            d.destroy_stream(s);
          },
          py::arg("stream"), ReleaseGil())
      .def(
          "synchronize",
          [](const Device& d, StreamHandle s) {
            d.bind_thread();
            d.synchronize(s);
          },
          py::arg("stream"), ReleaseGil())
      .def(
          "wait",
          [](const Device& d, StreamHandle s, EventHandle e) {
            d.bind_thread();
            d.wait(s, e);
          },
          py::arg("stream"), py::arg("event"), ReleaseGil())
      .def(
          "create_event",
          [](const Device& d, bool timing) {
            d.bind_thread();
            return d.create_event(timing);
          },
          py::arg("timing") = false, ReleaseGil())
      .def(
          "destroy_event",
          [](const Device& d, EventHandle e) {
            d.bind_thread();
            d.destroy_event(e);
          },
          py::arg("event"), ReleaseGil())
      .def(
          "record",
          [](const Device& d, EventHandle e, StreamHandle s) {
            d.bind_thread();
            d.record(e, s);
          },
          py::arg("event"), py::arg("stream"), ReleaseGil())
      .def(
          "done",
          [](const Device& d, EventHandle e) {
            d.bind_thread();
            return d.done(e);
          },
          py::arg("event"), ReleaseGil())
      .def(
          "synchronize_event",
          [](const Device& d, EventHandle e) {
            d.bind_thread();
            d.synchronize_event(e);
          },
          py::arg("event"), ReleaseGil())
      .def(
          "elapsed_ms",
          [](const Device& d, EventHandle a, EventHandle b) {
            d.bind_thread();
            return d.elapsed_ms(a, b);
          },
          py::arg("start"), py::arg("end"), ReleaseGil())
      .def(
          "to_device",
          [](const Device& d, std::uintptr_t device, std::uintptr_t host, std::size_t n, StreamHandle s) {
            d.bind_thread();
            d.to_device(pointer<void>(device), pointer<void>(host), n, s);
          },
          py::arg("device"), py::arg("host"), py::arg("nbytes"), py::arg("stream"), ReleaseGil())
      .def(
          "to_host",
          [](const Device& d, std::uintptr_t host, std::uintptr_t device, std::size_t n, StreamHandle s) {
            d.bind_thread();
            d.to_host(pointer<void>(host), pointer<void>(device), n, s);
          },
          py::arg("host"), py::arg("device"), py::arg("nbytes"), py::arg("stream"), ReleaseGil());
}

}  // namespace slidecore::bindings
