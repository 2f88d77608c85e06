"""`tokred evaluate`: what settings of a pipeline cost, and what they do to its pictures."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .common import (
    Device,
    Dtype,
    Guidance,
    Model,
    Size,
    Steps,
    app,
    load_pipeline,
    make_console,
    print_table,
    progress_bar,
    quiet_libraries,
    say,
    working,
)  # fmt: skip

EVERY = 30.0  # seconds between lines where there is no terminal


@app.command(
    epilog="""Examples:

    tokred evaluate runs/a --variant tome:ratio=0.5 --variant todo --limit 48

    tokred evaluate runs/a --variant tome:ratio=0.25 --limit 48        # adds to it; nothing is drawn twice

    tokred evaluate runs/b --model ./sdxl --prompts coco.csv --reference coco-stats.npz --variant tome --size 1024

    tokred evaluate --compare runs/a/result.json runs/b/result.json

    torchrun --nproc-per-node 2 -m diffusion_tokred.cli evaluate runs/a --variant tome   # the same, sooner""",
)
def evaluate(
    out: Annotated[Path | None, typer.Argument(help="The run's folder; a run that is there goes on.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="A method with options, numerics, seed or steps:N; repeatable. (default: tome)"),
    ] = None,
    model: Model = "toy-sd",
    prompts: Annotated[
        str | None,
        typer.Option(
            help="scenes, scenes-held-out, a .txt/.csv/.tsv/.jsonl file, owner/name[:split[:column]]. (default: scenes)"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many prompts. (scenes: 64)")] = None,
    column: Annotated[str | None, typer.Option(help="Which column has the prompts. (default: prompt, ...)")] = None,
    unique: Annotated[bool, typer.Option("--unique", help="Drop prompts that came before.")] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Pictures a prompt, from different noise. (default: 1)")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds are counted from this one.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 1,
    steps: Steps = None,
    size: Size = None,
    guidance: Guidance = None,
    scheduler: Annotated[
        str | None, typer.Option(help="A scheduler of diffusers, such as DDIMScheduler. (default: the pipeline's)")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Published settings: tomesd, todo, toca, cat, drawbench, coco5k; options win.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Timed rounds, before anything is drawn; 0: no times.")] = 10,
    match_time: Annotated[
        bool, typer.Option(help="Add runs with fewer steps that take the same time as the methods.")
    ] = True,
    anchors: Annotated[
        bool, typer.Option(help="Also draw with another attention backend (numerics) and from other noise (seed).")
    ] = True,
    reference: Annotated[
        str | None, typer.Option(help="For FID and KID: a folder, an .npz, or drawn (embedded scenes), or none.")
    ] = None,
    claim: Annotated[
        str | None, typer.Option(metavar="VARIANT", help="Claim: no method is worse than this variant (steps-22).")
    ] = None,
    margin: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=X", help="The claim's margin, such as psnr=0; repeatable.")
    ] = None,
    clip_model: Annotated[str | None, typer.Option(help="Folder or hub id of a CLIPModel; toy: the embedded.")] = None,
    inception_weights: Annotated[str | None, typer.Option(help="FID's Inception-v3, a file.")] = None,
    alexnet_weights: Annotated[str | None, typer.Option(help="For LPIPS: torchvision's AlexNet, a file.")] = None,
    vgg_weights: Annotated[str | None, typer.Option(help="For LPIPS: torchvision's VGG16, a file.")] = None,
    pickscore_model: Annotated[str | None, typer.Option(help="Folder or hub id of PickScore as a CLIPModel.")] = None,
    hps_model: Annotated[str | None, typer.Option(help="Folder or hub id of HPSv2 as a CLIPModel.")] = None,
    resize: Annotated[str, typer.Option(help="Of Inception's pictures: tf1 (original FID) or antialias.")] = "tf1",
    judge_batch: Annotated[int, typer.Option(min=1, help="Pictures judged together.")] = 16,
    dtype: Dtype = None,
    device: Device = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads that draw; pictures depend on it.")] = 1,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Only compare two result.json.")
    ] = None,
    any_prompts: Annotated[bool, typer.Option("--any-prompts", help="Compare results of different prompts.")] = False,
) -> None:
    """Time settings of a pipeline, draw the same prompts with each, and measure what became of the pictures.

    Distances to the unpatched pictures come first, with 95 % intervals over the prompts, and beside them what fewer
    steps do in the same time. Whatever is there already is kept: a run that was stopped goes on.
    """
    quiet_libraries()
    if compare is not None:
        from ..evaluation.versus import compare_files

        print(compare_files(*compare, any_prompts=any_prompts))
        return
    if out is None:
        raise ConfigError("name the run's folder: tokred evaluate runs/a --variant tome")
    with working("starting"):
        from ..evaluation import judges  # before all that takes longer to import: a file that is not there is said now

        given = dict(clip=clip_model, inception=inception_weights, alexnet=alexnet_weights, vgg16=vgg_weights)
        panel = judges.Judges.find(given | dict(pickscore=pickscore_model, hps=hps_model), resize)
        judges.check_reference(None if reference == "none" else reference)

        from ..evaluation import generation, launch, models, options
        from ..evaluation import prompts as prompt_sets
        from ..evaluation.evaluate import evaluate as run
        from ..evaluation.measuring import Claim
        from ..evaluation.variants import UNPATCHED, Variant, parse_variant, suited

        options.load_plugins()
        own = models.defaults(model)
        chosen: dict[str, Any] = dict(steps=steps, guidance=guidance, size=options.size(size) if size else None)
        chosen |= dict(repeats=repeats, prompts=prompts, limit=limit, scheduler=scheduler)
        asked, departures = _settings(own, chosen, protocol)
        variants = [Variant(UNPATCHED), *(parse_variant(text, asked.get("steps")) for text in variant or ["tome"])]
        known = {item.anchor for item in variants}
        variants += [Variant(name, anchor=name) for name in ("numerics", "seed") if anchors and name not in known]
        texts = prompt_sets.load(asked["prompts"], asked.get("limit"), column, unique)
        if reference is None and texts.name.startswith("scenes"):
            reference = judges.DRAWN
        stated = _claim(Claim, claim, margin)
        processes = launch.start(models.pick_device(device))
    place = str(processes.device) if processes.device else device
    pipe, _ = load_pipeline(model, dtype, place, None)
    variants = suited(variants, pipe)
    if sampler := asked.get("scheduler"):
        models.set_scheduler(pipe, sampler)
    if processes.rank == 0:
        for text in departures:
            say(f"not as in {protocol}: {text}")
        if unread := models.unread_of(pipe, texts.texts):
            say(unread)
    width, height = asked.get("size") or (None, None)
    call = dict(own.get("call", {})) | dict(guidance_scale=asked.get("guidance"), width=width, height=height)
    with _progress(processes.rank) as tell:
        data = run(
            pipe, texts, variants, out, steps=asked.get("steps") or models.steps_of(pipe),
            call={key: value for key, value in call.items() if value is not None}, model=model,
            repeats=asked.get("repeats", 1), base_seed=seed, batch=batch, threads=threads, rounds=rounds,
            match_time=match_time, judges=panel, reference=None if reference == "none" else reference, claim=stated,
            protocol=protocol, departures=departures, judge_batch=judge_batch, processes=processes,
            pace=generation.Pace(), progress=tell,
        )  # fmt: skip
    if processes.rank == 0:
        _show(data, out)


def _settings(
    own: dict[str, Any], chosen: dict[str, Any], protocol: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What to run with: what was chosen, else what the protocol says, or without one what suits the pipeline."""
    from ..evaluation import protocols

    if protocol is not None:
        return protocols.apply(protocol, chosen)
    suits: dict[str, Any] = {key: own[key] for key in ("steps", "guidance", "size") if key in own}
    suits |= {"prompts": "scenes"} | ({"limit": 64} if chosen["prompts"] in (None, "scenes") else {})
    return suits | {key: value for key, value in chosen.items() if value is not None}, ()


@contextlib.contextmanager
def _progress(rank: int) -> Iterator[Callable[[str, float, str], None]]:
    """A bar on a terminal, a line now and then elsewhere; nothing in processes other than the first."""
    said = time.monotonic()

    def line(what: str, share: float, text: str) -> None:
        nonlocal said
        if rank == 0 and time.monotonic() - said > EVERY:
            said = time.monotonic()
            say(f"{what}, {share:.0%} {text}")

    with progress_bar() if rank == 0 else contextlib.nullcontext() as bar:
        yield line if bar is None else lambda what, share, text: bar(f"{what} {text}".strip(), share)


def _claim(kind: Any, against: str | None, margins: list[str] | None) -> Any:
    """The claim, from words such as psnr=0.5."""
    if against is None:
        if margins:
            raise ConfigError("--margin belongs to a claim: say against which variant with --claim")
        return None
    found = {}
    for text in margins or ():
        name, equals, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"--margin is written METRIC=NUMBER, such as psnr=0.5, got {text!r}")
    return kind(against, found) if found else kind(against)


def _show(data: dict[str, Any], out: Path) -> None:
    from ..evaluation.report import tables

    console = make_console()
    for table in tables(data)[:1]:
        print_table(console, tuple(table.head), table.rows)
    for name in ("report.html", "report.md", "plot.png", "result.json"):
        if (out / name).exists():
            console.print(os.fspath(out / name), soft_wrap=True)
    if data["status"] != "complete":
        say(f"{sum(data['missing'].values())} pictures are missing: only prompts that all variants have were measured")
