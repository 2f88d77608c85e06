"""The panel and what is saved: whole, aligned, or not there at all."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_tokred import ConfigError
from diffusion_tokred.evaluation import images
from diffusion_tokred.evaluation.compare import Comparison
from diffusion_tokred.runtime.stats import TOKEN_STATES


def test_a_folder_is_complete(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert images.save(comparison, tmp_path / "out") == tmp_path / "out" / "compare.png"
    singles = {f"seed-{s}-{n}.png" for s in (0, 3) for n in ("unpatched", "patched", "difference", "tokens")}
    assert {p.name for p in (tmp_path / "out").iterdir()} == singles | {"compare.png", "result.json", "mine.txt"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for row in comparison.rows:
        assert Image.open(tmp_path / "out" / f"seed-{row.seed}-patched.png").tobytes() == row.patched.tobytes()
    assert json.loads((tmp_path / "out" / "result.json").read_text())["schema"] == "tokred.result/1"


def test_the_panel_shows_the_pictures(comparison: Comparison, tmp_path: Path) -> None:
    path = images.save(comparison, tmp_path / "new" / "panel.png")
    panel = Image.open(path)
    width, height = 32 * 7, 48 * 7  # 320 / 48 is nearly 7
    assert panel.size == (2 * 24 + 4 * 240 + 3 * 12, images.HEAD + 2 * (height + images.LINE) + images.FOOT)
    for index, row in enumerate(comparison.rows):
        for place, picture in enumerate((row.unpatched, row.patched)):
            left, top = 24 + place * (240 + 12), images.HEAD + index * (height + images.LINE)
            shown = panel.crop((left, top, left + width, top + height))
            assert shown.tobytes() == picture.resize((width, height), Image.Resampling.LANCZOS).tobytes()
    assert "tome ratio 0.5" in panel.text["Description"]
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "panel.png"]


def test_pictures_of_the_right_size_are_shown_as_they_are(comparison: Comparison) -> None:
    rows = tuple(
        dataclasses.replace(r, unpatched=r.unpatched.resize((256, 200)), patched=r.patched.resize((256, 200)))
        for r in comparison.rows
    )
    panel = images.panel(dataclasses.replace(comparison, rows=rows))
    assert panel.crop((24, images.HEAD, 24 + 256, images.HEAD + 200)).tobytes() == rows[0].unpatched.tobytes()


def test_the_token_map_counts_what_was_not_computed() -> None:
    states = np.array([[0, 1, 2], [3, 4, 5]], dtype=np.uint8)
    token_map = np.stack([states, np.zeros_like(states)])[:, None, None]
    assert images.tokens_left_out(token_map).tolist() == [[0, 0.5, 0.5], [0.5, 0.5, 0]]


def test_difference_and_colours() -> None:
    a, b = Image.new("RGB", (4, 3)), Image.new("RGB", (4, 3), (255, 0, 51))
    assert images.difference(a, b) == pytest.approx(np.full((3, 4), (1 + 0 + 0.2) / 3))
    ends = images.colored(np.array([[0.0, 2.0]]), ("000000", "ff8000"), top=2.0)
    assert ends.getpixel((0, 0)) == (0, 0, 0) and ends.getpixel((1, 0)) == (255, 128, 0)
    brightness = np.asarray(images.colored(np.linspace(0, 1, 64)[None], images.CIVIDIS).convert("L"))[0].astype(int)
    assert (np.diff(brightness) >= 0).all(), "the scale must also read in grey"


@pytest.mark.parametrize("target", ["folder", "panel.png"])
def test_an_interrupt_leaves_nothing(
    comparison: Comparison, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = images._png, []

    def interrupted(*args: object) -> None:
        calls.append(args)
        real(*args)  # type: ignore[arg-type]
        if len(calls) == (3 if target == "folder" else 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(images, "_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        images.save(comparison, tmp_path / target)
    assert not list(tmp_path.rglob("*"))


def test_targets_are_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for wrong in ("file", "folder.png", "file/below"):
        with pytest.raises(ConfigError, match="name a folder"):
            images.check_target(tmp_path / wrong)
    images.check_target(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_a_step_s_map_over_a_picture() -> None:
    states = np.array([[0, 1, 2], [3, 4, 5]], dtype=np.uint8)
    token_map = np.stack([np.zeros_like(states), states])[:, None, None]  # two steps
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    assert images.step_map(picture, token_map, 0).tobytes() == picture.tobytes()  # all computed
    shown, before = images.step_map(picture, token_map, 1), np.asarray(picture, dtype=float)
    assert shown.size == picture.size
    for token, (word, tint) in enumerate(images.TINTS.items()):
        i, j = divmod(token, 3)
        strength = 0 if word == "computed" else images.TINT
        cell = np.s_[10 * i : 10 * i + 10, 10 * j : 10 * j + 10]
        want = (1 - strength) * before[cell] + strength * np.array(tint)
        assert np.abs(np.asarray(shown, dtype=float)[cell] - want).max() <= 0.5
    for wrong, text in (
        (dict(step=2), "no step 2"),
        (dict(step=0, part=1), "no pass 1"),
        (dict(step=-1), "no step -1"),
    ):
        with pytest.raises(ConfigError, match=f"the token map has {text}: there are 0 to"):
            images.step_map(picture, token_map, **wrong)


def test_the_legend_names_what_is_there() -> None:
    whole, some = images.legend(), images.legend(np.array([0, 5], dtype=np.uint8))
    for strip, words in ((whole, list(images.TINTS)), (some, ["computed", "protected"])):
        there = {color for _, color in strip.getcolors(1 << 16)}
        assert {word for word, tint in images.TINTS.items() if tint in there} >= set(words)
    assert images.TINTS["merged"] not in {color for _, color in some.getcolors(1 << 16)}
    assert some.width < whole.width and list(images.TINTS) == list(TOKEN_STATES)
