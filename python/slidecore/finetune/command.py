"""`slidecore finetune`: the run's options as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL, _TRAINING, _SAVING, _ENGINE = "Input and output", "Training", "Checkpoints and evaluation", "Device"


def finetune(
    model: Annotated[
        Path,
        typer.Option(help="Hugging Face model directory (safetensors and tokenizer).", rich_help_panel=_MODEL),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Text, .jsonl (`text` or `messages`) or .parquet file, or a directory of such files.",
            rich_help_panel=_MODEL,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write.", rich_help_panel=_MODEL)],
    glob: Annotated[
        str | None,
        typer.Option(help='Files to take from a data directory, such as "**/*.md".', rich_help_panel=_MODEL),
    ] = None,
    assistant_only: Annotated[
        bool,
        typer.Option(
            "--assistant-only",
            help="For chats: take the loss on the assistant's tokens only (the chat template has to mark them).",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace what is in the output directory.", rich_help_panel=_MODEL),
    ] = False,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.", rich_help_panel=_TRAINING)] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.", rich_help_panel=_TRAINING)] = 16,
    steps: Annotated[
        int | None, typer.Option(help="Number of steps; takes precedence over --epochs.", rich_help_panel=_TRAINING)
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=_TRAINING)] = 1.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_TRAINING)] = 1e-5,
    warmup: Annotated[
        float,
        typer.Option(help="Warm-up: a share of all steps if below 1, else their number.", rich_help_panel=_TRAINING),
    ] = 0.03,
    weight_decay: Annotated[
        float, typer.Option(help="Decay of weight matrices (never of norms and biases).", rich_help_panel=_TRAINING)
    ] = 0.01,
    max_grad_norm: Annotated[
        float | None,
        typer.Option(
            help="Clip the norm of all gradients together; skip steps where it is not finite. Takes 2 more bytes of "
            "host memory a parameter.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and dropout.", rich_help_panel=_TRAINING)] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest complete checkpoint in --out (from the beginning if there is none).",
            rich_help_panel=_SAVING,
        ),
    ] = False,
    save_every: Annotated[
        int,
        typer.Option(
            help="Steps between checkpoints; 0: only at Ctrl-C, SIGTERM or SIGHUP.",
            rich_help_panel=_SAVING,
        ),
    ] = 0,
    keep: Annotated[int, typer.Option(help="How many checkpoints to keep.", rich_help_panel=_SAVING)] = 2,
    eval_every: Annotated[
        int,
        typer.Option(
            help="Steps between evaluations on held-out data; 0: only after the last step.", rich_help_panel=_SAVING
        ),
    ] = 0,
    eval_fraction: Annotated[
        float,
        typer.Option(
            help="Share of the sequences to hold out of training for that. They are drawn at random: a neighbour may "
            "be a part of the same document.",
            rich_help_panel=_SAVING,
        ),
    ] = 0.0,
    eval_data: Annotated[
        Path | None,
        typer.Option(help="Data to evaluate on, in the formats of --data, instead.", rich_help_panel=_SAVING),
    ] = None,
    device: Annotated[
        str, typer.Option(help='"auto", "cuda", "cuda:1" or "cpu" (the host backend).', rich_help_panel=_ENGINE)
    ] = "auto",
    device_memory: Annotated[
        str | None,
        typer.Option(help='Budget of device memory, such as "20GiB"; all of it if not given.', rich_help_panel=_ENGINE),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            help='Budget of host memory, such as "100GiB"; what does not fit goes to --disk.', rich_help_panel=_ENGINE
        ),
    ] = None,
    disk: Annotated[
        list[Path] | None,
        typer.Option(help="A directory for swap files; once for each drive.", rich_help_panel=_ENGINE),
    ] = None,
    disk_memory: Annotated[
        str | None,
        typer.Option(help="What may lie there; all that the drives have if not given.", rich_help_panel=_ENGINE),
    ] = None,
    gpu_direct: Annotated[
        bool,
        typer.Option(
            "--gpu-direct", help="Saved inputs go there past host memory, by NVIDIA's cuFile.", rich_help_panel=_ENGINE
        ),
    ] = False,
    compute_dtype: Annotated[
        str,
        typer.Option(
            help='"bfloat16", "float32", or "auto": bfloat16 on a card or a CPU that is faster in it, else float32.',
            rich_help_panel=_ENGINE,
        ),
    ] = "auto",
    moments: Annotated[
        str,
        typer.Option(
            help='The optimizer\'s moments: "float32", or "8bit" for 6 bytes of host memory a parameter less.',
            rich_help_panel=_ENGINE,
        ),
    ] = "float32",
    window: Annotated[int, typer.Option(help="Slots of the window.", rich_help_panel=_ENGINE)] = 2,
    micro_batch: Annotated[
        str, typer.Option(help='Sequences that a chunk computes at once, or "auto".', rich_help_panel=_ENGINE)
    ] = "auto",
    trace_step: Annotated[
        int, typer.Option(help="Step whose lanes are recorded; 0 for none.", rich_help_panel=_ENGINE)
    ] = 3,
) -> None:
    """Fine-tune every parameter of a model, through a window of device memory.

    Ctrl-C, SIGTERM or SIGHUP finishes the step, saves a checkpoint and exits with 130 or 143; the same command
    with --resume goes on.
    """
    from slidecore.finetune.loop import run
    from slidecore.finetune.options import Options
    from slidecore.finetune.report import Progress, summary_lines

    options = Options(
        model=model,
        data=data,
        out=out,
        glob=glob,
        assistant_only=assistant_only,
        overwrite=overwrite,
        resume=resume,
        save_every=save_every,
        keep=keep,
        eval_every=eval_every,
        eval_fraction=eval_fraction,
        eval_data=eval_data,
        sequence_length=sequence_length,
        batch_size=batch_size,
        steps=steps,
        epochs=epochs,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        device=device,
        device_memory=device_memory,
        host_memory=host_memory,
        disk=tuple(disk or ()),
        disk_memory=disk_memory,
        gpu_direct=gpu_direct,
        compute_dtype=compute_dtype,
        moments=moments,
        window=window,
        micro_batch=int(micro_batch) if micro_batch.isdecimal() else micro_batch,
        trace_step=trace_step,
    )
    progress = Progress()
    for line in summary_lines(run(options, progress)):
        progress.say(line)
