"""Compiles every kernel for cards that are not here: python _compile_kernels.py TARGET..., e.g. hip:gfx942 cuda:90.

A process of its own for the tests: it must not run with TRITON_INTERPRET. Prints a line for each compiled kernel:
target, kernel, options, bytes of code. With --dump DIR the assembly goes there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from slidecore.triton import accumulate, adamw, cross_entropy, merge, scale, split, square_sum
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import int16

WARP = {"hip:gfx942": 64, "hip:gfx950": 64}  # 32 elsewhere
TABLE = {"table": "*i32"}


Made = tuple[str, Any, dict[str, Any], dict[str, Any], dict[str, Any]]


def _adamw(gradient: str, is_split: bool, quantised: bool, loads: str = "plain") -> Made:
    config = adamw.DEFAULT_QUANTISED if quantised else adamw.DEFAULT
    scale = "*fp32" if quantised else "constexpr"
    signature = {
        "weight": "*i16" if is_split else "*fp32", "residual": "*i16" if is_split else "constexpr",
        "gradient": gradient, "exp_avg": "*i8" if quantised else "*fp32",
        "exp_avg_sq": "*u8" if quantised else "*fp32", "exp_avg_scale": scale, "exp_avg_sq_scale": scale,
        **TABLE, "scalars": "*fp32", "factor": "*fp32",
    }  # fmt: skip
    constants = {
        "SPLIT": is_split, "QUANTISED": quantised, "HAS_FACTOR": True, "USUAL": quantised,
        "EARLY": loads == "early", "AHEAD": loads == "ahead", "BLOCK": config.block, "STEPS": config.steps,
    }  # fmt: skip
    options = {"num_warps": config.warps, "enable_fp_fusion": False}
    name = f"adamw {'split' if is_split else 'whole'} {gradient} {'8-bit' if quantised else 'fp32'} {loads}"
    return name, adamw._adamw_kernel, signature, constants, options


def kernels() -> Iterator[Made]:
    """Name, kernel, signature without constants, constants, options."""
    n = {"n": "i32"}
    yield "split", split._split_kernel, {"master": "*i32", "weight": "*i16", "residual": "*i16", **n}, {
        "BLOCK": split.DEFAULT.block}, {"num_warps": split.DEFAULT.warps}  # fmt: skip
    yield "merge", merge._merge_kernel, {"weight": "*i16", "residual": "*i16", "master": "*i32", **n}, {
        "BLOCK": merge.DEFAULT.block}, {"num_warps": merge.DEFAULT.warps}  # fmt: skip
    yield _adamw("*i16", True, False)
    for loads in ("plain", "early", "ahead"):
        yield _adamw("*i16", True, True, loads)
    yield _adamw("*fp32", False, True)
    for source, name in ((int16, "bf16"),):
        for last in (False, True):
            config = accumulate.DEFAULT
            signature = {"accumulator": "*fp32", "sources": "*i64", "out": "*i16" if last else "constexpr",
                         "partials": "*fp32", **TABLE}  # fmt: skip
            constants = {"SOURCE": source, "ALIGNED": True, "ROUND": last, "BLOCK": config.block, "STEPS": config.steps}
            yield f"accumulate {name}{' last' if last else ''}", accumulate._accumulate_kernel, signature, constants, {
                "num_warps": config.warps}  # fmt: skip
    config = square_sum.DEFAULT
    yield "square_sum", square_sum._square_sum_kernel, {"plane": "*i16", **TABLE, "partials": "*fp32"}, {
        "BLOCK": config.block, "STEPS": config.steps}, {"num_warps": config.warps}  # fmt: skip
    yield from cross_entropy_kernels()


def cross_entropy_kernels() -> Iterator[Made]:
    floats = dict.fromkeys(("smoothing", "z_loss", "inner", "outer"), "fp32")
    sizes = dict.fromkeys(
        ("logits_stride", "gradient_stride", "statistics_stride", "vocabulary", "size", "first"), "i32"
    )
    common = {"labels": "*i64", "weights": "*fp32", "statistics": "*fp32", "losses": "*fp32", "divisor": "*fp32",
              "log_probabilities": "*fp32", "ignore_index": "i32", **floats, **sizes}  # fmt: skip
    size = cross_entropy._launch_size(128256)
    options = {"num_warps": size.pop("num_warps")}
    for logits in ("*bf16",):
        for tanh in (False, True):
            signature = {"logits": logits, "gradient": logits, **common}
            constants = {"TANH": tanh, "SMOOTH": tanh, "WEIGHTED": tanh, "GRADIENT": True, **size}
            for name in ("cross_entropy", "statistics", "gradient"):
                kernel = getattr(cross_entropy, f"_{name}_kernel")
                yield f"{name} {logits}{' tanh' if tanh else ''}", kernel, signature, constants, options
    yield "scale", scale._scale_kernel, {"x": "*bf16", "factor": "*fp32", "n": "i32"}, {"BLOCK": 2048, "STEPS": 16}, {
        "num_warps": 8}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    for name, kernel, given, constants, options in kernels():
        if arguments.only not in name:
            continue
        signature = {p: given.get(p, "constexpr") for p in kernel.arg_names}
        fixed = {p: constants.get(p) for p, kind in signature.items() if kind == "constexpr"}
        # Pointers and lengths as a caller in slidecore gives them: multiples of 16.
        attributes = {
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(signature.values())
            if kind.startswith("*") or (kind == "i32" and list(signature)[i] != "ignore_index")
        }
        for target in arguments.targets:
            backend, arch = target.split(":")
            if "USUAL" in fixed:  # NVIDIA's instructions
                fixed["USUAL"] = constants["USUAL"] and backend == "cuda"
            gpu = GPUTarget(backend, int(arch) if arch.isdigit() else arch, WARP.get(target, 32))
            source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
            compiled = triton.compile(source, target=gpu, options=options)
            code = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
            print(f"{target}\t{name}\t{options}\t{len(code)}", flush=True)
            if arguments.dump:
                arguments.dump.mkdir(parents=True, exist_ok=True)
                for kind in ("ttgir", "ptx" if backend == "cuda" else "amdgcn"):
                    (arguments.dump / f"{target}-{name}.{kind}".replace(" ", "_").replace("*", "")).write_text(
                        compiled.asm[kind]
                    )


if __name__ == "__main__":
    main()
