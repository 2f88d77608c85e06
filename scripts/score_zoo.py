"""Score an embedded pipeline on the fixed evaluation prompts of the toy world, and compare settings.

    python scripts/score_zoo.py draw toy-sd runs/score/sd                   # 512 prompts, 2 seeds; goes on where it was
    python scripts/score_zoo.py draw toy-sd runs/score/sd-tome --ratio 0.5      # the same noise, with ToMe
    python scripts/score_zoo.py draw toy-sd runs/score/sd-bad --ratio 0.5 --broken
    python scripts/score_zoo.py facts runs/score/sd                             # colour, shape, relation ... by rule
    python scripts/score_zoo.py compare runs/score/sd runs/score/sd-tome runs/score/sd-bad
    python scripts/score_zoo.py judge                                           # linear probes on toy-clip's features

A picture is a PNG named by prompt and seed; `draw` makes those that are missing. Run it twice with --part 0/2 and
--part 1/2 for two processes.
"""

import json
import os
import random
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import track
from scipy.stats import bootstrap
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import diffusion_tokred as tokred
from diffusion_tokred.errors import ConfigError, UnsupportedError
from diffusion_tokred.evaluation import models
from diffusion_tokred.evaluation import scenes as scorer
from diffusion_tokred.evaluation.clip import Clip, probe
from diffusion_tokred.methods import register_method
from diffusion_tokred.methods.random_keep import RandomKeep, RandomKeepConfig
from diffusion_tokred.zoo import scenes

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@register_method("broken", RandomKeepConfig)
class Broken(RandomKeep):
    """Drops random tokens, and gives each the output of a random other one: what every measure has to notice."""

    def prepare(self, site: Any) -> Any:
        at, slot = super().prepare(site)
        strange = torch.randint(len(at), slot.shape, generator=torch.Generator().manual_seed(0)).to(slot.device)
        strange[at] = slot[at]
        return at, strange


def pictures(folder: Path) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """(prompt, seed) of each picture of a run, and the pictures, uint8 `(N, 3, H, W)`."""
    files = sorted(folder.glob("*.png"))
    if not files:
        raise typer.BadParameter(f"no pictures in {folder}; draw them first")
    names = [(int(prompt), int(seed)) for prompt, seed in (file.stem.split("-") for file in files)]
    return names, torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))).movedim(-1, 0) for f in files])


