"""What fits where: host and device bytes of Llama-like models, by the planner's own arithmetic. Nothing is measured.

python bench/fits.py
"""

from __future__ import annotations

import argparse
import json
from typing import get_args

import torch
from slidecore.partition import partition
from slidecore.planes import Moments, lay_out, state_bytes
from slidecore.planner import device_needs
from torch import nn

# hidden, layers, key-value width, intermediate, vocabulary: shapes of common open models, untied.
SHAPES = {
    "2B": (2048, 24, 1024, 8192, 128256),
    "4B": (2560, 36, 1024, 9728, 151936),
    "8B": (4096, 32, 1024, 14336, 128256),
    "14B": (5120, 40, 1024, 17408, 151936),
    "32B": (5120, 64, 1024, 25600, 151936),
    "70B": (8192, 80, 1024, 28672, 128256),
}


def model_of(hidden: int, layers: int, key_value: int, intermediate: int, vocabulary: int) -> nn.Module:
    """Linear layers of a decoder's sizes, without storage."""

    def block() -> nn.Module:
        widths = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden)]
        widths += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
        return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in widths))

    with torch.device("meta"):
        return nn.ModuleDict(
            {
                "embedding": nn.Embedding(vocabulary, hidden),
                "blocks": nn.ModuleList(block() for _ in range(layers)),
                "head": nn.Linear(hidden, vocabulary, bias=False),
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=2)
    window = parser.parse_args().window
    rows = []
    for name, shape in SHAPES.items():
        chunks = partition(model_of(*shape))
        lay_out(chunks)
        needs = device_needs(chunks, torch.bfloat16, window, True, 2)
        parameters = sum(e.numel for c in chunks for e in c.entries)
        host = {moments: state_bytes(chunks, torch.bfloat16, moments=moments) for moments in get_args(Moments)}
        rows.append(
            {
                "model": name,
                "parameters": parameters,
                "host_planes_gib": {moments: round(size / 2**30, 1) for moments, size in host.items()},
                "host_bytes_per_parameter": {moments: round(size / parameters, 4) for moments, size in host.items()},
                "device_gib_without_activations": round(needs.total / 2**30, 1),
            }
        )
    print(json.dumps({"bench": "fits", "window": window, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
