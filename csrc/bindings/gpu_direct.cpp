#include "slidecore/gpu_direct.h"

#include "bindings.h"
#include "io_handles.h"

namespace slidecore::bindings {
namespace {

py::dict counters_of(const GpuDirect& direct) {
  const GpuDirect::Counters c = direct.counters();
  py::dict out;
  out["reads"] = c.reads;
  out["read_bytes"] = c.read_bytes;
  out["writes"] = c.writes;
  out["written_bytes"] = c.written_bytes;
  out["requests"] = c.requests;
  out["bounced_bytes"] = c.bounced_bytes;
  out["short_transfers"] = c.short_transfers;
  return out;
}

}  // namespace

void bind_gpu_direct(py::module_& m) {
  py::class_<CuFileFacts>(m, "CuFileFacts")
      .def_readonly("library", &CuFileFacts::library)
      .def_readonly("version", &CuFileFacts::version);
  m.def("inspect_cufile", &inspect_cufile, py::arg("paths"), ReleaseGil());
  py::class_<GpuDirectHandle>(m, "GpuDirect")
      .def(py::init(
               [](std::shared_ptr<Device> device, const StorageHandle& storage, const std::vector<std::string>& paths) {
                 return GpuDirectHandle("the cuFile path",
                                        std::make_shared<GpuDirect>(std::move(device), storage.shared(), paths));
               }),
           py::arg("device"), py::arg("storage"), py::arg("paths"), ReleaseGil())
      .def(
          "read",
          [](const GpuDirectHandle& g, const RegionPointer& region, std::uintptr_t memory, std::size_t bytes) {
            g.get().read(region, pointer<void>(memory), bytes);
          },
          py::arg("region"), py::arg("device_memory"), py::arg("nbytes"), ReleaseGil())
      .def(
          "write",
          [](const GpuDirectHandle& g, const RegionPointer& region, std::uintptr_t memory, std::size_t bytes) {
            g.get().write(region, pointer<const void>(memory), bytes);
          },
          py::arg("region"), py::arg("device_memory"), py::arg("nbytes"), ReleaseGil())
      .def_property_readonly("direct", [](const GpuDirectHandle& g) { return g.get().direct(); })
      .def("describe", [](const GpuDirectHandle& g) { return g.get().describe(); })
      .def("counters", [](const GpuDirectHandle& g) { return counters_of(g.get()); })
      .def("close", &GpuDirectHandle::close, ReleaseGil());
}

}  // namespace slidecore::bindings
