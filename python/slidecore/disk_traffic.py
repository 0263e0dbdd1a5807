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
    """What is foretold of planes on disk, from where they lie, in a step of one forward and one backward.

    Weights are counted for two uploads a step; a chunk that is still in its slot in backward needs one. Not counted is
    what depends on how the model is called: saved inputs that go to disk (written and read once in each backward), the
    weights of more backward passes to a step than one (accumulation reads them again in each), and evaluation.
    `Stats.disk_counters` has what was really moved.

    Attributes:
        read_bytes, written_bytes: in a step.
        point: the drives' calibrated rates; None: not calibrated.
        train: False: a step is a forward, which reads weights once.
    """

    read_bytes: int
    written_bytes: int
    point: Point | None = None
    train: bool = True

    @classmethod
    def of(cls, chunks: Sequence[Chunk], on_disk: Iterable[Part], point: Point | None, train: bool) -> Traffic:
        read = written = 0
        for part in on_disk:
            chunk = chunks[part.chunk]
            updated = part.nbytes
            if part.name == "weight":
                read += part.nbytes * (2 if train else 1)
                updated = part.nbytes * chunk.trainable_numel // chunk.numel
            read += updated
            written += updated
        return cls(read, written, point, train)

    @property
    def seconds(self) -> float | None:
        """What the disk needs at its calibrated rates, reading and writing in turns; None: not calibrated."""
        if self.point is None:
            return None
        return self.read_bytes / self.point.read_gb_per_s / 1e9 + self.written_bytes / self.point.write_gb_per_s / 1e9

    @property
    def terabytes_per_1000_steps(self) -> float:
        """Written: what wears the drives."""
        return self.written_bytes * 1000 / 1e12

    @property
    def terabytes_per_day(self) -> float | None:
        """Written at most, by steps that take no longer than the disk needs; None: not calibrated."""
        seconds = self.seconds
        if seconds is None:
            return None
        return self.written_bytes * 86400 / seconds / 1e12 if seconds else 0.0

    def describe(self) -> str:
        """Sentences: bytes, seconds, wear."""
        if not self.train:
            took = "" if self.seconds is None else f", for which the disk needs {self.seconds:.3g} s"
            return f"a forward reads {format_size(self.read_bytes)} of weights from disk{took}"
        text = (
            f"a step reads {format_size(self.read_bytes)} of planes from disk and writes "
            f"{format_size(self.written_bytes)} (with one backward; saved inputs come on top), "
            f"{self.terabytes_per_1000_steps:.3g} TB written in 1000 steps"
        )
        seconds, per_day = self.seconds, self.terabytes_per_day
        if seconds is None:
            return f"{text}; `slidecore calibrate DIRECTORY...` tells how long that takes"
        if seconds == 0:
            return text
        return f"{text}; the disk needs {seconds:.3g} s for it, so at most {per_day:.3g} TB are written in a day"
