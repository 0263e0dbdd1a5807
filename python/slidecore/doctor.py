"""`slidecore doctor`: what this machine offers, and what to do about what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from slidecore import machine_checks
from slidecore.machine_checks import Check

_STYLES: dict[Literal["ok", "note", "problem"], str] = {"ok": "green", "note": "yellow", "problem": "red"}


def doctor(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(help="Directories for swap files, one on each drive; the current one if none is given."),
    ] = None,
    disk: Annotated[
        list[Path] | None, typer.Option(help="Another way to give a directory, as in training; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not measure rates.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at driver, card, memory limits, io_uring, cuFile and drives, and say what to do. Exit code 1: a problem."""
    places = [*(directories or []), *(disk or [])] or [Path(".")]
    checks = machine_checks.run([str(directory) for directory in places], rates=not quick)
    if as_json:
        typer.echo(json.dumps({"checks": [check.to_json() for check in checks]}, indent=2))
    else:
        _show(checks)
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(1)


def _show(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 1))
    for check in checks:
        finding = Text(check.finding)
        if check.advice:
            finding.append(f"\n{check.advice}", style=_STYLES[check.status])
        table.add_row(Text(check.status, style=_STYLES[check.status]), Text(check.name, style="bold"), finding)
    Console().print(table)
