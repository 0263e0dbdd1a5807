#!/usr/bin/env bash
# Fails with what to install where there is no C++20 compiler; otherwise pip's build log would be the message.
set -euo pipefail
compiler=${CXX:-}
if [ -z "$compiler" ]; then
  for name in c++ g++ clang++; do
    if command -v "$name" >/dev/null; then compiler=$name; break; fi
  done
fi
if [ -z "$compiler" ]; then
  echo "slidecore needs a C++20 compiler and found none. Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++" >&2
  exit 1
fi
# $compiler unquoted: CXX may hold a launcher and flags.
if ! printf '#include <concepts>\n#include <span>\nint main() {}\n' | $compiler -std=c++20 -fsyntax-only -x c++ - ; then
  echo "slidecore needs a C++20 compiler (GCC 11, Clang 14 or newer); '$compiler' is not one. Name another with CXX=" >&2
  exit 1
fi
