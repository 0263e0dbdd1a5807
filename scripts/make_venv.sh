#!/usr/bin/env bash
# Makes a virtual environment with PyTorch and the build tools: make_venv.sh VENV [TORCH]
#
# TORCH is a requirement such as "torch==2.9.1" (default: the pin of constraints.txt), or "installed": use the PyTorch
# of the interpreter that PYTHON names. Writes VENV/constraints.txt, with which every later pip install keeps that
# PyTorch. An existing VENV is completed, not replaced.
set -euo pipefail
venv=$1
torch=${2:-}
here=$(cd "$(dirname "$0")/.." && pwd)
pinned=$(sed -n 's/^torch==/torch==/p' "$here/constraints.txt")

# Interpreters in the order in which the pinned PyTorch is likeliest to have a build for them.
read -r -a candidates <<<"${PYTHON:-python3.11 python3.12 python3.10 python3.13 python3}"
options=()
if [ "$torch" = installed ]; then options=(--system-site-packages); fi

install_torch() {
  if [ "$torch" = installed ]; then
    if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
      # PYTHON may itself be of a virtual environment: its packages are not those of the system.
      local site
      site=$("$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))') || {
        echo "TORCH=installed, but $python has no PyTorch" >&2
        return 1
      }
      echo "$site" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
    fi
  else
    "$venv/bin/python" -m pip install "${torch:-$pinned}" 'numpy>=1.26'
  fi
}

if [ -x "$venv/bin/python" ]; then
  python=$venv/bin/python
  install_torch
else
  tried=()
  for python in "${candidates[@]}"; do
    # Runs it: a name on PATH may be a launcher's shim for a version that is not there.
    "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    rm -rf "$venv"
    if "$python" -m venv "${options[@]}" "$venv" && install_torch; then break; fi
    rm -rf "$venv"
    tried+=("$python")
    echo "-- $python will not do; trying the next interpreter" >&2
  done
  if [ ! -x "$venv/bin/python" ]; then
    echo "No usable interpreter among: ${candidates[*]} (tried with venv: ${tried[*]:-none})." >&2
    echo "slidecore needs Python 3.10 or newer with venv (Debian, Ubuntu: apt-get install python3-venv) and" >&2
    echo "${torch:-$pinned}. Name others with PYTHON=... and TORCH=..." >&2
    exit 1
  fi
fi

{
  grep -v -e '^torch==' -e '^triton==' "$here/constraints.txt"
  "$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))'
  # A build of PyTorch for cards says itself which triton it needs.
  "$venv/bin/python" -c 'from importlib.metadata import requires; print(requires("torch"))' | grep -q "'triton" ||
    grep '^triton==' "$here/constraints.txt"
} >"$venv/constraints.txt"
"$venv/bin/python" -m pip install -c "$venv/constraints.txt" 'scikit-build-core>=0.11' 'pybind11>=2.13' cmake ninja
