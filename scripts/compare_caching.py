"""Our methods and other libraries' caches at one measured speed: the caching comparison.

    python scripts/compare_caching.py toy-dit runs/dit-2x --speed 2.0 --prompts 48
    python scripts/compare_caching.py toy-sd runs/sd-2x --methods toca,deepcache,peer-deepcache,steps
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 scripts/compare_caching.py toy-dit runs/dit-2x   # two draw

For each method the setting is searched with which a picture takes 1/SPEED of the time: rounds of calls that alternate
with the unpatched pipeline, medians, within 4 %. What cannot get there is listed with its fastest setting; what does
not run, with its error. Then all are timed together, the prompts are drawn with each, and the pictures measured.

OUT/comparison.md has the table, OUT/run the pictures and the report of an evaluation. The same command goes on where it
was stopped: OUT/search.json keeps each measured speed; delete it when a method's code has changed. Let nothing else run
until the drawing begins. Other libraries: pip install "diffusion-tokred[peers]".
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffusion_tokred.errors import ConfigError, StateError, UnsupportedError
from diffusion_tokred.evaluation import launch, models, options
from diffusion_tokred.evaluation import prompts as prompt_sets
from diffusion_tokred.evaluation.caching_comparison import compare_caching, contenders
from diffusion_tokred.evaluation.generation import Pace
from diffusion_tokred.evaluation.judges import Judges

EVERY = 10.0  # seconds between lines

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def say(text: str) -> None:
    print(f"compare_caching: {' '.join(text.split())}", file=sys.stderr, flush=True)


def teller(rank: int) -> Any:
    """A line when something else begins, and now and then between."""
    said, before = 0.0, ""

    def tell(what: str, share: float, words: str) -> None:
        nonlocal said, before
        if rank == 0 and (what != before or time.monotonic() - said > EVERY):
            said, before = time.monotonic(), what
            say(f"{what}, {share:.0%} {words}")

    return tell


@app.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
def main(
    model: Annotated[str, typer.Argument(help="toy-dit, toy-sd, a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder; a comparison that is there goes on.")],
    speed: Annotated[float, typer.Option(min=1.01, help="How many times as fast as unpatched.")] = 2.0,
    methods: Annotated[str | None, typer.Option(help="Only these, as toca,cache-dit,steps. (default: all)")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="The first so many scenes.")] = 48,
    steps: Annotated[int | None, typer.Option(min=2, help="Sampling steps. (default: the pipeline's)")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, for timing and drawing.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of what is reported.")] = 10,
    search_rounds: Annotated[int, typer.Option(min=1, help="Timed rounds while a setting is searched.")] = 3,
    tolerance: Annotated[float, typer.Option(min=0.001, max=0.5, help="Speeds so close are equal.")] = 0.04,
    size: Annotated[str | None, typer.Option(help="Pixels, W or WxH. (default: the pipeline's)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: the best there is)")] = None,
) -> None:
    options.load_plugins()
    own = models.defaults(model)
    processes = launch.start(models.pick_device(device))
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    pipe = models.load_model(model, None, str(processes.device) if processes.device else device)
    count = steps or own.get("steps") or models.steps_of(pipe)
    known = contenders(count)
    names = [name.strip() for name in methods.split(",")] if methods else list(known)
    if wrong := [name for name in names if name not in known]:
        raise ConfigError(f"--methods has {', '.join(wrong)}; there is {', '.join(known)}")
    width, height = options.size(size) if size else own.get("size", (None, None))
    call = dict(own.get("call", {})) | dict(guidance_scale=own.get("guidance"), width=width, height=height)
    data = compare_caching(
        pipe, prompt_sets.load("scenes", prompts), out, [known[name] for name in names], steps=count, speed=speed,
        tolerance=tolerance, call={key: value for key, value in call.items() if value is not None}, model=model,
        threads=threads, rounds=(search_rounds, rounds), judges=Judges.find(), processes=processes, pace=Pace(),
        progress=teller(processes.rank),
    )  # fmt: skip
    if processes.rank == 0:
        print((out / "comparison.md").read_text(encoding="utf-8"))
        say(f"{len(data['rows'])} at {speed:g}x, {len(data['others'])} not; {out / 'run' / 'report.html'}")


if __name__ == "__main__":
    try:
        if code := app(standalone_mode=False):  # an interrupt comes back as a number
            say("interrupted; the same command goes on where it was")
            sys.exit(code)
    except (ConfigError, UnsupportedError, StateError) as error:
        say(str(error))
        sys.exit(2)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own: a wrong option
            raise
        say(error.format_message())
        sys.exit(2)
