"""Time unpatched, ToMe, ToDo and tomesd side by side on an SD1.5-shaped UNet with random weights.

    python scripts/benchmark.py                                      # 64x64 and 96x96 latents, float32, all threads
    python scripts/benchmark.py --tiny --rounds 3                    # try it out in seconds
    python scripts/benchmark.py --dtype bfloat16 --device cuda --out benchmarks/h100.json

Let nothing else run meanwhile. The row "unpatched again" shows the noise: a difference inside it means nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_tokred import ConfigError, UnsupportedError
from diffusion_tokred.evaluation.benchmark import Benchmark, benchmark, duel, random_unet
from diffusion_tokred.evaluation.results import environment, result, to_json, version, write_text
from diffusion_tokred.measure.timing import Timing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--latent", type=int, nargs="+", default=[64, 96], help="sides of the square latents (default: 64 96)")
    add("--batch", type=int, default=1, help="rows of a call; 2 is one image with guidance (default: 1)")
    add("--ratio", type=float, default=0.5, help="share of tokens merged by ToMe and tomesd (default: 0.5)")
    add("--factor", type=int, default=2, help="pooling factor of ToDo (default: 2)")
    add("--rounds", type=int, default=10, help="rounds; each variant once, unpatched twice (default: 10)")
    add(
        "--duel",
        type=int,
        default=0,
        metavar="ROUNDS",
        help="then time ours against tomesd alone, for a narrow interval",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: float32)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--threads", type=int, help="CPU threads of torch (default: torch's choice)")
    add("--tiny", action="store_true", help="a tiny UNet, to try the script out; its times mean nothing")
    add("--out", type=Path, metavar="FILE.json", help="write the result here (whole, or not at all)")
    return parser.parse_args()


def table(found: Benchmark) -> Table:
    view = Table(
        title=f"{found.height}x{found.width} latents",
        caption="Speed-up: median of ratios within a round, 95 % bootstrap interval. FLOP ratios are not speed-ups.",
    )
    for head in ("variant", "seconds (IQR)", "FLOP ratio", "S*", "speed-up", "φ", "kernels"):
        view.add_column(head, justify="left" if head == "variant" else "right")

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    for line in found.lines:
        low, middle, high = line.quartiles
        view.add_row(
            line.name,
            f"{middle:.3f} ({low:.3f}-{high:.3f})",
            number(line.flop_ratio),
            number(line.ideal),
            "-" if line.speedup is None else str(line.speedup),
            "-" if line.phi is None else f"{line.phi:.0%}",
            str(line.kernels),
        )
    return view


def main() -> int:
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.threads:
        torch.set_num_threads(options.threads)
    if version("tomesd") is None:
        print("tomesd is not installed and left out (pip install tomesd==0.1.3)", file=sys.stderr)
    name, env = "tiny" if options.tiny else "sd15", environment(options.device)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    found: list[Benchmark] = []
    duels: dict[str, Timing] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:
        building = bars.add_task(f"building the {name} UNet", total=None)
        unet = random_unet(name, getattr(torch, options.dtype), options.device)
        bars.remove_task(building)
        for side in options.latent:
            bar = bars.add_task(f"{side}x{side}", total=1.0)

            def tell(what: str, share: float, bar=bar, side=side) -> None:
                bars.update(bar, description=f"{side}x{side}: {what}", completed=share)

            settings = dict(batch=options.batch, ratio=options.ratio, factor=options.factor, rounds=options.rounds)
            if options.rounds:
                found.append(benchmark(unet, side, side, **settings, progress=tell))
            if options.duel:
                settings = dict(batch=options.batch, ratio=options.ratio, rounds=options.duel)
                duels[f"{side}x{side}"] = duel(unet, side, side, **settings, progress=tell)
    for one in found:
        console.print(table(one))
        if one.peer is not None:
            console.print(f"tomesd's time / ours at {one.height}x{one.width}: {one.peer} (above 1: ours is faster)\n")
    for size, timing in duels.items():
        console.print(f"tomesd's time / ours at {size}, the two alone: {timing.ratio('tomesd', 'tome')}")
    if options.out:
        data = result(
            "benchmark",
            env=env | {"tomesd": version("tomesd")},
            pipeline={
                "model": f"{name}-shaped UNet2DConditionModel, random weights",
                "parameters": sum(p.numel() for p in unet.parameters()),
                "batch": options.batch,
                "dtype": options.dtype,
            },
            reduction={"ratio": options.ratio, "factor": options.factor, "levels": [0], "rounds": options.rounds},
            prompts=None,
            rows=[row for one in found for row in one.rows()]
            + [{"duel": size, "seconds": t.seconds, "tome_again": t.again} for size, t in duels.items()],
            intervals={key: value for one in found for key, value in one.intervals().items()}
            | {f"{size} tomesd / tome, duel": vars(t.ratio("tomesd", "tome")) for size, t in duels.items()},
        )
        write_text(options.out, to_json(data))
        console.print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, UnsupportedError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("benchmark: interrupted", file=sys.stderr)
        sys.exit(130)
