"""`tokred compare`, `explain`, `methods` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .common import (
    FREE,
    Device,
    Dtype,
    Guidance,
    Json,
    MethodCommand,
    MethodName,
    Model,
    PolicyText,
    Size,
    Steps,
    Threads,
    app,
    load_pipeline,
    make_console,
    print_options,
    print_table,
    progress_bar,
    quiet_libraries,
    say,
    working,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.compare import Comparison


@app.command(
    cls=MethodCommand,
    context_settings=FREE,
    epilog="""Examples:

    tokred compare

    tokred compare --method tome --ratio 0.6 --merge-ff --seed 0-3

    tokred compare --method todo --factor 2 --size 256 --out todo.png --json todo.json

    tokred compare --model stabilityai/stable-diffusion-2-1 --prompt "a lighthouse at dusk" --size 768""",
)
def compare(
    ctx: typer.Context,
    model: Model = "toy-dit",
    method: MethodName = None,
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
    quiet_libraries()
    console = make_console(stderr=json == "-")
    with working("starting"):
        from ..evaluation import images, options, results
        from ..evaluation.compare import PROMPT
        from ..evaluation.compare import compare as run
        from ..evaluation.models import unread

        options.load_plugins()
        rule = None if policy is None else options.policy(policy)
        chosen = options.chosen(method, ctx.args, rule)
        seeds, pixels = options.seeds(seed), None if size is None else options.size(size)
        images.check_target(out)
    pipe, defaults = load_pipeline(model, dtype, device, threads)
    prompt = prompt or PROMPT
    if note := unread(pipe, prompt):
        say(note)
    with progress_bar() as progress:
        found = run(
            pipe, **chosen, prompt=prompt, seeds=seeds, size=pixels or defaults.get("size"),
            steps=steps or defaults.get("steps"), guidance=defaults.get("guidance") if guidance is None else guidance,
            repeat=repeat, model=model, call=defaults.get("call"), progress=progress,
        )  # fmt: skip
    with working("drawing"):
        panel = images.save(found, out)
        if json not in (None, "-"):
            results.write_text(json, results.to_json(found.to_dict()))
    if json == "-":
        print(results.to_json(found.to_dict()), end="")
    _print_comparison(console, found, panel)
    if results.busy(found.env):
        say(f"the machine was busy (load {found.env['load']:.1f} on {found.env['cpus']} CPUs): mistrust the times")


@app.command(
    cls=MethodCommand,
    context_settings=FREE,
    epilog="""Examples:

    tokred explain --method tome --ratio 0.6 --size 256

    tokred explain --policy policy.json --steps 28 --plot plan.png

    tokred explain --model stabilityai/stable-diffusion-xl-base-1.0 --method todo --size 1024 --json -""",
)
def explain(
    ctx: typer.Context,
    model: Model = "toy-dit",
    method: MethodName = None,
    policy: PolicyText = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Count a run of so many steps. (default: one call)")] = None,
    size: Size = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video. (default: the pipeline's)")] = None,
    guidance: Guidance = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    time: Annotated[
        bool, typer.Option("--time", help="Predict the time on this device, by a calibration of a minute, kept.")
    ] = False,
    json: Json = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the plan of the --steps: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Say what a method would change and save in a model, without running it.

    Any option of the method can be given too, such as --ratio 0.5; they are listed below.
    """
    quiet_libraries()
    with working("starting"):
        from .. import explain as dry_run
        from ..evaluation import options, results

        options.load_plugins()
        if plot is not None:
            _check_plot(plot, steps)
        rule = None if policy is None else options.policy(policy)
        chosen = options.chosen(method, ctx.args, rule)
        pixels = None if size is None else options.size(size)
    pipe, defaults = load_pipeline(model, dtype, device, threads)
    width, height = pixels or defaults.get("size") or (None, None)
    scale = defaults.get("guidance") if guidance is None else guidance
    with working("measuring this device" if time else "counting"):
        found = dry_run(
            pipe, **chosen, height=height, width=width, num_inference_steps=steps, num_frames=frames,
            guidance=None if scale is None else scale > 1, text_tokens=defaults.get("text_tokens"), time=time,
        )  # fmt: skip
    if plot is not None:
        found.plot().savefig(plot, dpi=150)
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
    quiet_libraries()
    from ..evaluation.options import load_plugins
    from ..evaluation.tables import method_rows, methods_markdown, site_rows

    load_plugins()
    if markdown:
        print(methods_markdown(), end="")
        return
    console = make_console()
    print_table(console, ("method", "paper", "acts on", "backbones", "defaults measured on"), method_rows())
    if sites:
        print_table(console, ("method", "at", "works on", "not on, and why"), site_rows())
    if options:
        print_options(console, "Options")


@app.command()
def doctor() -> None:
    """Show versions, devices and weights, and what is missing."""
    quiet_libraries()
    with working("looking around"):
        from ..evaluation.doctor import examine

        facts = examine()
    print_table(make_console(), ("", "found", "what to do"), facts)


def _check_plot(path: Path, steps: int | None) -> None:
    """Refuse a plot that could not be made, before the pipeline is loaded."""
    from ..extras import need

    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"a plot ends in .png, .svg or .pdf, found {str(path)!r}")
    if steps is None:
        raise ConfigError("--plot draws the plan step by step: give --steps too")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"cannot write the plot to {path}: name a file in a folder that is there")
    try:
        need("matplotlib", "eval", "a plot")
    except ImportError as error:
        raise ConfigError(str(error)) from None


def _print_comparison(console: Console, found: Comparison, panel: Path) -> None:
    from ..evaluation.tables import comparison_rows

    print_table(console, ("", "unpatched", "patched"), comparison_rows(found))
    console.print(f"{panel}", soft_wrap=True)
