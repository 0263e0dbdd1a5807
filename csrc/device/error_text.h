#pragma once
// The reason of the last failed call on this thread, and the barrier that keeps C++ exceptions inside a table.

#include <exception>
#include <new>
#include <utility>

#include "device/codes.h"

namespace slidecore::device {

// Both truncate rather than allocate, so that running out of memory can be reported too.
[[gnu::format(printf, 2, 3)]] int fail(int code, const char* format, ...) noexcept;
const char* last_error() noexcept;

template <typename Body>
int guarded(Body&& body) noexcept {
  try {
    return std::forward<Body>(body)();
  } catch (const std::bad_alloc&) {
    return fail(kOutOfMemory, "out of host memory");
  } catch (const std::exception& error) {
    return fail(kUnknown, "%s", error.what());
  }
}

}  // namespace slidecore::device
