"""A trace of the lanes while a piece of a program runs."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from torch import nn

from slidecore.offloading import engine_of

SpanTuple = tuple[str, str, int, int, int, int]


class trace:
    """Records every copy, update and wait of `model`'s lanes inside the `with` block.

    Afterwards `spans` holds (lane, kind, chunk index or -1, start ns, end ns, bytes), oldest first, `chunk_names` the
    chunks' names, and `summary` the time, each lane's busy seconds, share and bytes, and the seconds that compute
    waited for its slot (`exposed_wait_s`). Both ends wait for the lanes to be idle.

    Raises:
        UsageError: `model` is not offloaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._engine = engine_of(model)
        self.chunk_names = [chunk.name for chunk in self._engine.chunks]
        self.spans: list[SpanTuple] = []
        self.summary: dict[str, object] = {}
        self._chrome = "[]"

    def __enter__(self) -> trace:
        self._engine.drain()
        self._engine.scheduler.start_trace()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        self._engine.scheduler.stop_trace()
        self.spans = self._engine.scheduler.trace_spans()
        self.summary = self._engine.scheduler.trace_summary()
        self._chrome = self._engine.scheduler.chrome_trace()

    def save(self, path: str | Path) -> None:
        """Writes the spans as a Chrome trace, which Perfetto and chrome://tracing open."""
        Path(path).write_text(self._chrome)
