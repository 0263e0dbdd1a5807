"""The main job on input that every machine has: a small Llama learns the source text of Python's standard library.

    python -m slidecore.finetune.demo --out demo-output

makes an ordinary Hugging Face model directory (random weights, a tokenizer of bytes) in demo-output/model, and
fine-tunes it into demo-output/trained with a device budget several times smaller than the model's planes.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slidecore.errors import MissingDependencyError, SlidecoreError
from slidecore.finetune.options import Options

END_OF_TEXT = "<|endoftext|>"
# Short sequences and small batches, because many small steps teach a small model more than few large ones.
STEPS = 400


@dataclass(frozen=True)
class Size:
    """Of the demo's model, with a budget below its weights and far below its planes, and the learning rate it takes."""

    hidden: int
    layers: int
    device_memory: str
    lr: float


# Two to four minutes on a CPU: narrow, but with enough blocks that a window of two is a small part of them.
_ON_CPU = {
    torch.bfloat16: Size(hidden=192, layers=12, device_memory="8MiB", lr=2e-3),
    torch.float32: Size(hidden=192, layers=12, device_memory="16MiB", lr=2e-3),
}
# The workspaces of a card's libraries alone would fill the budgets above.
_ON_CARD = Size(hidden=768, layers=16, device_memory="224MiB", lr=1e-3)


def choose_size(device: str, compute_dtype: str = "auto") -> tuple[Size, torch.dtype]:
    """What suits `device`, and the dtype to compute in."""
    from slidecore.finetune.compute import choose_compute_dtype

    dtype = choose_compute_dtype(compute_dtype, device)
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return _ON_CPU[dtype] if on_cpu else _ON_CARD, dtype


def make_tokenizer() -> Any:
    """A fast transformers tokenizer whose tokens are the 256 bytes, and the end of a text (token 256)."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingDependencyError(
            "transformers is not installed", "Run: pip install 'slidecore[finetune]'"
        ) from error
    # The order of GPT-2's byte alphabet: the printable bytes stand for themselves, the others for what lies above 255.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    # A byte-pair encoding without any pairs.
    tokenizer = Tokenizer(models.BPE(vocab={symbols[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def make_model(path: Path, *, hidden: int = 192, layers: int = 12, seed: int = 0) -> None:
    """Writes a Llama of random float32 weights and the tokenizer of bytes as an ordinary model directory.

    Args:
        path: directory to write.
        hidden: width, a multiple of 64.
        layers: number of blocks.
        seed: of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from slidecore.integrations.huggingface import without_bars

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=(hidden * 8 // 3 + 63) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # Wider than for large models: narrow layers would pass too little signal on, and learn slowly at first.
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with without_bars():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


def training(model: Path, out: Path, size: Size, dtype: torch.dtype, steps: int, device: str) -> Options:
    """The demo's run: `model` learns the source of Python's standard library, and is written to `out`."""
    return Options(
        model=model,
        data=Path(sysconfig.get_path("stdlib")),
        glob="*.py",
        out=out,
        overwrite=True,
        sequence_length=128,
        batch_size=4,
        steps=steps,
        lr=size.lr,
        warmup=20,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        device=device,
        device_memory=size.device_memory,
        compute_dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the demo and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m slidecore.finetune.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="directory to write")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args(argv)

    from slidecore.cli import show_error
    from slidecore.finetune.report import Progress, summary_lines

    try:
        progress = Progress()
        model = arguments.out / "model"
        size, dtype = choose_size(arguments.device)
        if size is not _ON_CARD:
            # Its operations are so small that waking a second thread for each takes longer than what it would spare.
            torch.set_num_threads(1)
        with progress.stage(f"Making a small Llama of random weights in {model}"):
            make_model(model, hidden=size.hidden, layers=size.layers)

        from slidecore.finetune.loop import run

        options = training(model, arguments.out / "trained", size, dtype, arguments.steps, arguments.device)
        for line in summary_lines(run(options, progress)):
            progress.say(line)
    except SlidecoreError as error:
        show_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
