#pragma once
// What the binding files share. Each header of the core has one file here that binds it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "slidecore/optimizer.h"

namespace slidecore::bindings {

namespace py = pybind11;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// Addresses cross as integers: Python owns no device memory of ours and we own none of its tensors.
template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
inline std::uintptr_t address(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

// Throws Error(invalid_argument) unless exactly one form of the weights is given, and both moments. With scales these
// are 8-bit codes.
AdamWPlanes make_planes(std::uintptr_t weight, std::uintptr_t residual, std::uintptr_t weight32, std::uintptr_t exp_avg,
                        std::uintptr_t exp_avg_sq, std::uintptr_t exp_avg_scale, std::uintptr_t exp_avg_sq_scale);

void bind_status(py::module_& m);
void bind_device(py::module_& m);
void bind_memory(py::module_& m);
void bind_io(py::module_& m);
void bind_gpu_direct(py::module_& m);
void bind_optimizer(py::module_& m);
void bind_scheduler(py::module_& m);

}  // namespace slidecore::bindings
