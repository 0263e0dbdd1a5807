"""`slidecore calibrate`: finds and keeps how the drives under a set of directories are best driven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from slidecore import _core, host_pressure
from slidecore.calibration import Point, check_writable, save
from slidecore.calibration import calibrate as measure
from slidecore.errors import InputError
from slidecore.sizes import format_size, parse_size

_LEAST = 16 << 20
_SHARE_OF_AVAILABLE = 0.8


def calibrate(
    directories: Annotated[
        list[Path], typer.Argument(help="Directories for swap files, one on each drive, as in training.")
    ],
    size: Annotated[str, typer.Option(help="How much each pass moves: needed as disk space and memory.")] = "512MiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure which block size, queue depth and backend suit these drives, and remember it."""
    try:
        nbytes = parse_size(size, "--size")
    except ValueError as error:
        raise InputError(str(error)) from error
    if nbytes < _LEAST:
        raise InputError(f"--size {size} is too little to measure a drive with", f"Give at least {format_size(_LEAST)}")
    available = host_pressure.available_memory()
    if nbytes > available * _SHARE_OF_AVAILABLE:
        most = format_size(int(available * _SHARE_OF_AVAILABLE))
        raise InputError(
            f"--size {size} needs as much memory, and {format_size(available)} are available", f"Give at most {most}"
        )
    names = [str(directory) for directory in directories]

    def progress(point: Point) -> None:
        typer.echo(_row(point), err=as_json)

    try:
        check_writable(names)
        for name in names:
            facts = _core.inspect_directory(name)
            if facts.in_memory:
                typer.echo(f"{name} is {facts.filesystem}: memory, not a drive. Its figures say nothing.", err=True)
            elif not facts.direct:
                typer.echo(f"{name}: through the page cache ({facts.why_not_direct}).", err=True)
        typer.echo(f"{'backend':8} {'block':>8} {'depth':>5} {'read':>11} {'write':>11} {'CPU s/GB':>11}", err=as_json)
        result = measure(names, nbytes, progress)
        path = save(result, names)
    except _core.Error as error:
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(
            f"the result cannot be kept: {error}", "Set XDG_CACHE_HOME to a directory to write to"
        ) from error
    if as_json:
        typer.echo(json.dumps({"path": str(path), **result.to_json()}, indent=2))
        return
    if result.why_no_io_uring:
        typer.echo(result.why_no_io_uring)
    typer.echo(f"chosen: {_row(result.chosen)}")
    typer.echo(f"kept in {path}")


def _row(point: Point) -> str:
    return (
        f"{point.backend:8} {format_size(point.block_bytes):>8} {point.queue_depth:5} "
        f"{point.read_gb_per_s:6.2f} GB/s {point.write_gb_per_s:6.2f} GB/s "
        f"{point.read_cpu_s_per_gb:5.2f} {point.write_cpu_s_per_gb:5.2f}"
    )
