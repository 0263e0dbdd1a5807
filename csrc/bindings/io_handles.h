#pragma once
// The disk tier's Python objects, which other binding files take as arguments.

#include <memory>
#include <string>
#include <utility>

#include "slidecore/gpu_direct.h"
#include "slidecore/io.h"
#include "slidecore/status.h"

namespace slidecore::bindings {

// close() ends what a Python object may outlive. It must not run beside other calls of the same object: that is for its
// one owner to see to, as with any close().
template <class T>
class IoHandle {
 public:
  IoHandle(const char* what, std::shared_ptr<T> held) : what_(what), held_(std::move(held)) {}
  T& get() const { return *shared(); }
  const std::shared_ptr<T>& shared() const {
    if (held_ == nullptr) throw Error(Code::state, std::string(what_) + " is closed");
    return held_;
  }
  void close() { held_.reset(); }

 private:
  const char* what_;
  std::shared_ptr<T> held_;
};
using StorageHandle = IoHandle<Storage>;
using TransfersHandle = IoHandle<Transfers>;
using GpuDirectHandle = IoHandle<GpuDirect>;
using RegionPointer = std::shared_ptr<Region>;

}  // namespace slidecore::bindings
