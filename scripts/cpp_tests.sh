#!/usr/bin/env bash
# Configures, builds and runs the C++ tests of one preset: cpp_tests.sh PRESET [JOBS]
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1
jobs=${2:-$(nproc)}

cmake --preset "$preset"
cmake --build --preset "$preset" --parallel "$jobs"

# ThreadSanitizer's shadow memory collides with addresses that kernels with much address randomisation hand out.
# Containers may forbid turning it off; then the tests run as they are.
run=()
if [ "$preset" = tsan ]; then
  if setarch "$(uname -m)" -R true 2>/dev/null; then
    run=(setarch "$(uname -m)" -R)
  else
    echo "-- setarch -R is not permitted here; if ThreadSanitizer reports an unexpected memory mapping, lower" \
      "vm.mmap_rnd_bits to 28"
  fi
fi
"${run[@]}" ctest --preset "$preset" --parallel "$jobs"
