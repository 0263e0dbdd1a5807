"""What fits: the arithmetic of device and host budgets, before and during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slidecore.errors import BudgetError
from slidecore.partition import Chunk
from slidecore.sizes import format_size

# A visit's working memory over what its graph saves: gradients of intermediates live beside it.
WORKING_FACTOR = 1.5


@dataclass(frozen=True)
class DeviceNeeds:
    """Device bytes that do not depend on the batch."""

    slots: int
    edge_slot: int
    resident: int
    block_gradients: int
    edge_gradients: int
    kept: int = 0  # kept parameters, with gradients and moments of those that are trained
    workspaces: int = 0  # of the card's libraries
    head_tile: int = 0  # the smallest tile's logits, and the tile's own gradient of the head's weight

    @property
    def fixed(self) -> int:
        """Always allocated."""
        return self.slots + self.edge_slot + self.resident + self.kept + self.workspaces

    @property
    def total(self) -> int:
        """With the gradients that exist at the worst moment."""
        return self.fixed + max(self.block_gradients, self.edge_gradients)

    @property
    def at_head(self) -> int:
        """What the head needs while it runs; saved inputs and kept graphs of the blocks live beside it."""
        return self.edge_gradients + self.head_tile


def device_needs(
    chunks: Sequence[Chunk],
    compute_dtype: torch.dtype,
    window: int,
    train: bool,
    gradient_buffers: int,
    kept: int = 0,
    workspaces: int = 0,
) -> DeviceNeeds:
    """Adds up slots and gradients.

    A gradient exists in the compute dtype on its way down, and in float32 while several contributions are summed. While
    a block's is made, the head's may still be on its way down, and the sums of tied edges and of resident parameters
    wait for their last contribution. `kept` are the bytes of kept parameters, `workspaces` those of libraries.
    """
    item = compute_dtype.itemsize

    def largest(kind: str, trainable: bool = False) -> int:
        return max((c.trainable_numel if trainable else c.numel for c in chunks if c.kind == kind), default=0)

    wide = 4 if compute_dtype != torch.float32 else 0
    blocks = edges = 0
    if train:
        block, edge, resident = largest("block", True), largest("edge", True), largest("resident", True)
        tied = [c for c in chunks if c.kind == "edge" and any(len(e.owners) > 1 for e in c.entries if e.trainable)]
        waiting = resident + sum(c.trainable_numel for c in tied)
        blocks = (block + (gradient_buffers - 1) * max(block, edge)) * item + block * wide + waiting * max(item, wide)
        edges = (edge + resident) * (item + wide)
    return DeviceNeeds(
        slots=window * largest("block") * item,
        edge_slot=largest("edge") * item,
        resident=largest("resident") * item,
        block_gradients=blocks,
        edge_gradients=edges,
        kept=kept,
        workspaces=workspaces,
    )


# The head's tiles. Bytes that a logit costs: with the fused kernel itself, overwritten by its gradient; otherwise also
# the float32 copies of the loss. Matrix products are at full speed long before the largest number of tokens.
BYTES_PER_LOGIT, BYTES_PER_LOGIT_UNFUSED = 4, 20
SMALLEST_TILE, LARGEST_TILE = 128, 8192
UNLIMITED_LOGITS = 1 << 27


@dataclass(frozen=True)
class HeadCosts:
    """What the head's tiles cost, and how many logits (tokens x vocabulary) a tile may have."""

    bytes_per_logit: int
    smallest: int
    largest: int
    weight_gradient: int  # bytes of a tile's own gradient of the head's weight

    def tile_bytes(self, logits: int) -> int:
        return self.weight_gradient + logits * self.bytes_per_logit


def head_costs(chunks: Sequence[Chunk], compute_dtype: torch.dtype, fused: bool) -> HeadCosts:
    """The head's costs; the largest edge matrix tells the vocabulary."""
    entries = [e for c in chunks if c.kind == "edge" for e in c.entries]
    rows = max((e.shape[0] for e in entries if len(e.shape) == 2), default=0)
    return HeadCosts(
        bytes_per_logit=BYTES_PER_LOGIT if fused else BYTES_PER_LOGIT_UNFUSED,
        smallest=SMALLEST_TILE * rows,
        largest=LARGEST_TILE * rows,
        weight_gradient=max((e.numel for e in entries), default=0) * compute_dtype.itemsize,
    )


