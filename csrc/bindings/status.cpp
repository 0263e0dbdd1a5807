#include "slidecore/status.h"

#include "bindings.h"

namespace slidecore::bindings {
namespace {

// Python classes, one for each Code; kept alive by the module for the life of the process.
PyObject* classes[6];

PyObject* make_class(py::module_& m, const char* name, PyObject* error, PyObject* builtin) {
  py::tuple bases = py::make_tuple(py::handle(error));
  if (builtin != nullptr) bases = py::make_tuple(py::handle(error), py::handle(builtin));
  const std::string qualified = std::string("slidecore._core.") + name;
  PyObject* made = PyErr_NewException(qualified.c_str(), bases.ptr(), nullptr);
  if (made == nullptr) throw py::error_already_set();
  m.add_object(name, py::reinterpret_borrow<py::object>(made));
  return made;
}

}  // namespace

void bind_status(py::module_& m) {
  PyObject* error = PyErr_NewException("slidecore._core.Error", PyExc_RuntimeError, nullptr);
  if (error == nullptr) throw py::error_already_set();
  m.add_object("Error", py::reinterpret_borrow<py::object>(error));
  classes[static_cast<int>(Code::invalid_argument)] = make_class(m, "InvalidArgumentError", error, PyExc_ValueError);
  classes[static_cast<int>(Code::out_of_memory)] = make_class(m, "OutOfMemoryError", error, PyExc_MemoryError);
  classes[static_cast<int>(Code::device)] = make_class(m, "DeviceError", error, nullptr);
  classes[static_cast<int>(Code::io)] = make_class(m, "IoError", error, PyExc_OSError);
  classes[static_cast<int>(Code::state)] = make_class(m, "StateError", error, nullptr);
  classes[static_cast<int>(Code::unsupported)] = make_class(m, "UnsupportedError", error, nullptr);
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& e) {
      PyErr_SetString(classes[static_cast<int>(e.code())], e.what());
    }
  });
}

}  // namespace slidecore::bindings
