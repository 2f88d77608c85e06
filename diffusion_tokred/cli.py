"""The `tokred` command: what the library does, in words. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import ConfigError, StateError, UnsupportedError
from .version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from .evaluation.compare import Comparison

INTERRUPTED = 130
WRONG = 2


class _Group(TyperGroup):
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
            _line("interrupted")
            raise typer.Exit(INTERRUPTED) from None


class _MethodCommand(TyperCommand):
    """A command that also takes the options of the methods: its help lists them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _quiet_libraries()
        from .evaluation.options import load_plugins

        load_plugins()
        _print_options(_console(), "Options of the methods (with --method)")


def _explain_failure(error: Exception) -> int:
    """Print an expected failure and return the exit code; raise what is not expected."""
    if isinstance(error, (ConfigError, UnsupportedError, StateError)):
        _line(str(error))
        return WRONG
    if hasattr(error, "format_message"):  # click's or typer's own, whichever click typer was built with
        text = error.format_message()
        command = getattr(getattr(error, "ctx", None), "command", None)
        if hasattr(error, "option_name") and command is not None:
            text += f" Options: {', '.join(p.opts[0] for p in command.params)}."
        if text.startswith("No such command"):
            text += f" Commands: {', '.join(sorted(getattr(command, 'commands', {})))}."
        _line(text)
        return getattr(error, "exit_code", WRONG)
    if isinstance(error, OSError):
        _line(f"{error.strerror}: {error.filename}" if error.filename else str(error))
        return WRONG
    if type(error).__name__ == "OutOfMemoryError":
        _line("out of memory: choose a smaller --size, or --dtype bfloat16")
        return 1
    raise error


def _line(text: str) -> None:
    print("tokred: " + " ".join(text.split()), file=sys.stderr)


app = typer.Typer(
    cls=_Group, name="tokred", rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
_FREE = {"allow_extra_args": True, "ignore_unknown_options": True}  # for the options of the methods

Model = Annotated[str, typer.Option(help="An embedded pipeline (toy-dit, toy-sd), a hub id, or a pipeline's folder.")]
MethodName = Annotated[str, typer.Option("--method", help="Which method; `tokred methods` lists them.")]
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


@app.command(
    cls=_MethodCommand,
    context_settings=_FREE,
    epilog="""Examples:

    tokred compare

    tokred compare --method tome --ratio 0.6 --merge-ff --seed 0-3

    tokred compare --method todo --factor 2 --size 256 --out todo.png --json todo.json

    tokred compare --model stabilityai/stable-diffusion-2-1 --prompt "a lighthouse at dusk" --size 768""",
)
def compare(
    ctx: typer.Context,
    model: Model = "toy-dit",
    method: MethodName = "tome",
    policy: PolicyText = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw. (default: a scene of the toy world)")] = None,
    seed: Annotated[str, typer.Option(metavar="SEEDS", help="0, or 0,2, or 0-3: one row of pictures each.")] = "0",
    steps: Steps = None,
    size: Size = None,
    guidance: Guidance = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed pairs of calls a seed, alternating.")] = 3,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Folder to write; or a .png: the panel alone.")] = Path("tokred-compare"),
    json: Json = None,
) -> None:
    """Draw the same pictures without and with a method, side by side, and time both.

    Any option of the method can be given too, such as --ratio 0.5; they are listed below.
    """
    _quiet_libraries()
    console = _console(stderr=json == "-")
    with _working("starting"):
        from .evaluation import images, options, results
        from .evaluation.compare import PROMPT
        from .evaluation.compare import compare as run
        from .evaluation.models import unread

        options.load_plugins()
        config = options.config_from(method, ctx.args)
        rule = None if policy is None else options.policy(policy)
        seeds, pixels = options.seeds(seed), None if size is None else options.size(size)
        images.check_target(out)
    pipe, defaults = _load(model, dtype, device, threads)
    prompt = prompt or PROMPT
    if note := unread(pipe, prompt):
        _line(note)
    with _bar() as progress:
        found = run(
            pipe, config, policy=rule, prompt=prompt, seeds=seeds, size=pixels or defaults.get("size"),
            steps=steps or defaults.get("steps"), guidance=defaults.get("guidance") if guidance is None else guidance,
            repeat=repeat, model=model, call=defaults.get("call"), progress=progress,
        )  # fmt: skip
    with _working("drawing"):
        panel = images.save(found, out)
        if json not in (None, "-"):
            results.write_text(json, results.to_json(found.to_dict()))
    if json == "-":
        print(results.to_json(found.to_dict()), end="")
    _print_comparison(console, found, panel)
    if results.busy(found.env):
        _line(f"the machine was busy (load {found.env['load']:.1f} on {found.env['cpus']} CPUs): mistrust the times")


