"""Check every kernel against its plain version in every dtype, and time both.

    python scripts/check_kernels.py                       # on a GPU, 2 x 4,096 tokens of 1,152
    python scripts/check_kernels.py --device cpu          # small, through Triton's interpreter: times mean nothing

Exit code 1 if one is wrong.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu: Triton's interpreter.")] = "cuda",
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 2,
    tokens: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a sample. (default: 4096; on the CPU 96)")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels. (default: 1152; on the CPU 40)")] = None,
    ratio: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of tokens left out.")] = 0.75,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed calls. (default: 20; on the CPU 1)")] = None,
) -> None:
    interpreted = device == "cpu"
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import importlib.util

    import torch

    from diffusion_tokred.measure.kernel_checks import check_kernels

    if importlib.util.find_spec("triton") is None:
        raise typer.BadParameter("Triton is not installed: pip install -c constraints.txt 'diffusion-tokred[kernels]'")
    if not interpreted and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here: use --device cpu, which checks but does not time")
    where = "Triton's interpreter" if interpreted else torch.cuda.get_device_name(device)
    b, n, c = batch, tokens or (96 if interpreted else 4096), width or (40 if interpreted else 1152)
    table = Table(title=f"{where}, torch {torch.__version__}: {b} x {n:,} tokens of {c:,}, ratio {ratio:g}")
    for column in ("kernel", "dtype", "error", "right", "plain µs", "kernel µs", "ratio"):
        table.add_column(column, justify="left" if column in ("kernel", "dtype") else "right")
    wrong = 0
    for row in check_kernels(device, b, n, c, ratio, rounds or (1 if interpreted else 20)):
        wrong += not row.right
        times = ("", "", "") if interpreted else (
            f"{row.plain * 1e6:.1f}", f"{row.kernel * 1e6:.1f}", f"{row.plain / row.kernel:.2f}"
        )  # fmt: skip
        table.add_row(row.name, row.dtype, f"{row.error:.3f}", "yes" if row.right else "NO", *times)
    Console().print(table)
    if wrong:
        sys.exit(f"{wrong} kernels are wrong")


if __name__ == "__main__":
    typer.run(main)
