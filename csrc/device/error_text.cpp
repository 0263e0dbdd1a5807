#include "device/error_text.h"

#include <cstdarg>
#include <cstdio>

namespace slidecore::device {
namespace {

thread_local char text[1024] = "";

}  // namespace

int fail(int code, const char* format, ...) noexcept {
  std::va_list arguments;
  va_start(arguments, format);
  if (std::vsnprintf(text, sizeof(text), format, arguments) < 0) text[0] = '\0';
  va_end(arguments);
  return code;
}

const char* last_error() noexcept {
  return text;
}

}  // namespace slidecore::device
