"""The two pictures of a run: the loss curve, and the lanes over one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slidecore.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One entry of a trace: lane, kind, chunk or -1, start and end in nanoseconds, bytes.
Span = tuple[str, str, int, int, int, int]

_LANES = ["upload", "compute", "download", "update", "disk"]
# Forward and backward kinds are told apart by lightness, lanes by hue; waits alone are red.
_COLOURS = {
    "forward": ("forward", "#7fb3d5"),
    "backward": ("backward", "#1f618d"),
    "wait": ("exposed wait", "#e74c3c"),
    "weights": ("weights up", "#f5b041"),
    "gradient": ("gradients down", "#52be80"),
    "save input": ("saved inputs out", "#a9dfbf"),
    "fetch input": ("saved inputs in", "#fad7a0"),
    "update": ("AdamW", "#884ea0"),
    "read": ("read", "#aab7b8"),
    "write": ("write", "#616a6b"),
}


def plot_loss(
    path: Path, losses: Sequence[float], *, first_step: int = 1, held_out: Sequence[tuple[int, float]] = ()
) -> None:
    """Writes the loss curve as PNG: every step, and a running mean where there are enough of them.

    Args:
        path: file to write.
        losses: one loss per step, in nats.
        first_step: number of the step of `losses[0]`.
        held_out: (step, loss on held-out data after it) where that was taken.
    """
    figure, axes = _figure(8, 4.5)
    steps = range(first_step, first_step + len(losses))
    smooth = _running_mean(losses, max(1, len(losses) // 25))
    many = len(losses) >= 25
    axes.plot(
        steps,
        losses,
        color="#7fb3d5" if many else "#1f618d",
        linewidth=0.8 if many else 1.5,
        marker="" if many else "o",
        label="each step",
    )
    if many:
        axes.plot(steps, smooth, color="#1f618d", linewidth=2, label=f"mean of {max(1, len(losses) // 25)} steps")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#e67e22", linewidth=1.5, marker="o", label="held-out data")
    if many or held_out:
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss" if held_out else "Training loss")
    axes.grid(alpha=0.3)
    axes.locator_params(axis="x", integer=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def plot_timeline(path: Path, spans: Sequence[Span], *, title: str = "One training step") -> None:
    """Writes the lanes over the traced time as PNG: one row a lane, one colour a kind, time in ms.

    Args:
        path: file to write.
        spans: what a trace recorded; empty gives a picture that says so.
        title: heading.
    """
    figure, axes = _figure(12, 4)
    origin = min((span[3] for span in spans), default=0)
    present = {span[0] for span in spans}
    lanes = [lane for lane in _LANES if lane in present] + sorted(present - set(_LANES))
    kinds = [kind for kind in _COLOURS if any(span[1] == kind for span in spans)]
    kinds += sorted({span[1] for span in spans} - set(_COLOURS))
    for kind in kinds:
        label, colour = _COLOURS.get(kind, (kind, "#34495e"))
        for row, lane in enumerate(lanes):
            bars = [((s[3] - origin) / 1e6, (s[4] - s[3]) / 1e6) for s in spans if s[0] == lane and s[1] == kind]
            if bars:
                # Visits follow each other without a gap and need a border; what is short needs an outline of its own
                # colour, or it would be too thin to be seen. Waits have none, not to look longer than they are.
                axes.broken_barh(
                    bars,
                    (row - 0.38, 0.76),
                    facecolors=colour,
                    edgecolor={"forward": "white", "backward": "white", "wait": "#922b21"}.get(kind, colour),
                    linewidth=0 if kind == "wait" else 0.6,
                    hatch="////" if kind == "wait" else None,
                )
        # An artist of its own for the legend: a kind may occur on several lanes.
        axes.barh(0, 0, color=colour, label=label, hatch="////" if kind == "wait" else None)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(max(1, len(lanes)) - 0.5, -0.5)
    axes.set(xlabel="time (ms)", title=title)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    end = max((span[4] for span in spans), default=origin + 1)
    axes.set_xlim(0, max(1, end - origin) / 1e6)
    if spans:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(len(kinds), 6), frameon=False)
    else:
        axes.text(0.5, 0.5, "nothing was recorded", transform=axes.transAxes, ha="center")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    try:
        # Without pyplot, whose state and windows belong to the caller.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib is not installed", "Run: pip install 'slidecore[finetune]'") from error
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width` - 1 before it."""
    means = []
    for index in range(len(values)):
        window = values[max(0, index + 1 - width) : index + 1]
        means.append(sum(window) / len(window))
    return means
