"""Looking at a run's pictures: each once, on the device that is told, prompts told apart by their text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.evaluation.clip import Clip
from diffusion_tokred.evaluation.generation import generate
from diffusion_tokred.evaluation.inception import Inception
from diffusion_tokred.evaluation.judges import Judges
from diffusion_tokred.evaluation.judging import Panel, exactly
from diffusion_tokred.evaluation.lpips import Lpips
from diffusion_tokred.evaluation.measuring import Claim, measure, read_items
from diffusion_tokred.evaluation.prompts import PromptSet
from diffusion_tokred.evaluation.store import load_run
from diffusion_tokred.evaluation.variants import Variant
from diffusion_tokred.methods import make_config
from tests.evaluation import toys

# One comes twice, and one has a character that `splitlines` takes for the end of a line.
TEXTS = ("a red star", "a blue\u2028ring", "a red star")
VARIANTS = (
    Variant("unpatched"),
    Variant("tome", make_config("tome", ratio=0.5)),
    Variant("todo", make_config("todo")),
    Variant("steps-1", call={"num_inference_steps": 1}, anchor="steps"),
)
TOY = Judges()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judging") / "run"
    generate(toys.sd(), PromptSet("odd", TEXTS), VARIANTS, out, call={"num_inference_steps": 2})
    return out


@pytest.fixture
def run(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "run"))


def test_a_prompt_that_is_there_twice_is_one(run: Path) -> None:
    """Its pictures are averaged first, and no interval takes them for two."""
    data = measure(run, judges=TOY)
    items = [item for item in read_items(run) if item["variant"] == "tome"]
    first, ring, again = (item["metrics"]["ssim"] for item in items)
    entry = data["variants"][1]["paired"]["ssim"]
    assert (entry["n"], entry["prompts"]) == (3, 2)
    assert entry["mean"] == pytest.approx(((first + again) / 2 + ring) / 2, abs=1e-12)
    panel = Panel(TOY, TEXTS)
    found = panel.look(load_run(run), "todo", {(i, 0) for i in range(3)})
    assert found.prompts == [0, 1, 0]


def test_any_prompt_survives_the_lines_of_items(run: Path) -> None:
    measure(run, judges=TOY)
    assert [item["prompt"] for item in read_items(run)] == list(TEXTS) * 4


def test_clip_looks_once_at_each_picture(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its score, its distance and the features of FID come from one look; that they are right is tested elsewhere."""
    real, seen = Clip.forward, []

    def forward(self: Clip, pictures: torch.Tensor) -> torch.Tensor:
        seen.append(len(pictures))
        return real(self, pictures)

    monkeypatch.setattr(Clip, "forward", forward)
    data = measure(run, judges=Judges(), batch=2)
    assert {"toy_clip_distance"} < set(data["variants"][1]["paired"]) and data["variants"][1]["distribution"]
    assert seen == [2, 1] * 4


def test_progress_moves_with_every_batch(run: Path) -> None:
    told: list[tuple[str, float]] = []
    measure(run, judges=TOY, batch=1, progress=lambda what, share: told.append((what, share)))
    shares = [share for what, share in told if what == "judging todo"]
    assert shares == pytest.approx([0.9 * (2 + share) / 4 for share in (0, 1 / 3, 2 / 3, 1)])
    assert [share for _, share in told] == sorted(share for _, share in told) and told[-1] == ("done", 1.0)


def test_all_judges_go_to_the_device() -> None:
    """The device "meta" computes nothing, but a judge that stayed on the CPU, or its input, would raise there."""
    judges = Judges()
    judges.__dict__["lpips"] = (Lpips("alex", None),)  # random weights: the published ones are not here
    judges.__dict__["extractors"] = (Inception(None), judges.clip)
    judges.__dict__["preferences"] = {"pick_score": Clip()}
    panel = Panel(judges, TEXTS, "meta")
    a = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    for extractor in panel.extractors:
        assert extractor(a).device.type == "meta"
    for judge in panel.scores.judges.values():
        assert judge.score(a, TEXTS[:2]).device.type == judge.project(panel.clip(a)).device.type == "meta"
    assert len(panel.scores.judges) == 2 and panel.paired.lpips[0](a, a).device.type == "meta"


