"""What a kept step of caching methods costs against its share of the FLOPs, on SD3- and PixArt-shaped transformers.

    python scripts/benchmark_caching.py                                  # 1,024 tokens, float32, 2 blocks of each
    python scripts/benchmark_caching.py --shape pixart --latent 128      # 4,096 tokens
    python scripts/benchmark_caching.py --ratio 0.75 --out benchmarks/caching.json

Let nothing else run meanwhile. `phi` is the realised fraction (S - 1) / (S* - 1): selection, gathers and copies are
what it loses, and 1 is all that the FLOPs allow. It can be above 1: norms and modulation of tokens that are left out
are saved too.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation.kept_steps import configs, kept_steps, model, rows
from diffusion_tokred.evaluation.results import environment, result, to_json, write_text

HEAD = ("method", "tokens", "full step", "cost of a kept step", "its FLOPs", "speed-up (quartiles)", "S*", "phi",
        "one full in three", "phi")  # fmt: skip


def _tell(bar: Progress, task: TaskID, what: str, share: float) -> None:
    bar.update(task, description=what, completed=share)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="sd3, pixart; both if not given.")] = None,
    latent: Annotated[int, typer.Option(min=8, help="Side of the latents; a token is 2 x 2.")] = 64,
    depth: Annotated[int, typer.Option(min=1, help="Blocks.")] = 2,
    ratio: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of tokens left out.")] = 0.875,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the order of the methods turns.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write the result there, as JSON.")] = None,
) -> None:
    torch.set_num_threads(threads)
    console, found = Console(), []
    for name in shape or ["sd3", "pixart"]:
        denoiser, call, text = model(name, latent, depth, getattr(torch, dtype), device)
        with Progress(transient=True) as bar:
            tell = partial(_tell, bar, bar.add_task("", total=1.0))
            lines = kept_steps(denoiser, call, text, configs(ratio), rounds, tell)
        view = Table(title=f"{name}-shaped, {depth} blocks, {lines[0].tokens:,} tokens, ratio {ratio:g}")
        for column in HEAD:
            view.add_column(column, justify="left" if column == "method" else "right")
        for row in rows(lines):
            view.add_row(*row)
        console.print(view)
        found += [{"shape": name, "latent": latent, "depth": depth} | dataclasses.asdict(line) for line in lines]
    if out is not None:
        env = environment(device) | {"dtype": dtype}
        write_text(out, to_json(result("kept-steps", env=env, pipeline={}, reduction=None, prompts=None, rows=found)))


if __name__ == "__main__":
    try:
        typer.run(main)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
