"""What a training step reads from disk and writes there, how long that takes, and what it wears."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slidecore.calibration import Point
from slidecore.partition import Chunk
from slidecore.sizes import format_size
from slidecore.tier_plan import Part


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step's planes on disk.

    Weights are counted for two uploads a step; a chunk that is still in its slot in backward needs one.
    """

    read_bytes: int
    written_bytes: int
    point: Point | None  # the drives' calibrated rates

    @classmethod
    def of(cls, chunks: Sequence[Chunk], on_disk: Iterable[Part], point: Point | None) -> Traffic:
        read = written = 0
        for part in on_disk:
            chunk = chunks[part.chunk]
            updated = part.nbytes
            if part.name == "weight":
                read += 2 * part.nbytes
                updated = part.nbytes * chunk.trainable_numel // chunk.numel
            read += updated
            written += updated
        return cls(read, written, point)

    @property
    def seconds(self) -> float | None:
        """What the disk needs at its calibrated rates, reading and writing in turns; None: not calibrated."""
        if self.point is None:
            return None
        return self.read_bytes / self.point.read_gb_per_s / 1e9 + self.written_bytes / self.point.write_gb_per_s / 1e9

    def describe(self) -> str:
        """Sentences: bytes, seconds, wear."""
        text = (
            f"a step reads {format_size(self.read_bytes)} from disk and writes {format_size(self.written_bytes)}, "
            f"{self.written_bytes * 1000 / 1e12:.3g} TB written in 1000 steps"
        )
        seconds = self.seconds
        if seconds is None:
            return f"{text}; `slidecore calibrate DIRECTORY...` tells how long that takes"
        if seconds == 0:
            return text
        per_day = self.written_bytes * 86400 / seconds / 1e12
        return f"{text}; the disk needs {seconds:.3g} s for it, so at most {per_day:.3g} TB are written in a day"
