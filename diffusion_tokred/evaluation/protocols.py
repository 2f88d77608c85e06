"""Published evaluation protocols as settings, with what their sources leave open named as unknown.

A protocol here is what a paper or its code says, no more. Nothing is filled in by guessing: what is None is not stated,
and `unknown` lists it. Prompts that cannot be shipped are named, with where they come from.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

DEFAULT = "scenes"


@dataclass(frozen=True)
class Prompts:
    """Which prompts, how many pictures each, and how to get them. `source` is a name that `prompts.load` knows."""

    what: str
    count: int | None
    repeats: int | None
    how: str
    source: str | None = None


@dataclass(frozen=True)
class Protocol:
    """Settings of a published evaluation. None: the source does not say.

    Attributes:
        name: as in `--protocol`.
        source: where it is from.
        model: in words; weights are not shipped.
        prompts: see `Prompts`.
        scheduler: diffusers' class for the sampler that is named.
        size: width and height in pixels.
        precision, hardware: as stated.
        reference: what FID is computed against.
        theirs: the figures that were published, and with what.
        ours: what of them this package measures, or instead.
        more: other settings of the same source.
        unknown: what has to be decided by whoever repeats it.
        traps: what went wrong in it, and must not be repeated.
    """

    name: str
    source: str
    model: str
    prompts: Prompts
    theirs: str
    ours: str
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    precision: str | None = None
    hardware: str | None = None
    reference: str | None = None
    more: tuple[str, ...] = field(default=())
    unknown: tuple[str, ...] = field(default=())
    traps: tuple[str, ...] = field(default=())


_OWN = "PSNR, SSIM, MS-SSIM to the unpatched pictures; LPIPS and CLIP score with --alexnet-weights and --clip-model"
_COCO = (
    "captions are in annotations/captions_val2014.json or captions_val2017.json, in annotations_trainval2014.zip and"
    " -2017.zip of https://cocodataset.org (Creative Commons BY 4.0)"
)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="scenes",
            source="this package: the smoke test that needs no network",
            model="toy-sd or toy-dit, embedded",
            prompts=Prompts("captions of drawn scenes", 64, 1, "embedded; no option is needed", "scenes"),
            steps=20,
            guidance=3.0,
            size=(128, 128),
            precision="float32",
            reference="drawn: scenes that are rendered, not generated",
            theirs="none: the toy world is nobody's benchmark",
            ours="PSNR, SSIM, MS-SSIM, toy-CLIP distance to the unpatched pictures; facts of the scene read by rule",
            traps=("toy figures compare variants on the toy pipelines, and say nothing about real models",),
        ),
        Protocol(
            name="tomesd",
            source="ToMe for Stable Diffusion, arXiv 2303.17604 and its README",
            model="Stable Diffusion 1.5",
            prompts=Prompts(
                "the class names of ImageNet-1k", 1000, 2,
                "a text file with one prompt a line made of the 1,000 class names, which come with ImageNet"
                " (LOC_synset_mapping.txt): --prompts FILE",
            ),
            scheduler="PNDMScheduler",
            steps=50,
            guidance=7.5,
            size=(512, 512),
            precision="fp16",
            hardware="RTX 4090",
            reference="5,000 ImageNet validation pictures, 5 of each class",
            theirs="FID by pytorch-fid for ratios 0 to 0.6: 33.12, 32.86, 32.86, 32.80, 32.87, 33.02, 33.37; seconds"
            " and memory a picture: 3.09 to 1.52 s, 3.41 to 0.60 GB",
            ours=f"FID and KID to --reference; {_OWN}",
            unknown=(
                "the words around the class name (a later paper, Fourier-TM, writes 'a photo of a CLASS')",
                "the seeds", "which 5 pictures of each class",
            ),
            traps=(
                "counts, reference and guidance are quoted by others, not in the README",
                "the whole sweep from 0 to 0.6 spans 0.57 FID, at n = 2,000, where the covariance of 2,048 features is"
                " singular: CA-ToMe's own unchanged baseline differs by 0.57 between two of its tables",
                "the baseline is attention without flash kernels: against those a speed-up is smaller",
                "tomesd's generator goes on from call to call, so a picture depends on what was drawn before",
            ),
        ),
        Protocol(
            name="todo",
            source="ToDo, arXiv 2402.13573",
            model="DreamShaper-v7 (a Stable Diffusion 1.5)",
            prompts=Prompts(
                "not known", None, None, "any prompts of yours, as a file: --prompts FILE; ten pictures were averaged"
            ),
            scheduler="DDIMScheduler",
            steps=50,
            guidance=7.5,
            size=(1536, 1536),
            precision="fp16",
            hardware="A6000, flash attention",
            theirs="mean of 10 generations: MSE to the unpatched picture and HPF, the mean absolute high-pass. At"
            " 1536x1536 and 0.75 / 0.89: MSE ToMe .02686 / .02671, ToDo .00625 / .00921; HPF unpatched 4.846,"
            " ToMe 4.022 / 4.003, ToDo 4.887 / 4.733",
            ours="PSNR, which is 10·log10(1 / MSE) of a picture, and sharpness_ratio, a high-pass, beside the rest",
            more=(
                "1024x1024 and 2048x2048 too; ratios 0.75 and 0.89, and 0.9375 at 2048x2048: factors 2, 3, 4",
            ),
            unknown=("the prompts and seeds", "the high-pass filter's kernel"),
            traps=("ten pictures give a wide interval: it was not reported",),
        ),
        Protocol(
            name="toca",
            source="ToCa, arXiv 2410.05317, and its code for PixArt",
            model="PixArt-alpha, 256 pixels",
            prompts=Prompts(
                "COCO captions", 30_000, 1,
                f"{_COCO}; 30,000 of them, one a line: --prompts FILE --unique",
            ),
            scheduler="DPMSolverMultistepScheduler",
            steps=20,
            guidance=4.5,
            size=(256, 256),
            reference="COCO pictures (FID-30k)",
            theirs="FID-30k; torchmetrics' CLIPScore with ViT-L/14; CLIP score on PartiPrompts (1,632)",
            ours=f"FID and KID to --reference; {_OWN}",
            more=(
                "DiT-XL/2, 256 pixels, DDPM 250 or DDIM 50 steps, guidance 1.5, 50,000 samples, ADM's evaluator (this"
                " package takes no class-conditional pipelines)",
                "FLUX.1-dev, 1024 pixels, 50 steps: GenEval, and ImageReward on DrawBench's 200 prompts",
            ),
            unknown=("precision", "which COCO pictures are the reference", "the base seed"),
            traps=(
                "sampler, steps and guidance are read off a folder's name",
                "the file of 30,000 captions has 30,003, of which 29,736 differ; pictures are named by their caption,"
                " so 267 overwrite each other",
                "seeds depend on the number of processes (seed · world + rank)",
            ),
        ),
        Protocol(
            name="cat",
            source="CAT Pruning, arXiv 2502.00433",
            model="Stable Diffusion 3 medium",
            prompts=Prompts(
                "PartiPrompts", 1632, None,
                "PartiPrompts.tsv of https://github.com/google-research/parti (Apache-2.0): --prompts PartiPrompts.tsv",
            ),
            steps=28,
            guidance=7.0,
            size=(1024, 1024),
            theirs="CLIP score only; MACs -50 % at 28 steps, -60 % at 50",
            ours=_OWN,
            more=("50 steps; PixArt-Sigma; COCO 2017 captions",),
            unknown=(
                "the CLIP model", "how many COCO captions, and which", "pictures a prompt", "seeds", "precision",
                "what a MAC counts",
            ),
            traps=(
                "a CLIP score is not fidelity: the reviewers asked for the distance to the unpruned picture, FID and"
                " intervals",
            ),
        ),
        Protocol(
            name="drawbench",
            source="DrawBench, arXiv 2205.11487, as cache-dit uses it",
            model="FLUX.1-dev",
            prompts=Prompts(
                "DrawBench", 200, 1,
                "the sheet that https://imagen.research.google links to; its prompts as a column 'prompt' or one a"
                " line: --prompts FILE",
            ),
            steps=50,
            size=(1024, 1024),
            hardware="L20",
            theirs="CLIP score (laion/CLIP-ViT-g-14), ImageReward; PSNR, SSIM, LPIPS to the uncached pictures; TFLOPs",
            ours=f"{_OWN}; not ImageReward, whose package does not load with transformers 5",
            more=("seed 0",),
            unknown=("guidance", "precision"),
            traps=(
                "its column SpeedUp is a ratio of FLOPs: 3726.87 / TFLOPs",
                "its PSNR subtracts 8-bit integers, which wrap around: unrelated noise scores 27.89 dB instead of 7.74",
                "unpaired CLIP scores of 200 prompts have an estimated standard error of 0.3; its table spans 0.2",
            ),
        ),
        Protocol(
            name="coco5k",
            source="this package's standard tier; FreqTS (AAAI 2025) among others reports COCO-5k",
            model="any text-to-image pipeline",
            prompts=Prompts(
                "COCO val2017, of each picture the caption with the smallest annotation id", 5000, 1,
                f"{_COCO}; `protocols.coco_captions` picks them: --prompts FILE",
            ),
            reference="the 5,000 pictures of val2017, as a folder or an .npz of their statistics",
            theirs="FID, CLIP score",
            ours=f"FID and KID to --reference; {_OWN}",
            unknown=("model, sampler, steps, guidance and size: they are yours to choose and to state",),
            traps=(
                "each picture has about five captions: SDTM takes the longest, so its figures do not compare with those"
                " of the first",
            ),
        ),
    )
}  # fmt: skip


def find(name: str) -> Protocol:
    """A protocol by its name. Raises ConfigError for another."""
    if name not in PROTOCOLS:
        raise ConfigError(f"no protocol {name!r}: there is {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def settings(name: str) -> dict[str, Any]:
    """What a protocol says about the run, and only that: steps, guidance, size, repeats, scheduler, prompts, limit."""
    p = find(name)
    found: dict[str, Any] = {"steps": p.steps, "guidance": p.guidance, "size": p.size, "repeats": p.prompts.repeats}
    found |= {
        "scheduler": p.scheduler,
        "prompts": p.prompts.source,
        "limit": p.prompts.count if p.prompts.source else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def apply(name: str, overrides: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Settings of a run after a protocol, and in words how it departs from it.

    Args:
        name: of the protocol.
        overrides: what was chosen instead, by the names of `settings`; None is no choice.

    Raises:
        ConfigError: no such protocol or setting; the prompts have to be named, and were not: says where they are.
    """
    p, published = find(name), settings(name)
    names = ("steps", "guidance", "size", "scheduler", "repeats", "prompts", "limit")
    chosen = {key: value for key, value in (overrides or {}).items() if value is not None}
    if unknown := [key for key in chosen if key not in names]:
        raise ConfigError(f"{name} has no setting {', '.join(unknown)}: there is {', '.join(names)}")
    if p.prompts.source is None and "prompts" not in chosen:
        raise ConfigError(f"the protocol {name} needs prompts that are not shipped ({p.prompts.what}): {p.prompts.how}")
    departures = [
        f"{key} {_text(value)} instead of {_text(published[key])}"
        for key, value in chosen.items()
        if key in published and value != published[key]
    ]
    if "limit" in chosen and "limit" not in published and (p.prompts.count or 0) > chosen["limit"]:
        departures.append(f"limit {chosen['limit']} of {p.prompts.count} prompts")
    return published | chosen, tuple(departures)


