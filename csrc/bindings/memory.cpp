#include "slidecore/memory.h"

#include "bindings.h"
#include "slidecore/status.h"

namespace slidecore::bindings {
namespace {

// Memory that the host backend counts as the device's.
class DeviceBuffer {
 public:
  DeviceBuffer(std::shared_ptr<Device> device, std::size_t bytes) : device_(std::move(device)), bytes_(bytes) {
    if (!device_->is_host()) {
      throw Error(Code::unsupported, "DeviceBuffer is for the host backend; device memory belongs to the framework");
    }
    data_ = bytes > 0 ? device_->alloc(bytes) : nullptr;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) device_->free(data_);
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void* data() const { return data_; }
  std::size_t size() const { return bytes_; }

 private:
  std::shared_ptr<Device> device_;
  std::size_t bytes_;
  void* data_;
};

template <class Buffer>
py::buffer_info bytes_of(const Buffer& buffer) {
  static char nothing;  // a buffer of no bytes still needs an address
  void* data = buffer.data() != nullptr ? buffer.data() : &nothing;
  return py::buffer_info(static_cast<std::uint8_t*>(data), static_cast<py::ssize_t>(buffer.size()));
}

}  // namespace

void bind_memory(py::module_& m) {
  py::class_<HostBuffer, std::shared_ptr<HostBuffer>>(m, "HostBuffer", py::buffer_protocol())
      .def(py::init<std::shared_ptr<Device>, std::size_t, bool>(), py::arg("device"), py::arg("nbytes"),
           py::arg("pinned"), ReleaseGil())
      .def_property_readonly("address", [](const HostBuffer& b) { return address(b.data()); })
      .def_property_readonly("pinned", &HostBuffer::pinned)
      .def("__len__", &HostBuffer::size)
      .def_buffer([](HostBuffer& b) { return bytes_of(b); })
      .def_static("mapped_now", &HostBuffer::mapped_now)
      .def_static("mapped_peak", &HostBuffer::mapped_peak);
  py::class_<DeviceBuffer>(m, "DeviceBuffer", py::buffer_protocol())
      .def(py::init<std::shared_ptr<Device>, std::size_t>(), py::arg("device"), py::arg("nbytes"))
      .def_property_readonly("address", [](const DeviceBuffer& b) { return address(b.data()); })
      .def("__len__", &DeviceBuffer::size)
      .def_buffer([](DeviceBuffer& b) { return bytes_of(b); });
}

}  // namespace slidecore::bindings
