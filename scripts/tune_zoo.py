"""Policies for the embedded pipelines, tuned for several speeds: the figures of docs/tuning.md.

    python scripts/tune_zoo.py toy-dit runs/tune --speeds 1.5,2,3
    python scripts/tune_zoo.py toy-sd runs/tune --speeds 2 --budget 8min

Searched with the first scenes of the training set of pairs, decided by scenes with pairs of shape and colour that the
pipelines were never trained on. OUT/PIPELINE-SPEEDx has a tuning each, OUT/PIPELINE.md the table of all. The same
command goes on where it was stopped. Let nothing else run: costs and speeds are measured.

With the usual budget of 9 minutes a speed takes about 10 minutes on one core (a dense picture takes about a second).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffusion_tokred import Tuned, tune
from diffusion_tokred.errors import ConfigError, StateError, UnsupportedError
from diffusion_tokred.evaluation import models
from diffusion_tokred.evaluation.layout import Table, figure, markdown_table
from diffusion_tokred.evaluation.results import write_text
from diffusion_tokred.zoo.scenes import evaluation_prompts

HEAD = ("asked", "speed-up", "PSNR (dB)", "− best constant", "− random search", "− fewer steps", "found")


def row(target: float, found: Tuned) -> tuple[str, ...]:
    """A line of the table."""
    verdicts = {one["against"].partition("-")[0]: one for one in found.data["verdicts"]}
    gaps = [
        f"{figure(verdicts[name], sign=True)}, {verdicts[name]['verdict']}" if name in verdicts else "itself"
        for name in ("constant", "random", "steps")
    ]
    best = found.best
    speed = figure(best["speedup"], unit="x") if best["speedup"] else f"{best['composed']:.2f}x composed"
    reached = "" if found.reached else f" (not reached: ceiling {found.data['ceiling']:.2f}x)"
    return (f"{target:g}x{reached}", speed, figure(best["paired"].get("psnr")), *gaps, best["setting"])


def main(
    model: Annotated[str, typer.Argument(help="toy-dit or toy-sd.")],
    out: Annotated[Path, typer.Argument(help="The folder; what is there goes on.")],
    speeds: Annotated[str, typer.Option(help="Targets, as 1.5,2,3.")] = "1.5,2,3",
    budget: Annotated[str, typer.Option(help="Of each: evaluations, or a time.")] = "9min",
    train: Annotated[int, typer.Option(min=1, help="Prompts to search with.")] = 6,
    held: Annotated[int, typer.Option(min=1, help="Held-out prompts that decide.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of the search and of the noise.")] = 0,
    keep: Annotated[bool, typer.Option(help="Keep the last one for method='auto'.")] = False,
) -> None:
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    try:
        targets = [float(speed) for speed in speeds.split(",")]
    except ValueError:
        raise ConfigError(f"--speeds takes numbers, as 1.5,2,3, got {speeds!r}") from None
    pipe, own = models.load_model(model), models.defaults(model)
    if not own:
        raise ConfigError(f"{model} is no embedded pipeline: use `tokred tune`")
    width, height = own["size"]
    call: dict[str, Any] = {"num_inference_steps": own["steps"], "guidance_scale": own["guidance"]}
    call |= {"width": width, "height": height} | own.get("call", {})
    rows = []
    for target in targets:
        found = tune(
            pipe, evaluation_prompts(train), target_speedup=target, holdout=evaluation_prompts(held, held_out=True),
            budget=budget, seed=seed, out=out / f"{model}-{target:g}x", call=call, keep=keep, model=model,
        )  # fmt: skip
        rows.append(row(target, found))
        table = Table("", HEAD, tuple(rows))
        write_text(out / f"{model}.md", "\n".join([f"# {model}, tuned", "", *markdown_table(table)]) + "\n")
        if found.status != "complete":
            print("tune_zoo: interrupted; the same command goes on where it was", file=sys.stderr)
            break
    print((out / f"{model}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ConfigError, UnsupportedError, StateError) as error:
        print(f"tune_zoo: {error}", file=sys.stderr)
        sys.exit(2)
