"""Score an embedded pipeline on the evaluation prompts of the toy world, and show that the world tells good from bad.

    python scripts/score_zoo.py draw toy-sd runs/score/sd                             # 512 prompts, 2 seeds
    python scripts/score_zoo.py draw toy-sd runs/score/bad --prompts 64 --seeds 1 --ratios 0.25,0.5,0.75 --broken
    python scripts/score_zoo.py facts runs/score/sd                                   # colour, shape, relation ...
    python scripts/evaluate.py runs/score/bad --reference drawn                       # distances, toy-FID and toy-KID
    python scripts/score_zoo.py judge                                                 # linear probes on toy-clip

`draw` goes on where it was stopped; two cores: torchrun --nproc-per-node 2 scripts/score_zoo.py draw ...
"""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from diffusion_tokred.errors import ConfigError, UnsupportedError
from diffusion_tokred.evaluation import launch, models
from diffusion_tokred.evaluation import prompts as prompt_sets
from diffusion_tokred.evaluation import scenes as scorer
from diffusion_tokred.evaluation.clip import Clip, probe
from diffusion_tokred.evaluation.generation import Pace, generate
from diffusion_tokred.evaluation.store import load_run, pictures
from diffusion_tokred.evaluation.variants import UNPATCHED, Variant
from diffusion_tokred.methods import make_config, register_method
from diffusion_tokred.methods.random_keep import RandomKeep, RandomKeepConfig
from diffusion_tokred.zoo import scenes

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class BrokenConfig(RandomKeepConfig):
    """A class of its own: by it the method is found."""


@register_method("broken", BrokenConfig)
class Broken(RandomKeep):
    """Drops random tokens, and gives each the output of a random other one: what every measure has to notice."""

    def prepare(self, site: Any) -> Any:
        at, slot = super().prepare(site)
        strange = torch.randint(len(at), slot.shape, generator=torch.Generator().manual_seed(0)).to(slot.device)
        strange[at] = slot[at]
        return at, strange


@app.command()
def draw(
    model: Annotated[str, typer.Argument(help="toy-sd, toy-dit, or a folder.")],
    out: Annotated[Path, typer.Argument(help="The run's folder.")],
    prompts: Annotated[int, typer.Option(min=1, help="The first so many evaluation prompts.")] = 512,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    ratios: Annotated[str, typer.Option(help="Also with ToMe at these ratios, as 0.25,0.5.")] = "",
    broken: Annotated[
        bool, typer.Option("--broken", help="Also with half of the tokens dropped and replaced at random.")
    ] = False,
    as_model: Annotated[str | None, typer.Option(help="For a folder: draw as this model is drawn.")] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Prompts with a pair never trained.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 8,
) -> None:
    """Draw what is missing of a run, as scripts/generate.py does."""
    variants = [Variant(UNPATCHED)]
    for text in filter(None, ratios.split(",")):
        try:
            ratio = float(text)
        except ValueError:
            raise ConfigError(f"--ratios are numbers, as 0.25,0.5; got {text!r}") from None
        variants.append(Variant(f"tome-{ratio:g}", make_config("tome", ratio=ratio)))
    if broken:
        variants.append(Variant("broken-0.5", make_config("broken", ratio=0.5)))
    processes = launch.start("cpu")
    pipe = models.load_model(model, device="cpu")
    found, pace = models.defaults(as_model or model), Pace()
    call = {"num_inference_steps": steps, "guidance_scale": found.get("guidance", 3.0)} | found.get("call", {})

    def tell(what: str, done: int, total: int) -> None:
        if processes.rank == 0:
            print(f"{what}: {pace(done, total)}", flush=True)

    texts = prompt_sets.load("scenes-held-out" if held_out else "scenes", prompts)
    options = dict(call=call, model=model, processes=processes, progress=tell)
    generate(pipe, texts, variants, out, repeats=seeds, batch=batch, **options)


@app.command()
def facts(
    folder: Annotated[Path, typer.Argument(help="The run's folder.")],
    variant: Annotated[str, typer.Option(help="Of the run.")] = UNPATCHED,
    table: Annotated[str, typer.Option(help="Print the confusion table of this fact too.")] = "shape",
    json_to: Annotated[Path | None, typer.Option("--json", help="Write the scores here.")] = None,
) -> None:
    """Read all pictures by rule: the share of right facts with 95 % intervals, by seed and in all."""
    if table not in ("shape", "size", "relation", "background", "texture"):
        raise typer.BadParameter(f"--table is shape, size, relation, background or texture; found {table!r}")
    run = load_run(folder)
    held_out = run.prompts.name == "scenes-held-out"
    world = scenes.evaluation_scenes(run.prompts.n, held_out=held_out)
    for index, (text, scene) in enumerate(zip(run.prompts.texts, world, strict=True)):
        if text != scenes.caption(scene):
            raise ConfigError(
                f"{folder} was not drawn from the evaluation prompts: its prompt {index} is {text!r}, not"
                f" {scenes.caption(scene)!r}; draw them with `score_zoo.py draw`, or --prompts scenes"
            )
    asked, readings = [], []
    for item, picture in track(pictures(run, variant), total=len(run.items.get(variant, ()))):
        asked.append((world[item.index], item.repeat))
        readings += scorer.read(picture[None] / 255)
    written: dict[str, Any] = {"schema": "tokred.scenes/1", "pictures": len(asked), "held_out": held_out}
    for seed in (*sorted({repeat for _, repeat in asked}), None):
        chosen = [i for i, (_, repeat) in enumerate(asked) if seed in (None, repeat)]
        scores = scorer.score([asked[i][0] for i in chosen], [readings[i] for i in chosen])
        typer.echo(f"{'all' if seed is None else f'seed {seed}'}: {len(chosen)} pictures")
        for fact, score in scores.items():
            typer.echo(f"  {fact:10} {score}")
        key = "all" if seed is None else f"seed {seed}"
        written[key] = {fact: vars(score) | {"share": score.share} for fact, score in scores.items()}
    for wanted, found in scorer.confusion([scene for scene, _ in asked], readings, table).items():
        typer.echo(f"  {wanted}: " + ", ".join(f"{name} {n}" for name, n in found.most_common()))
    if json_to:
        json_to.write_text(json.dumps(written, indent=1) + "\n")


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
