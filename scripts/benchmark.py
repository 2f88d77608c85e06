"""The comparison of the field: what a row's steps cost beside the unpatched model's, and what a run of them comes to.

    python scripts/benchmark.py --shape tiny-sd3-128 --rounds 1   # try it out; its times mean nothing
    python scripts/benchmark.py --shape sd15-512 --out benchmarks/cpu-sd15-512.json
    python scripts/benchmark.py --shape sd3-512 --rows toca --rows "ras:ratio=0.75" --rows cache-dit
    python scripts/benchmark.py --pipeline toy-dit --whole 10 --out benchmarks/cpu-toy-dit.json
    python scripts/benchmark.py --device cuda --out benchmarks/gpu.json            # all shapes, eager and compiled
    python scripts/benchmark.py --show benchmarks/gpu.json              # the table and the plot of a file

Real widths, random weights. Let nothing else run meanwhile. The same command goes on where it was stopped. Freed memory
stays with the process (glibc), for all rows: given back and faulted in anew, it moves a small model's times by a tenth.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_tokred.errors import ConfigError, UnsupportedError
from diffusion_tokred.evaluation.comparison import HEAD, Settings, cells, compare_field, field_plot, groups, read
from diffusion_tokred.measure.machine import keep_freed_memory

CAPTION = "Time ratio: unpatched / row, median of the rounds with its 95 % interval. A FLOP ratio is no speed-up."
# Shapes by default.
CPU = ("sd15-512", "sd15-1024", "pixart-512", "sd3-512")
CUDA = ("sd15-512", "sd15-1024", "sdxl-1024", "sdxl-2048", "pixart-1024", "sd3-1024", "flux-1024")


def main(
    shape: Annotated[list[str] | None, typer.Option(help="FAMILY-PIXELS, such as sd3-1024; again for more.")] = None,
    pipeline: Annotated[list[str] | None, typer.Option(help="toy-dit, toy-sd: embedded, with whole runs.")] = None,
    rows: Annotated[
        list[str] | None, typer.Option(help="A row's name, or a variant such as toca:ratio=0.75; again for more.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    mode: Annotated[list[str] | None, typer.Option(help="eager, compiled. By default eager; on a GPU both.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. By default bfloat16 on a GPU.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Of the run that is composed.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Of each row: unpatched, row, row, unpatched.")] = 10,
    whole: Annotated[
        int | None, typer.Option(min=0, help="Rounds of whole runs. By default none; with --pipeline as --rounds.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="With --pipeline: drawn with each row, and compared with the unpatched ones.")
    ] = 12,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks. By default all; on a CPU few of a DiT's.")] = None,
    guidance: Annotated[
        bool | None, typer.Option(help="Two rows a call, as guidance has. By default on a GPU.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    backend: Annotated[str, typer.Option(help="Of torch.compile.")] = "inductor",
    out: Annotated[Path | None, typer.Option(help="FILE.json: written after each row; at the end FILE.png.")] = None,
    show: Annotated[Path | None, typer.Option(help="Show this file, and measure nothing.")] = None,
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    if show is not None:
        present(console, read(show), show)
        return
    gpu = torch.device(device).type == "cuda"
    if gpu and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here: use --device cpu")
    if threads:
        torch.set_num_threads(threads)
    dtype = dtype or ("bfloat16" if gpu else "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype is float32, bfloat16 or float16, got {dtype!r}")
    pipelines = pipeline or []
    settings = Settings(
        steps, rounds, (rounds if pipelines else 0) if whole is None else whole, pictures if pipelines else 0,
        tuple(mode or (("eager", "compiled") if gpu else ("eager",))), getattr(torch, dtype), device, depth,
        gpu if guidance is None else guidance, backend, keep_freed_memory(),
    )  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=1.0)
        data = compare_field(
            shape or ([] if pipelines else list(CUDA if gpu else CPU)),
            rows or (),
            settings,
            pipelines=pipelines,
            out=out,
            progress=lambda what, share: bars.update(bar, description=what, completed=share),
            done=lambda row: bars.console.print(" ".join((row["shape"], row["mode"], *cells(row))), highlight=False),
        )
    present(console, data, out)


def present(console: Console, data: Mapping[str, Any], path: Path | None) -> None:
    """Print the tables; draw the plot beside the file."""
    for title, found in groups(data):
        view = Table(title=f"{data['asked']['machine']}, {title}", caption=CAPTION)
        for head in HEAD:
            view.add_column(head, justify="left" if head in ("row", "steps") else "right")
        for row in found:
            if row["error"] is None:
                view.add_row(*cells(row))
        console.print(view)
        for row in found:
            if row["error"] is not None:
                console.print(f"{row['name']} does not run: {row['error']}", markup=False, highlight=False)
            elif whole := row.get("whole"):
                m = whole["measured"]
                measured = f"measured {m['median']:.3f}x ({m['low']:.3f}-{m['high']:.3f})"
                composed = f"composed {whole['composed']:.3f}x, {whole['difference']:+.1%}"
                console.print(f"{row['name']}, whole runs: {measured}, {composed}", markup=False, highlight=False)
            if row.get("quality_error"):
                console.print(f"{row['name']}, its pictures: {row['quality_error']}", markup=False, highlight=False)
    if path is not None and any(row["error"] is None for row in data["rows"]):
        field_plot(data, path.with_suffix(".png"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ConfigError, UnsupportedError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        raise SystemExit(2) from None
