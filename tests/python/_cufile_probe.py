"""Registers a plain file with cuFile by its C interface alone, in a process of its own: whether it takes any there.

    python _cufile_probe.py LIBRARY DIRECTORY

Prints "ok", or which call failed with which of cuFile's codes.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

OPAQUE_FD = 1  # CU_FILE_HANDLE_TYPE_OPAQUE_FD


class Error(ctypes.Structure):
    _fields_ = (("code", ctypes.c_int), ("cuda", ctypes.c_int))


class Descriptor(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("fd", ctypes.c_void_p), ("operations", ctypes.c_void_p))


def probe(library: str, directory: str) -> str:
    torch.zeros(1, device="cuda")  # makes the card's context current
    cufile = ctypes.CDLL(library)
    for name in ("cuFileDriverOpen", "cuFileHandleRegister"):
        getattr(cufile, name).restype = Error
    opened = cufile.cuFileDriverOpen()
    if opened.code:
        return f"cuFileDriverOpen failed with code {opened.code} (CUDA's {opened.cuda})"
    path = os.path.join(directory, "probe.bin")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(fd, 0, 1 << 20)
        handle = ctypes.c_void_p()
        registered = cufile.cuFileHandleRegister(ctypes.byref(handle), ctypes.byref(Descriptor(OPAQUE_FD, fd, None)))
        return "ok" if not registered.code else f"cuFileHandleRegister failed with code {registered.code}"
    finally:
        os.close(fd)
        os.unlink(path)


if __name__ == "__main__":
    print(probe(*sys.argv[1:]), flush=True)
    os._exit(0)  # without closing cuFile: only its answer is wanted
