"""Draw the pictures of an evaluation: every prompt, unpatched and with each variant, from the same noise.

    python scripts/generate.py --out runs/toy --limit 64 --variant tome:ratio=0.5 --variant steps:20 --variant seed
    python scripts/generate.py --out runs/parti --model stabilityai/stable-diffusion-xl-base-1.0 --size 1024
        --prompts PartiPrompts.tsv --variant tome:ratio=0.5,levels=0,1 --variant todo:factor=2 --variant numerics
    torchrun --nproc-per-node 2 scripts/generate.py ...       # two processes on the CPU: the same pictures, sooner
    accelerate launch scripts/generate.py ...                 # several GPUs and nodes

The same command goes on where it was stopped. More variants and repeats may be added to a folder later; everything
else that decides a picture must stay, and is compared with what the folder's run.json says.
"""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from diffusers.utils import logging as diffusers_logging
from rich.progress import BarColumn, Progress, TextColumn
from transformers.utils import logging as transformers_logging

from diffusion_tokred.errors import ConfigError, StateError, UnsupportedError
from diffusion_tokred.evaluation import launch, models, options
from diffusion_tokred.evaluation import prompts as prompt_sets
from diffusion_tokred.evaluation.generation import Pace, generate
from diffusion_tokred.evaluation.variants import UNPATCHED, Variant, check, parse_variant, suited

EVERY = 30.0  # seconds between lines where there is no terminal

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def say(text: str) -> None:
    print(f"generate: {' '.join(text.split())}", file=sys.stderr, flush=True)


class Watch:
    """A bar on a terminal, a line now and then elsewhere; nothing in processes other than the first."""

    def __init__(self, rank: int) -> None:
        self.pace, self.rank, self.said = Pace(), rank, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        self.bar = Progress(*columns, transient=True) if rank == 0 and sys.stdout.isatty() else None
        self.task = self.bar.add_task("", text="") if self.bar else None

    def __enter__(self) -> "Watch":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        text = self.pace(done, total)
        if self.bar:
            self.bar.update(self.task, description=what, completed=done, total=total, text=text)
        elif self.rank == 0 and time.monotonic() - self.said > EVERY:
            self.said = time.monotonic()
            say(f"{what}: {text}")


@app.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
def main(
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    variant: Annotated[
        list[str] | None,
        typer.Option(help="A method with options (tome:ratio=0.5,merge_ff), numerics, seed or steps:N; repeatable."),
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="scenes, scenes-held-out, a .txt/.csv/.tsv/.jsonl file, or owner/name[:split[:column]].")
    ] = "scenes",
    limit: Annotated[int | None, typer.Option(help="At most so many prompts.")] = None,
    column: Annotated[str | None, typer.Option(help="Which column has the prompts. (default: prompt, ...)")] = None,
    unique: Annotated[bool, typer.Option("--unique", help="Drop prompts that came before.")] = False,
    model: Annotated[str, typer.Option(help="An embedded pipeline, a hub id, or a pipeline's folder.")] = "toy-sd",
    repeats: Annotated[int, typer.Option(help="Pictures a prompt and variant, from different noise.")] = 1,
    seed: Annotated[int, typer.Option(help="Seeds are counted from this one.")] = 0,
    batch: Annotated[int, typer.Option(help="Pictures drawn together.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. (default: the pipeline's)")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels, W or WxH. (default: the pipeline's)")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale. (default: the pipeline's)")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of a process; they change pictures by rounding.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: the best there is)")] = None,
) -> None:
    options.load_plugins()
    found = models.defaults(model)
    wanted = {"num_inference_steps": steps or found.get("steps")}
    wanted["guidance_scale"] = found.get("guidance") if guidance is None else guidance
    wanted["width"], wanted["height"] = options.size(size) if size else found.get("size", (None, None))
    variants = [Variant(UNPATCHED), *(parse_variant(text, wanted["num_inference_steps"]) for text in variant or ())]
    check(variants)
    texts = prompt_sets.load(prompts, limit, column, unique)
    processes = launch.start(models.pick_device(device))
    if processes.world > 1 and device is not None and ":" in device:
        raise ConfigError(f"{processes.world} processes cannot all take {device}: leave the number out")

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # notices about packages that nobody needs here
    pipe = models.load_model(model, dtype, str(processes.device) if processes.device else device)
    variants = suited(variants, pipe)
    if processes.rank == 0:
        if unread := models.unread_of(pipe, texts.texts):
            say(unread)
        cores = os.cpu_count() or 1
        if pipe._execution_device.type == "cpu" and processes.world * threads <= cores // 2:
            say(
                f"{processes.world * threads} of {cores} CPUs are used: torchrun --nproc-per-node {cores // threads}"
                f" {sys.argv[0]} ... draws the same pictures sooner"
            )
    with Watch(processes.rank) as watch:
        made = generate(
            pipe,
            texts,
            variants,
            out,
            repeats=repeats,
            base_seed=seed,
            batch=batch,
            call={name: value for name, value in wanted.items() if value is not None} | found.get("call", {}),
            model=model,
            threads=threads,
            processes=processes,
            progress=watch,
        )
    if processes.rank == 0:
        for failure in made.run.failures[:5]:
            say(f"{failure['file']}: {failure['failure']}")
        if len(made.run.failures) > 5:
            say(f"and {len(made.run.failures) - 5} more, see {out / 'failures.jsonl'}")
        print(
            f"{out}: {made.drawn} pictures drawn in {made.seconds:.0f} s, {made.kept} were there; {texts.n} prompts"
            f" ({texts.unique} different) x {repeats} x {len(variants)} variants"
        )


if __name__ == "__main__":
    try:
        if code := app(standalone_mode=False):  # an interrupt comes back as a number
            say("interrupted; the same command goes on where it was")
            sys.exit(code)
    except launch.SharedError as error:
        if int(os.environ.get("RANK", 0)) == 0:  # all processes have it: one says it
            say(str(error))
        sys.exit(2)
    except (ConfigError, UnsupportedError, StateError) as error:
        say(str(error))
        sys.exit(2)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own: a wrong option
            raise
        say(error.format_message())
        sys.exit(2)
