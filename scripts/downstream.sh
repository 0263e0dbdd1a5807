#!/usr/bin/env bash
# Builds examples/cpp as a project of its own against an installed slidecore and runs it: downstream.sh NAME PREFIX
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
prefix=$2
build=build/downstream-$name

rm -rf "$build"  # a cached slidecore_DIR would hide a package that find_package no longer finds
cmake -S examples/cpp -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -Dslidecore_ROOT="$prefix"
cmake --build "$build"
"$build/overlap" --backend host --chunks 6 --chunk-mib 4 --window 2 --steps 2
"$build/overlap" --backend host --chunks 3 --chunk-mib 1 --window 3 --steps 1 --json >"$build/overlap.json"
python -m json.tool "$build/overlap.json" >/dev/null

status=0
"$build/overlap" --window 1 --chunks nonsense 2>"$build/refusal.txt" || status=$?
if [ "$status" -ne 2 ] || ! grep -q chunks "$build/refusal.txt"; then
  echo "overlap should refuse bad arguments by name and exit 2, not $status:" >&2
  cat "$build/refusal.txt" >&2
  exit 1
fi
