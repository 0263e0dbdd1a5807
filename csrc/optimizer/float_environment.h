#pragma once

#include <cfenv>

namespace slidecore {

// Rounds to nearest and keeps denormals while it lives. Threads start with their creator's rounding and flush
// modes, and frameworks let users flush denormals, so without it results could differ between threads.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace slidecore
