#pragma once
// Errors of the core. Every failure is an `Error` that says what failed, where, and (where it helps) what to do.

#include <stdexcept>
#include <string>

namespace slidecore {

enum class Code {
  invalid_argument,  // the caller's input is wrong; nothing was changed
  out_of_memory,     // host or device memory ran out
  device,            // a driver call failed
  io,                // a file operation failed
  state,             // the call is not possible now (closed, failed earlier, window exhausted)
  unsupported,       // this machine or build cannot do it
};

class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& message) : std::runtime_error(message), code_(code) {}
  Code code() const noexcept { return code_; }

 private:
  Code code_;
};

}  // namespace slidecore
