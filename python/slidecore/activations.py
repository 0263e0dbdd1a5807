"""How blocks run for each shape of input: micro-batches, which inputs leave the device, which blocks keep graphs."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slidecore.calls import Call, Output
from slidecore.captures import unnoticed
from slidecore.graphs import VisitGraph
from slidecore.kept import KeptParameter, detached
from slidecore.partition import Chunk
from slidecore.planner import (
    LARGEST_TILE,
    SMALLEST_TILE,
    ActivationPlan,
    BlockCosts,
    DeviceNeeds,
    HeadCosts,
    plan_activations,
    plan_head,
)
from slidecore.repeating import Buffers, RandomState, unchanged_buffers
from slidecore.sample_values import alone, beside_another
from slidecore.visit import ChangedWeightError, Use, leaves_of, run_again, run_captured, swapped

if TYPE_CHECKING:
    from slidecore.engine import Engine

logger = logging.getLogger("slidecore")

# Tensors smaller than this are not worth a trip to host memory.
SMALLEST_SAVED = 4096
# What a run with fewer samples may raise and the whole batch would, too.
_NOT_OF_THE_SPLIT = (torch.OutOfMemoryError, ChangedWeightError)
_CROSS_BATCH = (nn.modules.batchnorm._BatchNorm,)


class Activations:
    """Plans for the shapes seen so far, each made at its first visit by running one sample."""

    def __init__(
        self,
        engine: Engine,
        *,
        budget: int | None,
        needs: DeviceNeeds,
        head: HeadCosts,
        blocks: Sequence[Chunk],
        micro_batch: int | None,
        keep_graphs: int | None,
    ) -> None:
        self._engine = engine
        self._budget = budget
        self._needs = needs
        self._head = head
        self._blocks = len(blocks)
        self._structures = {block: tuple(e.shape for e in block.entries) for block in blocks}
        self._micro_batch = micro_batch
        self._keep_graphs = keep_graphs
        self.head_logits = plan_head(needs, head, budget)
        self.position = 0  # blocks visited in this forward
        self._plans: dict[Any, ActivationPlan] = {}
        self._plan = ActivationPlan(1, 0, 0)
        self._whole_batch: set[str] = set()
        self._unclear: set[str] = set()  # classes of which it was told that a shape was
        self._separable: set[str] = set()  # classes of blocks whose samples were seen not to depend on each other
        self._numbers_vary: set[tuple[str, int]] = set()
        self._batched: dict[tuple[str, int], list[bool]] = {}  # by class of block and number of outputs
        self._graph_bytes: dict[Any, int] = {}  # of one sample, by what plans go by
        self._largest: dict[Any, BlockCosts] = {}  # by structure of block: what one may take of the device

    def keeps_graph(self, use: Use) -> bool:
        if use.chunk.kind != "block":
            return True
        return 0 <= self._from_last() < self._plan.kept_graphs

    def _from_last(self) -> int:
        """Blocks that follow; negative where blocks are called more often than there are blocks."""
        return self._blocks - 1 - self.position

    def stays_on_device(self, use: Use, tensor: torch.Tensor, requires_grad: bool) -> bool:
        """Masks, positions and other inputs that all blocks share stay; what the last block produced may go."""
        if not requires_grad or tensor.numel() * tensor.element_size() < SMALLEST_SAVED:
            return True
        return 0 <= self._from_last() < self._plan.saved_on_device

    def head_tile(self, vocabulary: int) -> int:
        """Tokens whose logits the head makes at once, as the budget allows."""
        logits = min(self.head_logits, self._plan.head_logits)
        return int(max(SMALLEST_TILE, min(LARGEST_TILE, logits // vocabulary)))

    def refuse_micro_batches(self, use: Use) -> None:
        """Blocks of this class have outputs that cannot be joined from micro-batches."""
        kind = type(use.module).__name__
        self._whole_batch.add(kind)
        self._plans.clear()
        warnings.warn(
            f"{kind} returns a tensor that has no batch dimension, or a number that depends on the samples, so its "
            f"batch is not split into micro-batches",
            stacklevel=2,
        )

    def plan_micro_batches(
        self, use: Use, call: Call, tensors: Sequence[torch.Tensor], kept: Sequence[KeptParameter]
    ) -> tuple[int, list[bool]]:
        """How many micro-batches a visit runs in, and which of its tensors are split along dimension 0."""
        whole = 1, [False] * len(tensors)
        if use.chunk.kind != "block":
            return whole
        main = next((t for t in tensors if t.is_floating_point() and t.dim() >= 2), None)
        if main is None:
            return whole
        batch = main.shape[0]
        structure = (type(use.module), self._structures[use.chunk], len(kept))
        key = (structure, tuple((t.shape, t.dtype, t.requires_grad) for t in tensors), use.module.training)
        split = self._splittable(use, tensors, main)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan_for(use, call, tensors, kept, split, main, key)
            self._plans[key] = plan
        self._plan = plan
        return (plan.micro_batches, split) if plan.micro_batches > 1 and batch > 1 else whole

    def _splittable(self, use: Use, tensors: Sequence[torch.Tensor], main: torch.Tensor) -> list[bool]:
        batch = main.shape[0]
        kind = type(use.module).__name__
        if batch < 2 or kind in self._whole_batch or any(isinstance(m, _CROSS_BATCH) for m in use.module.modules()):
            return [False] * len(tensors)
        others = [t for t in tensors if t is not main and t.dim() > 0 and t.shape[0] == batch]
        # A vector or matrix over positions looks like one over samples when both counts are equal.
        if any(t.dim() <= 2 for t in others) and main.dim() > 2 and main.shape[1] == batch:
            # For this shape only: a run that goes on from a checkpoint has not seen the shapes before it.
            if kind not in self._unclear:
                self._unclear.add(kind)
                warnings.warn(
                    f"{kind}: batch and sequence are both {batch} long, so it is unclear which inputs to split; such "
                    f"batches run whole",
                    stacklevel=2,
                )
            return [False] * len(tensors)
        return [t is main or any(t is o for o in others) for t in tensors]

    def _plan_for(
        self,
        use: Use,
        call: Call,
        tensors: Sequence[torch.Tensor],
        kept: Sequence[KeptParameter],
        split: list[bool],
        main: torch.Tensor,
        key: Any,
    ) -> ActivationPlan:
        splittable = any(split)
        batch = main.shape[0] if splittable else 1
        if self._budget is not None and (key, splittable) not in self._graph_bytes:
            # Copies: the block may write to what it is given.
            sample = [(t[:1] if s else t).clone() for t, s in zip(tensors, split, strict=True)]
            try:
                self._graph_bytes[key, splittable] = self._probe(use, call, sample, kept)
            except Exception as error:  # a block's own code, which may count on all of what is no batch
                if not splittable or isinstance(error, _NOT_OF_THE_SPLIT):
                    raise
                return self._plan_whole(use, call, tensors, kept, main, key, f"cannot run with one sample ({error})")
        inputs = sum(t.numel() * t.element_size() for t in tensors if t.requires_grad) or (
            main.numel() * main.element_size()
        )
        own = BlockCosts(inputs, self._graph_bytes.get((key, splittable), 0), batch)
        plan = plan_activations(
            budget=self._budget,
            needs=self._needs,
            head=self._head,
            blocks=self._blocks,
            block=own,
            largest=self._largest_of(use.chunk, own),
            micro_batch=min(self._micro_batch, batch) if self._micro_batch is not None else None,
            keep_graphs=self._keep_graphs,
        )
        kind = type(use.module).__name__
        if plan.micro_batches > 1 and kind not in self._separable:
            try:
                independent = self._independent(use, call, tensors, kept, split)
            except Exception as error:
                if isinstance(error, _NOT_OF_THE_SPLIT):
                    raise
                return self._plan_whole(use, call, tensors, kept, main, key, f"cannot run with two samples ({error})")
            if not independent:
                reason = (
                    "changes buffers, or has samples along dimension 0 that depend on each other (batch_first=False?)"
                )
                return self._plan_whole(use, call, tensors, kept, main, key, reason)
            self._separable.add(kind)
        logger.info("%s with batch %d: %s", type(use.module).__name__, batch, plan)
        return plan

    def _plan_whole(
        self,
        use: Use,
        call: Call,
        tensors: Sequence[torch.Tensor],
        kept: Sequence[KeptParameter],
        main: torch.Tensor,
        key: Any,
        reason: str,
    ) -> ActivationPlan:
        kind = type(use.module).__name__
        self._whole_batch.add(kind)
        warnings.warn(f"{kind} {reason}, so its batch is not split into micro-batches", stacklevel=3)
        return self._plan_for(use, call, tensors, kept, [False] * len(tensors), main, key)

    def _largest_of(self, chunk: Chunk, own: BlockCosts) -> BlockCosts | None:
        """What any block may take of the device; None while blocks of some structure have not been seen.

        The plans that were made knowing less are dropped.
        """
        structures = set(self._structures.values())
        if len(structures) == 1:
            return own
        structure = self._structures[chunk]
        larger = own.maximum(self._largest.get(structure, own))
        if larger != self._largest.get(structure):
            self._largest[structure] = larger
            self._plans.clear()
        if len(self._largest) < len(structures):
            return None
        return functools.reduce(BlockCosts.maximum, self._largest.values())

    def batched_outputs(
        self,
        use: Use,
        call: Call,
        tensors: Sequence[torch.Tensor],
        requires_grad: Sequence[bool],
        split: Sequence[bool],
        kept: Sequence[KeptParameter],
        outputs: int,
    ) -> list[bool]:
        """Which of a block's outputs have rows for each sample along dimension 0. See also `numbers_vary`."""
        kind = type(use.module).__name__
        if (kind, outputs) not in self._batched:
            with self._beside(use, kept, graph=True) as state:
                self._samples(use, call, tensors, requires_grad, split, state)
        return self._batched[kind, outputs]

    def numbers_vary(self, use: Use, outputs: int) -> bool:
        """Whether numbers beside those outputs, or their structure, are others for two samples than for one."""
        return (type(use.module).__name__, outputs) in self._numbers_vary

    def _samples(
        self,
        use: Use,
        call: Call,
        tensors: Sequence[torch.Tensor],
        requires_grad: Sequence[bool],
        split: Sequence[bool],
        state: RandomState,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Runs one sample and two, which tells the outputs with rows for each.

        Returns:
            Outputs of one, detached, and inputs and outputs of two.
        """
        _, said_of_one, one = self._run_rows(use, call, tensors, requires_grad, split, state, [0])
        one = [t.detach() for t in one]
        own, said_of_two, two = self._run_rows(use, call, tensors, requires_grad, split, state, [0, 1])
        kind = type(use.module).__name__
        if len(one) != len(two) or not said_of_two.says_the_same(said_of_one):
            self._numbers_vary.add((kind, len(two)))
            self._batched[kind, len(two)] = [False] * len(two)
            return one, own, two
        self._batched[kind, len(two)] = [
            a.dim() == b.dim() > 0 and b.shape[0] == 2 * a.shape[0] > 0 for a, b in zip(one, two, strict=True)
        ]
        return one, own, two

    def _run_rows(
        self,
        use: Use,
        call: Call,
        tensors: Sequence[torch.Tensor],
        requires_grad: Sequence[bool],
        split: Sequence[bool],
        state: RandomState,
        rows: list[int],
    ) -> tuple[list[torch.Tensor], Output, list[torch.Tensor]]:
        """Runs the block on these samples, from this random state; returns inputs, output, and the output's tensors."""
        state.set(self._engine.backend.torch_device)
        own = [t.detach()[rows] if s else t.detach() for t, s in zip(tensors, split, strict=True)]
        own = [t.requires_grad_(r) for t, r in zip(own, requires_grad, strict=True)]
        return own, *run_captured(use, list(use.module.modules()), call, [t.clone() for t in own], [])

    @contextlib.contextmanager
    def _beside(self, use: Use, kept: Sequence[KeptParameter], *, graph: bool) -> Iterator[RandomState]:
        """Runs of the block inside leave nothing behind; its weights have gradients of their own if `graph`.

        Yields the random state, which is set again afterwards.
        """
        state = RandomState.capture(self._engine.backend.torch_device)
        try:
            with (
                self._engine.holding(use.chunk, backward=False) as slot,
                swapped(use.chunk, leaves_of(use.chunk, slot, graph)),
                detached(kept),
                unnoticed(list(use.module.modules())),
                unchanged_buffers(use.module),
                torch.enable_grad(),
            ):
                yield state
        finally:
            state.set(self._engine.backend.torch_device)

    def _independent(
        self,
        use: Use,
        call: Call,
        tensors: Sequence[torch.Tensor],
        kept: Sequence[KeptParameter],
        split: list[bool],
    ) -> bool:
        """Whether neither of two samples' outputs depends on the other's inputs.

        By their exact gradients; and by their values, where they mix past autograd (a scale from a detached maximum).
        """
        wanted = [s and t.is_floating_point() for t, s in zip(tensors, split, strict=True)]
        with self._beside(use, kept, graph=False) as state:
            twins = []
            for sample in (0, 1):
                # Before the second run: a cache that the first has filled, or let grow, is no state.
                buffers = Buffers.capture(use.module)
                _, _, outputs = self._run_rows(use, call, tensors, wanted, split, state, [sample, sample])
                twins.append([t.detach() for t in outputs])
            if buffers.changed():
                return False  # each micro-batch would start from those that the one before has left
            random = RandomState.capture(self._engine.backend.torch_device)
            one, inputs, outputs = self._samples(use, call, tensors, wanted, split, state)
            batched = self._batched[type(use.module).__name__, len(outputs)]
            # The others, if they cannot be joined, are found and reported by the first visit.
            compared = [i for i, rows in enumerate(batched) if rows and outputs[i].is_floating_point()]
            two = [outputs[i].detach() for i in compared]
            if not beside_another(two, [[twin[i] for i in compared] for twin in twins]):
                return False
            if random.is_same(state) and not alone(two, [one[i] for i in compared]):
                return False
            outputs = [o for o, rows in zip(outputs, batched, strict=True) if rows and o.requires_grad]
            for sample in range(2 if outputs else 0):
                parts = [o.chunk(2)[sample] for o in outputs]
                # Not autograd.grad, which checkpointing inside the block may refuse.
                torch.autograd.backward(parts, [torch.randn_like(p) for p in parts], retain_graph=True)
                for tensor in inputs:
                    if tensor.grad is not None and bool(tensor.grad[1 - sample].any()):
                        return False
                    tensor.grad = None
        return True

    def _probe(self, use: Use, call: Call, tensors: Sequence[torch.Tensor], kept: Sequence[KeptParameter]) -> int:
        """Bytes that the graph of one block saves for one sample, found by running it once."""
        state = RandomState.capture(self._engine.backend.torch_device)
        weights = [each.parameter.detach() for each in kept]
        inputs = [*tensors, *weights]
        graph = VisitGraph(keep=True, known=weights)
        with (
            self._engine.holding(use.chunk, backward=False) as slot,
            unnoticed(list(use.module.modules())),
            unchanged_buffers(use.module),
        ):

            def module(own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
                return run_again(use, slot, call, own, kept)

            graph.run(slot, inputs, [t.is_floating_point() for t in inputs], self._engine.visits.anchor, module)
        state.set(self._engine.backend.torch_device)
        return graph.nbytes