def plan_head(needs: DeviceNeeds, costs: HeadCosts, budget: int | None, around: int = 0) -> int:
    """Logits that the head makes at once, beside `around` bytes of the batch's hidden states."""
    if budget is None:
        return UNLIMITED_LOGITS
    # A quarter: saved inputs and kept graphs want the rest.
    room = budget - needs.fixed - needs.edge_gradients - costs.weight_gradient - around
    return max(costs.smallest, min(costs.largest, room // 4 // costs.bytes_per_logit))


def check_device_budget(needs: DeviceNeeds, budget: int, window: int, smallest: DeviceNeeds) -> None:
    """Raises BudgetError if the window and the gradients alone exceed `budget`."""
    if needs.total <= budget:
        return
    hint = f", or window=2 with at least {format_size(smallest.total)}" if smallest.total < needs.total else ""
    gradients = max(needs.block_gradients, needs.edge_gradients)
    parts = {
        f"a window of {window} slots takes": needs.slots,
        "the slot of embedding and head": needs.edge_slot,
        "resident parameters": needs.resident,
        "kept parameters (if trained, with gradients and moments)": needs.kept,
        "workspaces of the card's libraries": needs.workspaces,
        "gradients up to": gradients,
    }
    told = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
    raise BudgetError(
        f"device_memory={format_size(budget)} ({budget} bytes) is too small: {told}. Use device_memory of at least "
        f"{needs.total} bytes ({format_size(needs.total)}), plus room for activations{hint}"
    )


@dataclass(frozen=True)
class ActivationPlan:
    """How blocks run for one shape of input."""

    micro_batches: int
    saved_on_device: int  # of the blocks, counted from the last, whose inputs stay on the device
    kept_graphs: int  # of the blocks, counted from the last, that keep their graph instead of recomputing
    head_logits: int = UNLIMITED_LOGITS  # tokens x vocabulary of a tile of the head


@dataclass(frozen=True)
class BlockCosts:
    """What one block's visit leaves on the device if it may."""

    input_bytes: int  # of its differentiable inputs, for the whole batch
    graph_bytes_per_sample: int
    batch: int  # samples

    @property
    def graph_bytes(self) -> int:
        """What its graph saves for the whole batch."""
        return self.graph_bytes_per_sample * self.batch

    def maximum(self, other: BlockCosts) -> BlockCosts:
        """Costs that neither exceeds."""
        graph = max(self.graph_bytes, other.graph_bytes)
        return BlockCosts(max(self.input_bytes, other.input_bytes), graph, 1)


def plan_activations(
    *,
    budget: int | None,
    needs: DeviceNeeds,
    head: HeadCosts,
    blocks: int,
    block: BlockCosts,
    largest: BlockCosts | None,
    micro_batch: int | None,
    keep_graphs: int | None,
) -> ActivationPlan:
    """Divides what the budget leaves: first the largest micro-batch, then saved inputs, then kept graphs.

    Args:
        budget: device bytes, or None for no limit known (micro-batches are then not split and nothing is kept).
        head: what the head's tiles cost; needs.head_tile is the smallest one's.
        blocks: blocks in one forward.
        block: what the block that is planned for costs.
        largest: what any of the blocks may cost; None where that is not known yet, and nothing is left on the device.
        micro_batch, keep_graphs: samples and blocks asked for by the caller, or None to choose.

    Raises:
        BudgetError: not even one sample fits, or not the micro-batch asked for; the message says the smallest budget
            that works.
    """
    batch, input_bytes = block.batch, block.input_bytes
    if budget is None:
        size = micro_batch or batch
        return ActivationPlan(-(-batch // size), 0, keep_graphs or 0)
    # Inputs of the visits around this one: two settling, the current input and output, and their gradients.
    around = 6 * input_bytes
    room = budget - needs.fixed - needs.block_gradients - around
    per_sample = max(1, int(WORKING_FACTOR * block.graph_bytes_per_sample))
    samples = min(micro_batch or 1, batch)
    least = needs.fixed + around + max(needs.block_gradients + samples * per_sample, needs.at_head)
    if budget < least:
        raise BudgetError(
            f"device_memory={format_size(budget)} ({budget} bytes) is too small for this batch: slots take "
            f"{format_size(needs.fixed)}, block inputs of the batch {format_size(around)}, a block's gradients and the "
            f"activations of a micro-batch of {samples} {format_size(needs.block_gradients + samples * per_sample)}, "
            f"or the head's gradients and logits {format_size(needs.at_head)}. Use device_memory of at least {least} "
            f"bytes ({format_size(least)}), or a smaller batch"
        )
    if micro_batch is None:
        micro_batch = min(batch, room // per_sample)
    count = -(-batch // min(micro_batch, batch))
    # Saved inputs and graphs live while the head runs, too: the hungrier of the two moments counts.
    at_block = needs.block_gradients + per_sample * -(-batch // count)
    head_logits = plan_head(needs, head, budget, around)
    at_head = needs.edge_gradients + head.tile_bytes(head_logits)
    room = budget - needs.fixed - around - max(at_block, at_head)
    saved = kept = 0
    if largest is not None:
        saved = max(0, min(blocks, room // max(1, largest.input_bytes)))
    if largest is not None and saved == blocks:
        room -= blocks * largest.input_bytes
        kept = max(0, min(blocks, room // max(1, largest.graph_bytes)))
    kept = kept if keep_graphs is None else min(keep_graphs, blocks)
    return ActivationPlan(count, saved, kept, head_logits)
