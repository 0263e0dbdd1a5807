"""How kernels are launched on which card: measured once, when asked, and stored.

`lookup` never measures: a training step gets what is stored for its card, operation and size, or the default. To
measure and store:

    python -m slidecore.triton.tune

The file is kernels.json in SLIDECORE_CACHE, or else in the user's cache directory (XDG_CACHE_HOME or ~/.cache)
under slidecore/. Results do not depend on the choice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
import triton

log = logging.getLogger("slidecore.triton")


Loads = Literal["plain", "early", "ahead"]


@dataclass(frozen=True)
class Config:
    """A launch: elements of a block, blocks that one program handles one after the other, and warps.

    `registers` is the most that a thread may have (0: the compiler's choice). `loads` says where a kernel that has the
    choice (`adamw` with 8-bit moments on NVIDIA's cards) loads a block: "plain" leaves the order to the compiler,
    "early" has all of its loads on their way before the first is used, "ahead" before the block before it is stored.
    """

    block: int
    steps: int = 1
    warps: int = 4
    loads: Loads = "plain"
    registers: int = 0

    def __post_init__(self) -> None:
        for name in ("block", "warps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name}={value!r} must be a power of two")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps={self.steps!r} must be a positive number")
        if not isinstance(self.registers, int) or not 0 <= self.registers <= 255:
            raise ValueError(f"registers={self.registers!r} must be at most 255, or 0 for the compiler's choice")
        if self.loads not in get_args(Loads):
            raise ValueError(f"loads={self.loads!r} must be one of {', '.join(get_args(Loads))}")

    @property
    def elements(self) -> int:
        """Elements of one program."""
        return self.block * self.steps


def path() -> Path:
    """The file of stored choices.

    Raises:
        RuntimeError: no variable says where, and this user has no home.
    """
    return _path(*map(os.environ.get, ("SLIDECORE_CACHE", "XDG_CACHE_HOME", "HOME")))


@lru_cache(maxsize=8)
def _path(own: str | None, caches: str | None, _home: str | None) -> Path:
    """Kept, because making a path takes longer than the rest of a lookup. Path.home() reads HOME."""
    base = Path(own) if own else Path(caches or Path.home() / ".cache") / "slidecore"
    return base / "kernels.json"


@lru_cache(maxsize=8)
def card(device: torch.device) -> str:
    """What stored choices belong to: the card's model and the compiler's version."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{model}, triton {triton.__version__}"


def key(operation: str, size: int) -> str:
    """Sizes of one power of two share a choice."""
    return f"{operation} 2^{max(0, size - 1).bit_length()}"


_stored: dict[Path | None, dict[str, dict[str, Config]]] = {}


def _read(file: Path) -> dict[str, dict[str, Config]]:
    try:
        document = json.loads(file.read_text())
        return {name: {k: Config(**value) for k, value in entries.items()} for name, entries in document.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s); kernels run with their defaults", file, error)
        return {}


def _choices() -> dict[str, dict[str, Config]]:
    try:
        file = path()
    except RuntimeError as error:
        if None not in _stored:
            log.warning("kernels run with their defaults: %s; SLIDECORE_CACHE names a directory for choices", error)
            _stored[None] = {}
        return _stored[None]
    if file not in _stored:
        _stored[file] = _read(file)
    return _stored[file]


@torch.compiler.assume_constant_result
def _found(operation: str, size: int, device: str) -> tuple[int, int, int, Loads, int] | None:
    """Reads the environment and a file, which torch.compile cannot trace: it takes the result as it is."""
    config = _choices().get(card(torch.device(device)), {}).get(key(operation, size))
    if config is None:
        return None
    return (config.block, config.steps, config.warps, config.loads, config.registers)


def lookup(operation: str, size: int, device: torch.device, default: Config) -> Config:
    """The stored choice for the card of `device`, or `default`. Never measures."""
    if device.type != "cuda":
        return default
    found = _found(operation, size, str(device))
    return default if found is None else Config(*found)


def store(operation: str, size: int, device: torch.device, config: Config) -> None:
    """Keeps a choice for this and later processes. A file that cannot be written is a warning, not an error."""
    try:
        file = path()
    except RuntimeError as error:
        _choices().setdefault(card(device), {})[key(operation, size)] = config
        log.warning("the choice of kernels is kept by this process only: %s", error)
        return
    merged = _read(file)  # another process may have written since
    merged.setdefault(card(device), {})[key(operation, size)] = config
    _stored[file] = merged
    text = json.dumps({n: {k: asdict(c) for k, c in sorted(e.items())} for n, e in sorted(merged.items())}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
        try:
            with os.fdopen(handle, "w") as out:
                out.write(text + "\n")
            Path(name).replace(file)  # readers see the old file or the new one
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        log.warning("the choice of kernels cannot be stored in %s: %s", file, error)


def tune(
    operation: str,
    size: int,
    device: torch.device,
    candidates: Iterable[Config],
    run: Callable[[Config], object],
) -> Config:
    """Times `run` with each candidate, stores the fastest and returns it. Says so in the log of `slidecore.triton`.

    Args:
        operation, size: as in `lookup`.
        run: launches the operation once with a configuration, on data it may overwrite again and again.

    Raises:
        RuntimeError: no candidate ran.
    """
    times: dict[Config, float] = {}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for config in candidates:
            try:
                times[config] = triton.testing.do_bench(lambda config=config: run(config), warmup=5, rep=20)
            except triton.runtime.errors.OutOfResources as error:  # more than this card has: not a candidate here
                log.info("%s: %s does not fit: %s", operation, config, error)
    if not times:
        raise RuntimeError(f"{operation}: no configuration runs on {card(device)}")
    best = min(times, key=lambda c: times[c])
    log.info("%s of %d: %s takes %.3f ms of %d candidates", operation, size, best, times[best], len(times))
    store(operation, size, device, best)
    return best
