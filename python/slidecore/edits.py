"""Changes that users make to parameters in place (`nn.init`, `clamp_`, a row set to zero): found by their versions.

Such a change goes to the weight plane, which a parameter is a view of. A residual then is of the value before, and a
slot may hold the weight before. PyTorch counts a tensor's changes; what slidecore writes goes to the planes and is not
counted there, nor is what goes through `p.data`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from slidecore.partition import Chunk, Entry
from slidecore.repeating import version_of

if TYPE_CHECKING:
    from slidecore.engine import Engine


def note_version(entry: Entry) -> None:
    """What the entry's parameter holds now is known."""
    with torch._C.DisableTorchFunctionSubclass():
        entry.version = version_of(entry.parameter)


def edited(places: Iterable[tuple[Chunk, Entry]]) -> list[tuple[Chunk, Entry]]:
    """Those whose parameters were changed since `note_version`."""
    # Parameters that are not in memory answer through their class, at a price that a loop over thousands would notice.
    with torch._C.DisableTorchFunctionSubclass():
        return [(chunk, entry) for chunk, entry in places if version_of(entry.parameter) != entry.version]


def take_over(engine: Engine, places: Iterable[tuple[Chunk, Entry]]) -> None:
    """Makes edits of these parameters count, as master values and for the next visits.

    Where there are any, waits for pending updates. Forwards made before can then no longer be differentiated. step()
    reports those that were made beside overlapping updates.

    Raises:
        Error: a lane has failed.
    """
    found = edited(places)
    if found:
        engine.scheduler.synchronize()
        for chunk, entry in found:
            overwritten(engine, chunk, entry)
        if engine.state == "updated":
            engine.edited_in_update += [entry.name for _, entry in found]


def overwritten(engine: Engine, chunk: Chunk, entry: Entry) -> None:
    """The weight was written by somebody else, while no lane works on it: it is the master value now."""
    engine.planes.clear_residual(chunk, entry)
    engine.scheduler.invalidate(chunk.index)
    engine.generation += 1
    note_version(entry)