def describe(name: str) -> str:
    """A protocol in words, a line each."""
    p = find(name)
    rows = [
        ("source", p.source), ("model", p.model), ("prompts", _count(p.prompts)), ("get them", p.prompts.how),
        ("sampler", _stated(p.scheduler)), ("steps", _stated(p.steps)), ("guidance", _stated(p.guidance)),
        ("size", _stated(None if p.size is None else _text(p.size))), ("precision", _stated(p.precision)),
        ("hardware", _stated(p.hardware)), ("reference", _stated(p.reference)), ("published", p.theirs),
        ("measured here", p.ours), *(("also", text) for text in p.more), *(("not stated", text) for text in p.unknown),
        *(("trap", text) for text in p.traps),
    ]  # fmt: skip
    wrap = textwrap.TextWrapper(100, subsequent_indent=" " * 15, break_on_hyphens=False, break_long_words=False)
    lines = [wrap.fill(f"{key:<15}{text}") for key, text in rows]
    return "\n".join([p.name, *lines]) + "\n"


def coco_captions(annotations: Mapping[str, Any], pick: str = "first") -> list[str]:
    """One caption of each picture, in the order of the pictures' ids, from COCO's captions file as `json` reads it.

    Args:
        annotations: has `annotations`, each with `id`, `image_id` and `caption`.
        pick: "first", the one with the smallest annotation id, or "longest" (of several, the first).

    Raises:
        ConfigError: another `pick`, or a file without captions.
    """
    if pick not in ("first", "longest"):
        raise ConfigError(f"pick is first or longest, got {pick!r}")
    rows = annotations.get("annotations") if isinstance(annotations, Mapping) else None
    if not rows or not all({"id", "image_id", "caption"} <= set(row) for row in rows):
        raise ConfigError("these are no COCO captions: annotations with id, image_id and caption are needed")
    found: dict[int, str] = {}
    for row in sorted(rows, key=lambda row: row["id"]):
        text, known = " ".join(row["caption"].split()), found.get(row["image_id"])
        if known is None or (pick == "longest" and len(text) > len(known)):
            found[row["image_id"]] = text
    return [found[image] for image in sorted(found)]


def _count(prompts: Prompts) -> str:
    count = "number not stated" if prompts.count is None else f"{prompts.count:,}"
    each = "pictures of each not stated" if prompts.repeats is None else f"{prompts.repeats} of each"
    return f"{prompts.what}; {count}, {each}"


def _stated(value: Any) -> str:
    return "not stated" if value is None else str(value)


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