@app.command(
    cls=_MethodCommand,
    context_settings=_FREE,
    epilog="""Examples:

    tokred explain --method tome --ratio 0.6 --size 256

    tokred explain --model stabilityai/stable-diffusion-xl-base-1.0 --method todo --size 1024 --json -""",
)
def explain(
    ctx: typer.Context,
    model: Model = "toy-dit",
    method: MethodName = "tome",
    policy: PolicyText = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Count a run of so many steps. (default: one call)")] = None,
    size: Size = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video. (default: the pipeline's)")] = None,
    guidance: Guidance = None,
    dtype: Dtype = None,
    device: Device = None,
    json: Json = None,
) -> None:
    """Say what a method would change and save in a model, without running it.

    Any option of the method can be given too, such as --ratio 0.5; they are listed below.
    """
    _quiet_libraries()
    with _working("starting"):
        from . import explain as dry_run
        from .evaluation import options, results

        options.load_plugins()
        config = options.config_from(method, ctx.args)
        rule = None if policy is None else options.policy(policy)
        pixels = None if size is None else options.size(size)
    pipe, defaults = _load(model, dtype, device, None)
    width, height = pixels or defaults.get("size") or (None, None)
    scale = defaults.get("guidance") if guidance is None else guidance
    found = dry_run(
        pipe, config, policy=rule, height=height, width=width, num_inference_steps=steps,
        guidance=None if scale is None else scale > 1, text_tokens=defaults.get("text_tokens"), num_frames=frames,
    )  # fmt: skip
    text = results.to_json(results.plain(found.to_dict()))
    if json not in (None, "-"):
        results.write_text(json, text)
    print(text.rstrip() if json == "-" else found.table())


@app.command()
def methods(
    options: Annotated[bool, typer.Option("--options", help="Also list the options of each method.")] = False,
    sites: Annotated[bool, typer.Option("--sites", help="Also list where each works, and why not elsewhere.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's tables instead.")] = False,
) -> None:
    """List the methods, the papers they come from, and the models they work on."""
    _quiet_libraries()
    from .evaluation.options import load_plugins
    from .evaluation.tables import method_rows, methods_markdown, site_rows

    load_plugins()
    if markdown:
        print(methods_markdown(), end="")
        return
    console = _console()
    _print_table(console, ("method", "paper", "acts on", "backbones"), method_rows())
    if sites:
        _print_table(console, ("method", "at", "works on", "not on, and why"), site_rows())
    if options:
        _print_options(console, "Options")


@app.command()
def doctor() -> None:
    """Show versions, devices and weights, and what is missing."""
    _quiet_libraries()
    with _working("looking around"):
        from .evaluation.doctor import examine

        facts = examine()
    _print_table(_console(), ("", "found", "what to do"), facts)


def main() -> None:
    """The console command."""
    app()


# --- helpers -----------------------------------------------------------------------------------------------------


def _load(model: str, dtype: str | None, device: str | None, threads: int | None) -> tuple[Any, dict[str, Any]]:
    with _working(f"loading {model}"):
        import torch
        from diffusers.utils import logging as diffusers_logging
        from huggingface_hub.utils import enable_progress_bars
        from transformers.utils import logging as transformers_logging

        from .evaluation.models import defaults, load_model

        for logging in (diffusers_logging, transformers_logging):
            logging.disable_progress_bar()
        enable_progress_bars()  # transformers switched these off too, but a download may take minutes
        if threads is not None:
            torch.set_num_threads(threads)
        return load_model(model, dtype, device), defaults(model)


def _quiet_libraries() -> None:
    """Notices about optional packages, and bars inside bars, are noise in a command. In the library they stay."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(torch|torchmetrics|transformers|diffusers|huggingface_hub)(\..*)?$")


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=160)


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    console = _console(stderr=True)
    with console.status(what) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, float], None] | None]:
    """A progress bar on a terminal; None elsewhere."""
    from rich import progress as bars

    console = _console(stderr=True)
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


def _print_table(console: Console, head: tuple[str, ...], rows: Any, title: str | None = None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(*head, box=SIMPLE_HEAD, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _print_options(console: Console, title: str) -> None:
    from .evaluation.tables import option_rows

    _print_table(console, ("method", "option", "accepts", "default", ""), option_rows(), title)


def _print_comparison(console: Console, found: Comparison, panel: Path) -> None:
    from .evaluation.tables import comparison_rows

    _print_table(console, ("", "unpatched", "patched"), comparison_rows(found))
    console.print(f"{panel}", soft_wrap=True)


if __name__ == "__main__":
    main()
