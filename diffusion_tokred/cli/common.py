"""The app, and what its commands share: errors in one line, option types, loading, bars and tables."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import ConfigError, StateError, UnsupportedError
from ..version import __version__

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
WRONG = 2
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}  # for the options of the methods


class Group(TyperGroup):
    """Every expected failure is one line on stderr."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except Exception as error:
            code = _explain_failure(error)
        if kwargs.get("standalone_mode", True):
            sys.exit(code or 0)
        return code

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None


class MethodCommand(TyperCommand):
    """A command that also takes the options of the methods: its help lists them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        quiet_libraries()
        from ..evaluation.options import load_plugins

        load_plugins()
        print_options(make_console(), "Options of the methods (with --method)")


def _explain_failure(error: Exception) -> int:
    """Print an expected failure and return the exit code; raise what is not expected."""
    if isinstance(error, (ConfigError, UnsupportedError, StateError)):
        if type(error).__name__ != "SharedError" or os.environ.get("RANK", "0") == "0":  # all processes have it
            say(str(error))
        return WRONG
    if hasattr(error, "format_message"):  # click's or typer's own, whichever click typer was built with
        text = error.format_message()
        command = getattr(getattr(error, "ctx", None), "command", None)
        if hasattr(error, "option_name") and command is not None:
            text += f" Options: {', '.join(p.opts[0] for p in command.params)}."
        if text.startswith("No such command"):
            text += f" Commands: {', '.join(sorted(getattr(command, 'commands', {})))}."
        say(text)
        return getattr(error, "exit_code", WRONG)
    if isinstance(error, OSError):
        say(f"{error.strerror}: {error.filename}" if error.filename else str(error))
        return WRONG
    if type(error).__name__ == "OutOfMemoryError":
        say("out of memory: choose a smaller --size, or --dtype bfloat16")
        return 1
    raise error


def say(text: str) -> None:
    print("tokred: " + " ".join(text.split()), file=sys.stderr)


app = typer.Typer(
    cls=Group, name="tokred", rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _show_version(value: bool) -> None:
    if value:
        print(f"tokred {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Token reduction for diffusers: what it changes, what it costs, what it gains."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


Model = Annotated[str, typer.Option(help="An embedded pipeline (toy-dit, toy-sd), a hub id, or a pipeline's folder.")]
MethodName = Annotated[
    str | None,
    typer.Option("--method", help="Which; `tokred methods` lists them. (default: the policy file's, or tome)"),
]
PolicyText = Annotated[
    str | None, typer.Option("--policy", metavar="FILE|RATIO", help="Ratio by noise level: JSON, or one number.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps. (default: the pipeline's)")]
Size = Annotated[
    str | None, typer.Option(metavar="W or WxH", help="Width x height in pixels. (default: the pipeline's)")
]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance scale. (default: the pipeline's)")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. (default: float32 on the CPU, else bfloat16)")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: the best there is)")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of torch. (default: torch's)")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write the result as JSON; - is stdout.")]


def load_pipeline(model: str, dtype: str | None, device: str | None, threads: int | None) -> tuple[Any, dict[str, Any]]:
    with working(f"loading {model}"):
        import torch
        from diffusers.utils import logging as diffusers_logging
        from huggingface_hub.utils import enable_progress_bars
        from transformers.utils import logging as transformers_logging

        from ..evaluation.models import defaults, load_model

        for logging in (diffusers_logging, transformers_logging):
            logging.disable_progress_bar()
        enable_progress_bars()  # transformers switched these off too, but a download may take minutes
        if threads is not None:
            torch.set_num_threads(threads)
        return load_model(model, dtype, device), defaults(model)


def quiet_libraries() -> None:
    """Notices about optional packages, and bars inside bars, are noise in a command. In the library they stay."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(torch|torchmetrics|transformers|diffusers|huggingface_hub)(\..*)?$")


def make_console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=160)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    console = make_console(stderr=True)
    with console.status(what) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None] | None]:
    """A progress bar on a terminal; None elsewhere."""
    from rich import progress as bars

    console = make_console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        bars.TextColumn("{task.description:<18}"), bars.BarColumn(), bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(), "left", bars.TimeRemainingColumn(),
    )  # fmt: skip
    # Few refreshes: the bar runs beside what is timed.
    with bars.Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("warm-up", total=1.0)
        yield lambda what, share: progress.update(task, description=what, completed=share)


def print_table(console: Console, head: tuple[str, ...], rows: Any, title: str | None = None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(*head, box=SIMPLE_HEAD, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def print_options(console: Console, title: str) -> None:
    from ..evaluation.tables import option_rows

    print_table(console, ("method", "option", "accepts", "default", ""), option_rows(), title)