@app.command()
def draw(
    model: Annotated[str, typer.Argument(help="toy-sd, toy-dit, or a folder.")],
    out: Annotated[Path, typer.Argument(help="Folder of the pictures.")],
    prompts: Annotated[int, typer.Option(min=1, help="The first so many evaluation prompts.")] = 512,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 25,
    ratio: Annotated[float, typer.Option(help="ToMe's share of merged tokens; 0 leaves the pipeline alone.")] = 0.0,
    broken: Annotated[bool, typer.Option("--broken", help="Drop and copy at random instead.")] = False,
    as_model: Annotated[str | None, typer.Option(help="For a folder: draw as this model is drawn.")] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Prompts with a pair never trained.")] = False,
    part: Annotated[str, typer.Option(help="i/n: every n-th picture from the i-th on.")] = "0/1",
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 8,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Draw what is missing of a run: `PROMPT-SEED.png`, from noise that only prompt and seed decide."""
    if not (match := re.fullmatch(r"(\d+)/([1-9]\d*)", part)) or int(match[1]) >= int(match[2]):
        raise typer.BadParameter(f"--part is i/n with i below n, such as 0/2 and 1/2; found {part!r}")
    if broken and not ratio:
        raise typer.BadParameter("--broken needs --ratio, the share of tokens to drop")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    index, count = map(int, part.split("/"))
    texts = scenes.evaluation_prompts(prompts, held_out=held_out)
    todo = [(p, s) for s in range(seeds) for p in range(prompts)][index::count]
    todo = [(p, s) for p, s in todo if not (out / f"{p:04d}-{s}.png").exists()]
    pipe = models.load_model(model)
    pipe.set_progress_bar_config(disable=True)
    found = models.defaults(as_model or model)
    options = {"num_inference_steps": steps, "guidance_scale": found.get("guidance", 3.0)} | found.get("call", {})
    method = "broken" if broken else "tome"
    with tokred.patched(pipe, method=method, ratio=ratio) if ratio else nullcontext(pipe):
        for i in track(range(0, len(todo), batch), description=out.name):
            some = todo[i : i + batch]
            noise = [torch.Generator().manual_seed(1_000_003 * s + p) for p, s in some]
            made = pipe([texts[p] for p, _ in some], generator=noise, **options).images
            for (p, s), picture in zip(some, made, strict=True):
                picture.save(out / f"part-{index}.tmp", "PNG")
                os.replace(out / f"part-{index}.tmp", out / f"{p:04d}-{s}.png")


@app.command()
def facts(
    folder: Annotated[Path, typer.Argument(help="Folder of drawn pictures.")],
    held_out: Annotated[bool, typer.Option("--held-out", help="Of prompts with a pair never trained.")] = False,
    table: Annotated[str, typer.Option(help="Print the confusion table of this fact too.")] = "shape",
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the scores here.")] = None,
) -> None:
    """Read all pictures by rule: the share of right facts with 95 % intervals, by seed and in all."""
    if table not in ("shape", "size", "relation", "background", "texture"):
        raise typer.BadParameter(f"--table is shape, size, relation, background or texture; found {table!r}")
    names, images = pictures(folder)
    world = scenes.evaluation_scenes(max(p for p, _ in names) + 1, held_out=held_out)
    readings = [r for some in track(images.split(32)) for r in scorer.read(some / 255)]
    written: dict[str, Any] = {"schema": "tokred.scenes/1", "pictures": len(names), "held_out": held_out}
    for seed in (*sorted({s for _, s in names}), None):
        chosen = [i for i, (_, s) in enumerate(names) if seed in (None, s)]
        scores = scorer.score([world[names[i][0]] for i in chosen], [readings[i] for i in chosen])
        typer.echo(f"{'all' if seed is None else f'seed {seed}'}: {len(chosen)} pictures")
        for fact, score in scores.items():
            typer.echo(f"  {fact:10} {score}")
        key = "all" if seed is None else f"seed {seed}"
        written[key] = {fact: vars(score) | {"share": score.share} for fact, score in scores.items()}
    for asked, seen in scorer.confusion([world[p] for p, _ in names], readings, table).items():
        typer.echo(f"  {asked}: " + ", ".join(f"{name} {n}" for name, n in seen.most_common()))
    if json_to:
        json_to.write_text(json.dumps(written, indent=1) + "\n")


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % BCa bootstrap interval of the mean."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, n_resamples=5000, method="BCa", random_state=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(help="The unpatched run.")],
    others: Annotated[list[Path], typer.Argument(help="Runs of the same prompts and seeds.")],
) -> None:
    """Paired distances of runs to the unpatched one with 95 % intervals, and toy-KID and toy-FID between them."""
    names, first = pictures(base)
    clip = Clip()
    features = torch.cat([clip(some) for some in first.split(64)])
    real = scenes.render(scenes.evaluation_scenes(len(first)), first.shape[-1])
    for folder in others:
        found, second = pictures(folder)
        both = [name for name in names if name in set(found)]
        if len(both) < 2:
            raise typer.BadParameter(f"{folder} and {base} share {len(both)} pictures; draw the same prompts in both")
        a = first[[names.index(name) for name in both]]
        b = second[[found.index(name) for name in both]]
        x, y = a.double() / 255, b.double() / 255
        other = torch.cat([clip(some) for some in b.split(64)])
        mine = features[[names.index(name) for name in both]]
        edges = [(p.diff(dim=-1).abs().mean((1, 2, 3)) + p.diff(dim=-2).abs().mean((1, 2, 3))) for p in (x, y)]
        measured = {
            "PSNR dB": -10 * (x - y).square().mean((1, 2, 3)).clamp(min=1e-10).log10(),
            "SSIM": structural_similarity_index_measure(x, y, data_range=1.0, reduction="none"),
            "toy-CLIP distance": 1 - torch.cosine_similarity(mine, other),
            "sharpness ratio": edges[1] / edges[0],
        }
        typer.echo(f"{folder.name}: {len(both)} pairs")
        for name, values in measured.items():
            low, high = interval(values.numpy().astype(np.float64))
            typer.echo(f"  {name:18} {values.mean():.4f} [{low:.4f}, {high:.4f}]")
        for label, reference in (("unpatched run", a), ("drawn scenes", (real * 255).round().byte())):
            kid = KernelInceptionDistance(feature=clip, subset_size=min(len(b), len(reference)), subsets=1)
            fid = FrechetInceptionDistance(feature=clip, input_img_size=(3, 128, 128))
            for metric in (kid, fid):
                for some in reference.split(64):
                    metric.update(some, real=True)
                for some in b.split(64):
                    metric.update(some, real=False)
            typer.echo(f"  to the {label}: toy-KID {kid.compute()[0]:.5f}, toy-FID {fid.compute():.4f}")


@app.command()
def judge() -> None:
    """How much of a scene a linear probe reads off toy-clip's features: the model card's figures."""
    clip = Clip()

    def features(some: list[scenes.Scene]) -> torch.Tensor:
        parts = [some[i : i + 64] for i in range(0, len(some), 64)]
        return torch.cat([clip((scenes.render(part, 128) * 255).round().byte()) for part in parts])

    for relation in (None, *scenes.RELATIONS):
        train = [scenes.sample_scene(random.Random(f"probe-{i}"), relation=relation) for i in range(2000)]
        test = [scene for scene in scenes.evaluation_scenes(1280) if scene.relation == relation]
        seen, new = features(train), features(test)
        for k, place in enumerate(("only",) if relation is None else ("first", "second")):
            for fact, values in (("color", list(scenes.COLORS)), ("shape", list(scenes.SHAPES))):
                labels, truth = (
                    torch.tensor([values.index(getattr(scene.objects[k], fact)) for scene in some])
                    for some in (train, test)
                )
                right = int((probe(seen, labels, new) == truth).sum())
                score = scorer.wilson(right, len(test), len(test))
                typer.echo(f"{relation or 'alone':9} {place:6} object: {fact} {score}")


if __name__ == "__main__":
    try:
        app()
    except (ConfigError, UnsupportedError) as error:
        raise SystemExit(f"score_zoo: {error}") from None
