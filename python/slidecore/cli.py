"""The command line. Every command is a function in a module of its own; this one puts them together."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import IO, TYPE_CHECKING, cast

from slidecore.errors import MissingDependencyError, SlidecoreError
from slidecore.outlet import Outlet

if TYPE_CHECKING:
    import typer

_EXTRA = "pip install 'slidecore[finetune]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0: done. 1: stopped on the way. 2: something given cannot be used, and nothing was started. 130: interrupted.
    143: ended by SIGTERM or SIGHUP.

    Args:
        argv: arguments without the program's name; None: those of the process.
    """
    try:
        app = _app()
        result = app(args=list(sys.argv[1:] if argv is None else argv), prog_name="slidecore", standalone_mode=True)
    except SlidecoreError as error:
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted", "")
        return 130
    except SystemExit as request:  # how typer ends, for --help and wrong arguments alike
        return request.code if isinstance(request.code, int) else int(request.code is not None)
    return result if isinstance(result, int) else 0


def _app() -> typer.Typer:
    try:
        import typer
    except ImportError as error:
        raise MissingDependencyError(
            "the command line needs typer, which is not installed", f"Run: {_EXTRA}"
        ) from error
    from slidecore.calibrate import calibrate
    from slidecore.doctor import doctor
    from slidecore.finetune.command import finetune

    app = typer.Typer(
        name="slidecore",
        no_args_is_help=True,
        add_completion=False,
        # Tracebacks are for bugs, and then the whole of Python's is wanted.
        pretty_exceptions_enable=False,
        help="Fine-tune every parameter of models larger than GPU memory, on one GPU.",
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"slidecore {_version()}")
            raise typer.Exit

    @app.callback()
    def common(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Show the version and exit."
        ),
    ) -> None:
        pass

    app.command(name="finetune")(finetune)
    app.command(name="doctor")(doctor)
    app.command(name="calibrate")(calibrate)
    return app


def _version() -> str:
    try:
        return version("slidecore")
    except PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def show_error(error: SlidecoreError) -> None:
    """Prints what went wrong in one red line and what to do about it in another, on standard error."""
    _print_error(_as_options(" ".join(error.message.split())), _as_options(error.hint))


# Errors of the engine name the arguments of slidecore.offload(): here these are options.
_ARGUMENTS = (
    (re.compile(r"\bdisk=\[directory, \.\.\.\]"), "--disk DIRECTORY"),
    (re.compile(r"\bmoments='8bit'"), "--moments 8bit"),
    (re.compile(r"\bgpu_direct=True"), "--gpu-direct"),
    (re.compile(r"(?<!-)\b(device|host|disk)_memory\b=?"), r"--\1-memory "),
    (re.compile(r"(?<!-)\bmicro_batch\b=?"), "--micro-batch "),
)


def _as_options(text: str) -> str:
    for argument, option in _ARGUMENTS:
        text = argument.sub(option, text)
    return re.sub(r"(--[a-z-]+) {2,}", r"\1 ", text).strip()


def _print_error(message: str, hint: str) -> None:
    """One line in red, and the hint below it, on standard error."""
    outlet = cast("IO[str]", Outlet("stderr"))  # the exit code counts, also where the terminal is gone
    try:
        from rich.console import Console
    except ImportError:
        print(f"error: {message}", hint, sep="\n", file=outlet)
        return
    console = Console(file=outlet, highlight=False, soft_wrap=True)
    console.print(f"error: {message}", style="red", markup=False)
    if hint:
        console.print(hint, markup=False)


if __name__ == "__main__":
    sys.exit(main())
