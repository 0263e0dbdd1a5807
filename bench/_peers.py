"""The systems slidecore is compared with, each as strong as plain PyTorch lets it be on one GPU.

All share the model, a loss that never holds the logits of a whole batch, recomputation of each block in backward, and
gradients of a batch accumulated over micro-batches on the GPU.
"""

from __future__ import annotations

import os
from typing import Any

import _model
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper


class _TiledCrossEntropy(torch.autograd.Function):
    """sum_t -log softmax(h_t W^T)[y_t] * scale, some tokens at a time.

    The gradients are formed in the forward pass, tile by tile, while the tile's logits exist: nothing is recomputed and
    no more than `tile` rows of logits live at once. The weight's gradient adds up in float32.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, tile: int
    ) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.size(0), tile):
            rows = hidden[start : start + tile]
            wanted = labels[start : start + tile]
            counted = (wanted != -100).unsqueeze(1)
            index = wanted.clamp_min(0).unsqueeze(1)
            logits = F.linear(rows, weight).float()
            normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
            loss += ((normalizer - logits.gather(1, index)) * counted).sum() * scale
            logits.sub_(normalizer).exp_()
            logits.scatter_add_(1, index, torch.full_like(normalizer, -1.0))
            logits.mul_(counted * scale)
            grad_logits = logits.to(hidden.dtype)
            del logits
            torch.mm(grad_logits, weight, out=grad_hidden[start : start + tile])
            grad_weight += grad_logits.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None


class TiledHead(nn.Module):
    """The output projection together with its loss: a module, so that hooks on modules see the weight being used."""

    def __init__(self, weight: nn.Parameter, tile: int) -> None:
        super().__init__()
        self.weight = weight
        self._tile = tile

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.size(-1))
        return _TiledCrossEntropy.apply(flat, self.weight, labels.reshape(-1), scale, self._tile)  # type: ignore[no-any-return]


class PeerModel(nn.Module):
    """A transformers causal model whose head and loss are a `TiledHead`. Parameter names stay as they were."""

    def __init__(self, causal: nn.Module, tile: int) -> None:
        super().__init__()
        self.model: Any = causal.model
        self.lm_head = TiledHead(causal.lm_head.weight, tile)  # type: ignore[arg-type,union-attr]

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        hidden = self.model(input_ids=ids, use_cache=False).last_hidden_state
        return self.lm_head(hidden, labels, scale)  # type: ignore[no-any-return]

    def recompute_blocks(self) -> None:
        """Each block keeps only its input in forward and runs again in backward."""
        for index, block in enumerate(self.model.layers):
            self.model.layers[index] = checkpoint_wrapper(
                block, CheckpointImpl.NO_REENTRANT, preserve_rng_state=False, determinism_check="none"
            )


def replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Puts `new` wherever `old` is registered."""
    for module in model.modules():
        for key, present in list(module._parameters.items()):
            if present is old:
                module._parameters[key] = new


class System:
    """One way of training. `step` returns the batch's mean loss as a tensor and may leave work running."""

    parameters: int
    notes: dict[str, Any]

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def trace(self, ids: torch.Tensor) -> dict[str, Any]:
        """What a trace of two more steps says; most systems have none."""
        return {}

    def synchronize(self) -> None:
        """Returns when every step taken so far is complete, its update included."""
        raise NotImplementedError

    def moved(self) -> dict[str, int]:
        """What was moved to and from disk so far; most systems have no disk."""
        return {}

    def disk_alone_s(self, moved: dict[str, float]) -> float:
        """Seconds that the disk takes by itself for what was moved in a step; most systems have no disk."""
        return 0.0

    def facts(self) -> dict[str, Any]:
        """What the system itself reports after a run."""
        return {}

    def close(self) -> None:
        """Gives back what outlives the object."""


