"""The trace of the lanes: what it records, not how long things take."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import slidecore
import torch
from _models import Stack, feature_batches, language_model, loss_of, token_batches, train_offloaded
from torch import nn

Offload = Callable[..., nn.Module]
LANES = {"compute", "upload", "download", "update", "disk"}
KINDS = {
    "compute": {"forward", "backward", "wait"},
    "upload": {"weights", "fetch input"},
    "download": {"gradient", "save input"},
    "update": {"update"},
}


def traced_step(model: nn.Module, optimizer: slidecore.AdamW, steps: int = 1) -> slidecore.trace:
    with slidecore.trace(model) as trace:
        for batch in token_batches(steps):
            loss_of(model, batch).backward()
            optimizer.step()
    return trace


def test_spans_of_a_step(offload: Offload) -> None:
    model = offload(language_model("llama").train())
    optimizer = slidecore.AdamW(model.parameters())
    train_free = traced_step(model, optimizer, 2)  # the schedule is known now
    assert train_free.spans
    trace = traced_step(model, optimizer)
    assert trace.chunk_names == [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(4)),
        "model.norm+lm_head",
    ]
    for lane, kind, chunk, start, end, nbytes in trace.spans:
        assert kind in KINDS[lane]
        assert -1 <= chunk < 6
        assert 0 <= start <= end
        assert nbytes >= 0
    of = {
        kind: [span for span in trace.spans if span[1] == kind]
        for kind in ("forward", "backward", "gradient", "update", "weights", "save input", "fetch input")
    }
    assert all(of.values())
    for kind in ("update", "forward"):
        assert {span[2] for span in of[kind]} == set(range(6))
    # Every chunk is updated once a step, from as many bytes as its gradient has; of gradients that wait together the
    # one whose weights are needed soonest goes first.
    assert sorted(span[2] for span in of["update"]) == list(range(6))
    sizes = {c: sum(s[5] for s in of["gradient"] if s[2] == c) for c in range(6)}
    parameters = {0: model.model.embed_tokens, 5: model.lm_head}
    for i in range(4):
        parameters[i + 1] = model.model.layers[i]
    for c, module in parameters.items():
        exact = 4 * sum(p.numel() for p in module.parameters())
        assert exact <= sizes[c] <= exact + 4 * 128 * len(list(module.parameters())) + (4 * 128 if c == 5 else 0)
    # An update starts when its gradient has begun to come down; a fetch after what was saved.
    for c in range(6):
        update = min(s[4] for s in of["update"] if s[2] == c)
        assert update >= min(s[3] for s in of["gradient"] if s[2] == c)
    saved = {s[2]: s for s in of["save input"]}
    assert saved
    for span in of["fetch input"]:
        assert span[3] >= saved[span[2]][4]


def test_compute_spans_do_not_overlap(offload: Offload) -> None:
    """The host backend's compute is one thread; visits of the blocks come one after the other."""
    model = offload(language_model("llama").train())
    optimizer = slidecore.AdamW(model.parameters())
    trace = traced_step(model, optimizer, 2)
    for lane, kinds in (("compute", {"forward", "backward"}), ("upload", KINDS["upload"]), ("update", {"update"})):
        spans = sorted((s for s in trace.spans if s[0] == lane and s[1] in kinds), key=lambda s: (s[3], s[4]))
        assert all(a[4] <= b[3] for a, b in pairwise(spans)), lane


def test_chrome_trace(offload: Offload, tmp_path: Path) -> None:
    model = offload(language_model("llama").train())
    optimizer = slidecore.AdamW(model.parameters())
    trace = traced_step(model, optimizer)
    path = tmp_path / "trace.json"
    trace.save(path)
    events = json.loads(path.read_text())
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert set(names.values()) == LANES
    complete = [e for e in events if e["ph"] == "X"]
    assert len(complete) == len(trace.spans)
    assert len(complete) + len(names) == len(events)
    for event, (lane, _, _, start, end, _) in zip(complete, trace.spans, strict=True):
        assert names[event["tid"]] == lane
        assert event["ts"] == pytest.approx(start / 1e3, abs=1e-2)
        assert event["dur"] == pytest.approx((end - start) / 1e3, abs=1e-2)
    assert any("model.layers.2" in json.dumps(event) for event in complete)


def test_summary(offload: Offload) -> None:
    model = offload(language_model("llama").train())
    optimizer = slidecore.AdamW(model.parameters())
    trace = traced_step(model, optimizer, 3)
    summary = trace.summary
    assert set(summary) == {"wall_s", "exposed_wait_s", "dropped", "lanes"}
    assert set(summary["lanes"]) == LANES
    assert summary["dropped"] == 0
    begin = min(span[3] for span in trace.spans)
    end = max(span[4] for span in trace.spans)
    assert summary["wall_s"] == pytest.approx((end - begin) / 1e9, rel=1e-6)
    assert 0 <= summary["exposed_wait_s"] <= summary["wall_s"]
    for lane, figures in summary["lanes"].items():
        assert set(figures) == {"busy_s", "busy_share", "bytes", "spans"}
        spans = [span for span in trace.spans if span[0] == lane and span[1] != "wait"]
        assert figures["bytes"] == sum(span[5] for span in spans)
        # The union of the lane's spans, counted here another way.
        busy, reached = 0, -1
        for _, _, _, start, stop, _ in sorted(spans, key=lambda s: s[3]):
            busy += max(0, stop - max(start, reached))
            reached = max(reached, stop)
        assert figures["busy_s"] == pytest.approx(busy / 1e9, rel=1e-6, abs=1e-9)
        assert figures["busy_share"] == pytest.approx(figures["busy_s"] / summary["wall_s"], rel=1e-6, abs=1e-9)


def test_nothing_is_recorded_outside(offload: Offload) -> None:
    model = offload(Stack().train())
    batches = feature_batches(2)
    train_offloaded(model, batches)
    with slidecore.trace(model) as trace:
        pass
    assert trace.spans == []
    train_offloaded_again = [loss_of(model, batch).item() for batch in batches]
    assert len(train_offloaded_again) == 2
    assert trace.spans == []


def test_traces_one_after_the_other(offload: Offload) -> None:
    model = offload(Stack().train())
    x = torch.randn(2, 7)
    counts = []
    for _ in range(3):
        with slidecore.trace(model) as trace, torch.no_grad():
            model(x)
        counts.append(sum(span[1] == "forward" for span in trace.spans))
    # norm and leave are two calls of one chunk
    assert counts == [8, 8, 8]


def test_an_exception_passes_through(offload: Offload) -> None:
    model = offload(Stack().train())
    trace = slidecore.trace(model)

    def interrupted() -> None:
        with trace:
            loss_of(model, feature_batches(1)[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert trace.spans == []
    with slidecore.trace(model) as trace, torch.no_grad():
        model(torch.randn(2, 7))
    assert trace.spans
