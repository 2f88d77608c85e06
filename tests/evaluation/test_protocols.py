"""Published settings: complete, sourced, and never a guess."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation import models, prompts, protocols

DOC = Path(__file__).parents[2] / "docs" / "how-to-measure.md"


def test_the_settings_are_those_of_the_sources() -> None:
    """What the papers and their code say, written down here a second time from the sources."""
    told = {
        "scenes": ("scenes", None, 20, 3.0, (128, 128), 64, 1),
        "tomesd": ("tomesd", "PNDMScheduler", 50, 7.5, (512, 512), 1000, 2),
        "todo": ("todo", "DDIMScheduler", 50, 7.5, (1536, 1536), None, None),
        "toca": ("toca", "DPMSolverMultistepScheduler", 20, 4.5, (256, 256), 30_000, 1),
        "cat": ("cat", None, 28, 7.0, (1024, 1024), 1632, None),
        "drawbench": ("drawbench", None, 50, None, (1024, 1024), 200, 1),
        "coco5k": ("coco5k", None, None, None, None, 5000, 1),
    }
    found = {
        name: (p.name, p.scheduler, p.steps, p.guidance, p.size, p.prompts.count, p.prompts.repeats)
        for name, p in protocols.PROTOCOLS.items()
    }
    assert found == told and protocols.DEFAULT in found
    assert protocols.find("tomesd").reference and "5,000" in str(protocols.find("tomesd").reference)
    assert "29,736" in " ".join(protocols.find("toca").traps)


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_what_is_not_stated_is_called_unknown(name: str) -> None:
    import diffusers

    p = protocols.find(name)
    if "this package" not in p.source:
        assert re.search(r"arXiv \d{4}\.\d{5}", p.source) and p.unknown
        words = " ".join(p.unknown)
        for what, value in (("guidance", p.guidance), ("precision", p.precision)):
            assert (value is None) == (what in words), f"{what} of {name}"
        assert any("seed" in text for text in (*p.unknown, *p.more, *p.traps))
    if p.scheduler is not None:
        assert inspect.isclass(getattr(diffusers, p.scheduler))
    assert p.prompts.source or "--prompts" in p.prompts.how


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_a_description_says_all(name: str) -> None:
    p, text = protocols.find(name), protocols.describe(name)
    flat = " ".join(text.split())
    for part in (p.source, p.prompts.how, p.theirs, p.ours, *p.more, *p.unknown, *p.traps):
        assert " ".join(part.split()) in flat
    assert all(len(line) <= 100 for line in text.splitlines() if "http" not in line)
    assert ("not stated" in text) == bool(p.unknown or None in (p.scheduler, p.hardware, p.precision))


def test_scenes_is_what_the_embedded_pipelines_were_trained_for() -> None:
    found, departures = protocols.apply("scenes")
    assert departures == ()
    for model in ("toy-sd", "toy-dit"):
        wanted = models.defaults(model)
        assert {key: found[key] for key in ("steps", "guidance", "size")} == {
            key: wanted[key] for key in ("steps", "guidance", "size")
        }
    assert prompts.load(found["prompts"], found["limit"]).n == 64


def test_prompts_that_are_not_shipped_are_named() -> None:
    places = {"coco5k": "cocodataset.org", "cat": "PartiPrompts.tsv", "tomesd": "class names", "toca": "--unique"}
    for name, where in (places | {"drawbench": "imagen.research.google", "todo": "not known"}).items():
        with pytest.raises(ConfigError, match=f"(?s)not shipped.*{re.escape(where)}"):
            protocols.apply(name)
    found, departures = protocols.apply("tomesd", {"prompts": "imagenet.txt", "steps": None})
    said = {"steps": 50, "guidance": 7.5, "size": (512, 512), "repeats": 2, "scheduler": "PNDMScheduler"}
    assert found == said | {"prompts": "imagenet.txt"} and departures == ()


def test_departures_are_said() -> None:
    chosen = {"prompts": "a.txt", "steps": 10, "size": (256, 256), "guidance": 7.5, "limit": 100}
    chosen |= {"scheduler": "DDIMScheduler"}
    found, departures = protocols.apply("tomesd", chosen)
    assert found == chosen | {"repeats": 2}
    assert departures == (
        "steps 10 instead of 50", "size 256x256 instead of 512x512", "scheduler DDIMScheduler instead of PNDMScheduler",
        "limit 100 of 1000 prompts",
    )  # fmt: skip
    assert protocols.apply("scenes", {"limit": 8})[1] == ("limit 8 instead of 64",)
    assert protocols.apply("coco5k", {"prompts": "a.txt", "steps": 30})[1] == ()  # the protocol does not say


def test_unknown_names_are_refused() -> None:
    for call in (protocols.find, protocols.settings, protocols.apply, protocols.describe):
        with pytest.raises(ConfigError, match="no protocol 'coco': there is scenes, tomesd"):
            call("coco")  # type: ignore[operator]
    with pytest.raises(ConfigError, match="no setting sampler: there is steps"):
        protocols.apply("scenes", {"sampler": "ddim"})


def test_coco_captions_pick_by_annotation_id() -> None:
    rows = [
        {"image_id": 9, "id": 5, "caption": "A long  caption\nof two lines. "},
        {"image_id": 9, "id": 3, "caption": "Short."},
        {"image_id": 2, "id": 8, "caption": "Only one."},
        {"image_id": 9, "id": 7, "caption": "b" * len("A long caption of two lines.")},
    ]
    assert protocols.coco_captions({"annotations": rows}) == ["Only one.", "Short."]
    assert protocols.coco_captions({"annotations": rows}, "longest") == ["Only one.", "A long caption of two lines."]
    for wrong in ({}, [], {"annotations": [{"id": 1}]}):
        with pytest.raises(ConfigError, match="no COCO captions"):
            protocols.coco_captions(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="first or longest"):
        protocols.coco_captions({"annotations": rows}, "best")


def test_the_document_names_every_protocol() -> None:
    text = DOC.read_text(encoding="utf-8")
    for name, p in protocols.PROTOCOLS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        for value in (p.steps, p.guidance):
            assert value is None or re.search(rf"\b{value:g}\b", row), f"{name}: {value} is not in {row}"