def test_what_goes_with_a_gpu() -> None:
    """No TF32 while judging; what to do where memory does not suffice."""
    before = torch.backends.cudnn.allow_tf32
    says = "out of memory on cuda while 16 pictures are judged together: judge fewer at once, or on the cpu"
    with pytest.raises(tokred.ConfigError, match=says), exactly(torch.device("cuda"), 16):
        assert before and not torch.backends.cudnn.allow_tf32
        raise torch.OutOfMemoryError
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("name", ["psnr", "toy_clip_score", "toy_clip_distance"])
def test_scores_from_elsewhere_have_names_of_their_own(run: Path, name: str) -> None:
    file = next((run / "images" / "tome").glob("*.png")).relative_to(run)
    (run / "scores.jsonl").write_text(json.dumps({"file": str(file), "mine": 1, name: 1}) + "\n")
    with pytest.raises(tokred.ConfigError, match=f"scores.jsonl, line 1: {name} is measured here already"):
        measure(run, judges=TOY)


def test_all_verdicts_of_a_run_share_the_five_per_cent(run: Path) -> None:
    """Two margins and two methods make four; anchors, and what they are held against, are not among them."""

    def levels(claim: Claim) -> dict[str, Any]:
        return {v["name"]: v["verdict"] and {m: x["level"] for m, x in v["verdict"].items()}
                for v in measure(run, judges=TOY, claim=claim)["variants"]}  # fmt: skip

    four = {"psnr": pytest.approx(1 - 0.05 / 4), "ssim": pytest.approx(1 - 0.05 / 4)}
    assert levels(Claim("steps-1")) == {"unpatched": None, "tome": four, "todo": four, "steps-1": None}
    alone = levels(Claim("todo", {"ssim": 0.0}))
    assert alone == {"unpatched": None, "tome": {"ssim": pytest.approx(0.95)}, "todo": None, "steps-1": None}


def test_claims_that_cannot_be_tested_are_refused(run: Path) -> None:
    for against, margins, says in (
        ("steps-1", {"ssim": -0.1}, "a number >= 0, got ssim -0.1"),
        ("steps-1", {"ssim": float("nan")}, "a number >= 0, got ssim nan"),
        ("steps-1", {"ssim": float("inf")}, "a number >= 0, got ssim inf"),
        ("unpatched", {"psnr": 0.0}, "psnr is a distance to the unpatched pictures"),
        ("unpatched", {"toy_clip_distance": 0.0}, "toy_clip_distance is a distance to the unpatched pictures"),
    ):
        with pytest.raises(tokred.ConfigError, match=says):
            measure(run, judges=TOY, claim=Claim(against, margins))
    measure(run, judges=TOY, claim=Claim("unpatched", {"toy_clip_score": 1.0}))  # a score may be held against it


def test_failed_pictures_are_in_no_figure(run: Path) -> None:
    """Of any variant: the others would be measured on other prompts."""
    manifest = next((run / "images" / "todo").glob("manifest-*.jsonl"))
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        line |= {"failure": "black: all values are 0"} if line["index"] == 1 else {}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = measure(run, judges=TOY)
    assert [item["index"] for item in read_items(run)] == [0, 2] * 4
    for variant in data["variants"]:
        parts = [entry for part in ("paired", "scores", "change", "distribution") for entry in variant[part].values()]
        assert parts and all(entry["n"] == 2 for entry in parts)
    assert data["failures"][0]["variant"] == "todo" and data["prompts"]["measured"] == 2
    assert any("with a failed picture are in no figure" in note for note in data["notes"])