def _micro_batches(ids: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    labels = _model.shifted_labels(ids)
    return list(zip(ids.split(size), labels.split(size), strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Resident(System):
    """Everything on the GPU: bfloat16 weights and gradients for compute, float32 master weights, moments and
    accumulated gradients, torch's fused AdamW. 18 bytes per parameter, and 2 more while a block's gradient is new."""

    def __init__(self, shape: _model.Shape, device: torch.device, seed: int, options: dict[str, Any]) -> None:
        self._device = device
        self._micro_batch = int(options.pop("micro_batch", 8))
        recompute = bool(options.pop("recompute", True))
        tile = int(options.pop("tile", 4096))
        lr, weight_decay = float(options.pop("lr")), float(options.pop("weight_decay"))
        kernels = str(options.pop("kernels", "torch"))
        refuse(options)
        causal = _model.build_empty(shape)
        _model.use_kernels(causal, kernels, device)
        self.parameters = _model.parameter_count(causal)
        self._model = PeerModel(causal, tile)
        self._weights: list[torch.Tensor] = []
        self._masters: list[torch.Tensor] = []
        for name, value in _model.initial_values(causal, seed, device):
            master = nn.Parameter(value)
            weight = nn.Parameter(value.to(torch.bfloat16))
            weight.register_post_accumulate_grad_hook(self._accumulate(master))
            replace_parameter(self._model, causal.get_parameter(name), weight)
            self._weights.append(weight)
            self._masters.append(master)
        self._model.to(device)
        if recompute:
            self._model.recompute_blocks()
        self._optimizer = torch.optim.AdamW(self._masters, lr=lr, weight_decay=weight_decay, fused=True)
        self.notes = {
            "micro_batch": self._micro_batch,
            "recompute": recompute,
            "kernels": kernels,
            "loss_tile_tokens": tile,
        }

    @staticmethod
    def _accumulate(master: nn.Parameter) -> Any:
        def hook(weight: nn.Parameter) -> None:
            assert weight.grad is not None
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad += weight.grad
            weight.grad = None

        return hook

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        scale = 1.0 / (ids.size(0) * (ids.size(1) - 1))
        total = torch.zeros((), dtype=torch.float32, device=ids.device)
        for part, labels in _micro_batches(ids, self._micro_batch):
            loss = self._model(part, labels, scale)
            loss.backward()
            total += loss.detach()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._masters)
        return total

    def synchronize(self) -> None:
        _synchronize(self._device)


class Fsdp2Offload(System):
    """FSDP2 with CPU offload on one rank, as its documentation recommends it: `fully_shard` on each block, on the
    embedding, on the head and on the root; float32 parameters in pinned host memory; bfloat16 compute; torch's fused
    AdamW on the CPU with a thread per processor. While a batch runs in several micro-batches its gradients stay on the
    GPU (`set_requires_gradient_sync`), so they come down once a step."""

    def __init__(self, shape: _model.Shape, device: torch.device, seed: int, options: dict[str, Any]) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        self._device = device
        self._micro_batch = int(options.pop("micro_batch", 64))
        recompute = bool(options.pop("recompute", True))
        tile = int(options.pop("tile", 4096))
        reduce = str(options.pop("reduce_dtype", "bfloat16"))
        lr, weight_decay = float(options.pop("lr")), float(options.pop("weight_decay"))
        kernels = str(options.pop("kernels", "torch"))
        refuse(options)
        threads = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        if device.type == "cuda":
            # One rank talks to nobody; the loopback interface exists everywhere.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
        mesh = init_device_mesh(device.type, (1,))
        pinned = device.type == "cuda"
        settings: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=getattr(torch, reduce)),
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned),
        }
        causal = _model.build_empty(shape)
        _model.use_kernels(causal, kernels, device)
        self.parameters = _model.parameter_count(causal)
        model = PeerModel(causal, tile)
        names = {parameter: name for name, parameter in causal.named_parameters()}
        if recompute:
            model.recompute_blocks()

        def fill(module: nn.Module) -> nn.Module:
            """Gives a module's parameters their values just before they are sharded, which moves them to the host."""
            for parameter in list(module.parameters()):
                name = names.pop(parameter, None)
                if name is not None:
                    value = _model.initial_value(name, parameter.size(), seed, device)
                    replace_parameter(model, parameter, nn.Parameter(value))
            return module

        for block in model.model.layers:
            fully_shard(fill(block), **settings)
        if not shape.tied:
            fully_shard(fill(model.model.embed_tokens), **settings)
            fully_shard(fill(model.lm_head), reshard_after_forward=False, **settings)
        fully_shard(fill(model), **settings)
        self._model: Any = model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        self.notes = {
            "micro_batch": self._micro_batch,
            "recompute": recompute,
            "loss_tile_tokens": tile,
            "reduce_dtype": reduce,
            "pinned": pinned,
            "optimizer_threads": threads,
        }

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        scale = 1.0 / (ids.size(0) * (ids.size(1) - 1))
        total = torch.zeros((), dtype=torch.float32, device=ids.device)
        parts = _micro_batches(ids, self._micro_batch)
        for index, (part, labels) in enumerate(parts):
            last = index + 1 == len(parts)
            self._model.set_requires_gradient_sync(last)
            self._model.set_is_last_backward(last)
            loss = self._model(part, labels, scale)
            loss.backward()
            total += loss.detach()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def synchronize(self) -> None:
        _synchronize(self._device)

    def facts(self) -> dict[str, Any]:
        if self._device.type == "cuda" and hasattr(torch.cuda, "host_memory_stats"):
            stats = torch.cuda.host_memory_stats()
            return {"pinned_host_memory": {key: stats[key] for key in stats if key.endswith("bytes.peak")}}
        return {}

    def close(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def refuse(options: dict[str, Any]) -> None:
    """Every option must have been taken: a misspelt one would silently measure something else."""
    if options:
        raise ValueError(f"unknown options: {', '.join(sorted(options))}")
