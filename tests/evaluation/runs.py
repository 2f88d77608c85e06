"""Small runs, for tests of what draws, resumes and reads them."""

from __future__ import annotations

import datetime
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusion_tokred.evaluation.generation import Generated, generate
from diffusion_tokred.evaluation.launch import Processes
from diffusion_tokred.evaluation.variants import UNPATCHED, Variant, parse_variant
from tests.evaluation import toys

PROMPTS = ("a red star", "a blue ring", "a red star", "a blue star", "a red ring")  # one comes twice
CALL = {"num_inference_steps": 2, "height": 32, "width": 32, "guidance_scale": 3.0}
QUICK = {"num_inference_steps": 1, "height": 16, "width": 16, "guidance_scale": 1.0}
TYPED = ("tome:ratio=0.5", "steps:1", "seed", "numerics")
VARIANTS = (Variant(UNPATCHED), *map(parse_variant, TYPED))
TOME = "tome-ratio-0.5"


def draw(out: Path, pipe: Any = None, **options: Any) -> Generated:
    """Five prompts in batches of two, unpatched and with ToMe: ten quick pictures."""
    options = {"prompts": PROMPTS, "variants": VARIANTS[:2], "batch": 2, "call": QUICK} | options
    return generate(pipe or toys.sd(), out=out, **options)


def files(out: Path) -> dict[str, bytes]:
    """All pictures of a folder, finished or not."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.glob("images/*/*") if p.suffix != ".jsonl"}


def count(out: Path) -> int:
    """How many pictures are in place; also while they are being drawn."""
    return len(list(out.glob("images/*/*.png")))


def lines(out: Path) -> set[str]:
    """Of all manifests."""
    return {line for manifest in out.glob("images/*/manifest-*") for line in manifest.read_text().splitlines()}


def in_a_process(work: Callable[[], Any]) -> Any:
    """A forked process at work; the libraries are loaded already."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def in_two_processes(folder: Path, work: Callable[[Processes], Any]) -> list[Any]:
    """What `work` returns (as JSON) in each of two processes that know of each other, as torchrun's do.

    None for one that failed: also if it waited in vain for the other, for ten seconds.
    """

    def one(rank: int) -> None:
        torch.set_num_threads(1)
        patience = datetime.timedelta(seconds=10)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=patience
        )
        found = work(Processes(rank, 2, None, torch.distributed.new_group(backend="gloo", timeout=3 * patience)))
        (folder / f"{rank}.json").write_text(json.dumps(found))
        torch.distributed.destroy_process_group()

    running = [in_a_process(lambda rank=rank: one(rank)) for rank in range(2)]
    for process in running:
        process.join(60)
        process.kill()
    files = [folder / f"{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]
