"""Pictures against calls of the pipeline by hand, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffusion_tokred as tokred
from diffusion_tokred.errors import ConfigError, StateError, UnsupportedError
from diffusion_tokred.evaluation import generation, store
from diffusion_tokred.evaluation.generation import SEED_SHIFT, Pace, batches
from diffusion_tokred.evaluation.settings import weights_hash
from diffusion_tokred.evaluation.store import load_run, pictures
from diffusion_tokred.evaluation.variants import UNPATCHED, Variant, parse_variant
from diffusion_tokred.testing import tiny
from tests.evaluation import toys
from tests.evaluation.runs import CALL, PROMPTS, TOME, VARIANTS, draw, files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all variants. Nobody changes it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    draw(out, variants=VARIANTS, call=CALL)
    return out


@pytest.mark.parametrize("name", [variant.name for variant in VARIANTS])
def test_pictures_are_those_of_calls_by_hand(whole, pipe, name):
    """Batches of two prompts in their order, a CPU generator each, through diffusers' own PIL pictures."""
    state = nullcontext()
    if name == TOME:
        state = tokred.patched(pipe, method="tome", ratio=0.5, seed=0)
    elif name == "numerics":
        state = sdpa_kernel(SDPBackend.MATH)
    shift, call = (2_000_000_011 if name == "seed" else 0), dict(CALL)
    if name == "steps-1":
        call["num_inference_steps"] = 1
    expected = []
    with state:
        for some in ((0, 1), (2, 3), (4,)):
            noise = [torch.Generator().manual_seed(i + shift) for i in some]
            expected += pipe([PROMPTS[i] for i in some], generator=noise, **call).images
    found = list(pictures(whole, name))
    assert [item.index for item, _ in found] == [0, 1, 2, 3, 4]
    for (item, picture), by_hand in zip(found, expected, strict=True):
        assert picture.dtype == torch.uint8
        assert np.array_equal(picture.permute(1, 2, 0), np.array(by_hand))
        assert item.seed == item.index + shift
        digest = hashlib.sha256(PROMPTS[item.index].encode()).hexdigest()[:8]
        assert item.file == f"images/{name}/{item.index:06d}-0-{digest}.png"
        with Image.open(whole / item.file) as png:
            assert png.format == "PNG"
            assert png.info["prompt"] == PROMPTS[item.index]
            assert (png.info["seed"], png.info["variant"]) == (str(item.seed), name)
            assert len(png.info["settings"]) == 16


def test_variants_differ_and_repeated_prompts_do_not_collide(whole):
    drawn = {name: torch.stack([picture for _, picture in pictures(whole, name)]) for name in load_run(whole).items}
    for name, stack in drawn.items():
        assert stack.shape == (5, 3, 32, 32)
        assert not torch.equal(stack[0], stack[2])  # the same prompt from other noise
        if name not in (UNPATCHED, "numerics"):  # what rounding changes may vanish in 8 bits: it depends on the CPU
            assert not torch.equal(stack, drawn[UNPATCHED])
    assert (drawn["numerics"].int() - drawn[UNPATCHED].int()).abs().max() <= 1
    assert (drawn["seed"].int() - drawn[UNPATCHED].int()).abs().float().mean() > 1


def test_the_anchors_noise_is_other_noise():
    """torch's CPU generator reads 32 bits of a seed: a shift by 2**32 would change nothing."""
    one, other = (torch.randn(4, generator=torch.Generator().manual_seed(3 + s)) for s in (0, SEED_SHIFT))
    assert not torch.equal(one, other)
    assert SEED_SHIFT < 2**32


def test_repeats_have_noise_of_their_own(tmp_path, pipe):
    draw(tmp_path / "a", pipe, prompts=PROMPTS[:2], repeats=2, base_seed=7, variants=VARIANTS[:1], batch=4)
    found = list(pictures(tmp_path / "a", UNPATCHED))
    assert [(item.index, item.repeat, item.seed) for item, _ in found] == [
        (0, 0, 7), (1, 0, 8), (0, 1, 1_000_010), (1, 1, 1_000_011),
    ]  # fmt: skip
    noise = [torch.Generator().manual_seed(seed) for seed in (1_000_010, 1_000_011)]
    by_hand = pipe(list(PROMPTS[:2]), generator=noise, **CALL).images  # a batch never mixes repeats
    assert [np.array_equal(p.permute(1, 2, 0), np.array(b)) for (_, p), b in zip(found[2:], by_hand, strict=True)]


def test_batches_cover_all_once_and_later_repeats_leave_them():
    found = batches(5, 3, 2)
    assert sorted((r, i) for r, some in found for i in some) == [(r, i) for r in range(3) for i in range(5)]
    assert max(len(some) for _, some in found) == 2
    assert found[:3] == batches(5, 1, 2) == [(0, (0, 1)), (0, (2, 3)), (0, (4,))]


def test_the_pipeline_is_left_as_it_was(tmp_path, pipe, monkeypatch):
    pipe.set_progress_bar_config(desc="mine")
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    before = dict(pipe.unet.__dict__)
    draw(tmp_path / "a", pipe, prompts=PROMPTS[:1], threads=3)
    assert pipe.unet.__dict__.keys() == before.keys()
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert threads == [3, torch.get_num_threads()]
    assert load_run(tmp_path / "a").asked["settings"]["threads"] == 3


def test_text_of_the_call_goes_to_every_picture(tmp_path, pipe):
    draw(tmp_path / "a", pipe, prompts=PROMPTS[:2], variants=VARIANTS[:1], call=CALL | {"negative_prompt": "a ring"})
    noise = [torch.Generator().manual_seed(i) for i in (0, 1)]
    by_hand = pipe(list(PROMPTS[:2]), negative_prompt=["a ring"] * 2, generator=noise, **CALL).images
    for (_, picture), expected in zip(pictures(tmp_path / "a", UNPATCHED), by_hand, strict=True):
        assert np.array_equal(picture.permute(1, 2, 0), np.array(expected))


def test_progress_counts_pictures(tmp_path, pipe):
    seen: list[tuple[str, int, int]] = []
    draw(tmp_path / "a", pipe, progress=lambda *what: seen.append(what))
    assert [done for _, done, _ in seen] == [0, 2, 2, 4, 4, 5, 5, 7, 7, 9, 9, 10]
    assert {(name, total) for name, _, total in seen} == {(UNPATCHED, 10), (TOME, 10)}


def test_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now[0])
    pace = Pace()
    now[0] = 150.0  # loading a model is no drawing
    assert pace(10, 100) == "10 of 100 pictures"  # ten were there
    now[0] = 160.0
    assert pace(30, 100) == "30 of 100 pictures, 2 a second, 0:00:35 left"


def test_weights_are_told_apart(pipe):
    before = weights_hash(pipe)
    assert before == weights_hash(toys.sd()) != weights_hash(toys.sd(seed=1))
    with torch.no_grad():
        pipe.text_encoder.get_parameter(next(n for n, _ in pipe.text_encoder.named_parameters())).view(-1)[0] += 1e-3
    assert weights_hash(pipe) != before


# --- what goes wrong -------------------------------------------------------------------------------------------------


class Broken:
    """A decoder whose output is replaced in some calls."""

    def __init__(self, decode: Callable[..., Any], values: dict[int, float]) -> None:
        self.decode, self.values, self.calls = decode, values, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.decode(*args, **kwargs)
        self.calls += 1
        if self.calls - 1 in self.values:
            picture = found[0].clone()
            picture[:, :, :16] = self.values[self.calls - 1]
            return (picture if self.calls != 3 else picture.fill_(-1.0),)
        return found


def test_pictures_that_are_broken_are_saved_and_reported(tmp_path, pipe, monkeypatch):
    out = tmp_path / "a"
    monkeypatch.setattr(pipe.vae, "decode", Broken(pipe.vae.decode, {1: float("nan"), 2: -1.0}))
    made = draw(out, pipe, prompts=PROMPTS[:4], variants=VARIANTS[:1], batch=1, call=CALL)
    nan, black = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert made.run.failures == [nan, black]
    assert (nan["variant"], nan["index"], nan["failure"]) == (
        UNPATCHED, 1, "1536 of 3072 values are not finite; nan is saved as 0",
    )  # fmt: skip
    assert (black["index"], black["failure"]) == (2, "black: all values are 0")
    assert made.run.complete
    shown = [picture for _, picture in pictures(out, UNPATCHED)]
    assert not shown[1][:, :16].any()
    assert shown[1][:, 16:].any()
    assert load_run(out).items[UNPATCHED][0].failure is None
    assert draw(out, pipe, prompts=PROMPTS[:4], variants=VARIANTS[:1], batch=1, call=CALL).run.failures == [nan, black]


def test_a_picture_that_comes_out_otherwise_the_second_time_is_reported(tmp_path, pipe, monkeypatch):
    out, options = tmp_path / "a", {"prompts": PROMPTS[:2], "variants": VARIANTS[:1]}
    first = draw(out, pipe, **options).run.items[UNPATCHED]
    before = files(out)
    (out / first[1].file).unlink()  # its batch is drawn whole again ...
    monkeypatch.setattr(pipe.vae, "decode", Broken(pipe.vae.decode, {0: 0.5}))  # ... and comes out otherwise
    made = draw(out, pipe, **options)
    assert files(out)[first[0].file] == before[first[0].file]
    assert [(f["index"], f["failure"]) for f in made.run.failures] == [
        (0, "drawn a second time it had other bytes; the first was kept")
    ]
    assert made.run.complete


def test_calls_that_the_pipeline_refuses(tmp_path, pipe, monkeypatch):
    out = tmp_path / "a"
    with pytest.raises(ConfigError, match=r"refuses this call: .*divisible by 8 but are 30 and 32"):
        draw(out, pipe, call=CALL | {"height": 30})
    draw(out, pipe, prompts=PROMPTS[:1])  # it has no pictures yet, so it is not bound to that size
    with pytest.raises(UnsupportedError, match="takes no strength"):
        draw(tmp_path / "b", pipe, call={"strength": 0.5})
    for name in ("generator", "latents", "output_type", "callback_on_step_end"):
        with pytest.raises(ConfigError, match=f"{name} is not for the call"):
            draw(tmp_path / "b", pipe, call={name: None})
    with pytest.raises(ConfigError, match="is a object: a run records numbers"):
        draw(tmp_path / "b", pipe, call={"cross_attention_kwargs": object()})
    with pytest.raises(UnsupportedError, match="no prompt"):
        draw(tmp_path / "b", tiny.dit())
    for name in ("repeats", "batch", "threads"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
            draw(tmp_path / "b", pipe, **{name: 0})
    with pytest.raises(ConfigError, match="base_seed must be at least 0, got -1"):
        draw(tmp_path / "b", pipe, base_seed=-1)
    with pytest.raises(ConfigError, match="first variant"):
        draw(tmp_path / "b", pipe, variants=VARIANTS[1:])
    with tokred.patched(pipe, method="tome"), pytest.raises(StateError, match="patched already"):
        draw(tmp_path / "b", pipe)
    with pytest.raises(UnsupportedError, match="matches nothing in this UNet2DConditionModel"):
        draw(tmp_path / "b", pipe, variants=[VARIANTS[0], parse_variant("tome:levels=9")])
    assert not (tmp_path / "b").exists()  # refused before anything was made

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe.unet, "forward", full)
    with pytest.raises(ConfigError, match="out of memory with 2 pictures at once"):
        draw(tmp_path / "b", pipe)


def test_fewer_steps_are_fewer_than_the_pipelines_own(tmp_path, pipe):
    """Where the run does not say how many, its default counts."""
    more = Variant("steps-60", call={"num_inference_steps": 60}, anchor="steps")
    with pytest.raises(ConfigError, match="steps-60: 60 steps are not fewer than the run's 50, the pipeline's own"):
        draw(tmp_path / "a", pipe, variants=(Variant(UNPATCHED), more), call={"height": 16, "width": 16})
    assert not (tmp_path / "a").exists()


def test_a_size_that_the_pipeline_changes(tmp_path, pipe, monkeypatch):
    real = pipe.image_processor.postprocess
    monkeypatch.setattr(pipe.image_processor, "postprocess", lambda *a, **k: real(*a, **k)[:, :, :24])
    with pytest.raises(ConfigError, match="asked for 32x32 pixels and makes 24x32: ask for a size that it can make"):
        draw(tmp_path / "a", pipe, call=CALL)


def test_folders_that_are_no_runs(tmp_path, pipe):
    with pytest.raises(ConfigError, match=r"no run in .*No such file or directory\): draw its pictures first"):
        load_run(tmp_path)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"has letter\.txt and no run\.json: name an empty or a new folder"):
        draw(tmp_path, pipe)
    (tmp_path / "run.json").write_text('{"schema": "x"}')
    for reading in (load_run, lambda out: draw(out, pipe)):
        with pytest.raises(ConfigError, match=r"is not of the schema 'tokred\.run/1': it is 'x'"):
            reading(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot write to .*letter\.txt.*: (Not a directory|File exists)"):
        draw(tmp_path / "letter.txt", pipe)


def test_reading_what_is_not_there(tmp_path, pipe, whole):
    with pytest.raises(ConfigError, match="has no variant 'x': it has unpatched, "):
        list(pictures(whole, "x"))
    out = tmp_path / "a"
    draw(out, pipe, prompts=PROMPTS[:2])
    for path in out.glob(f"images/{TOME}/*.png"):
        path.unlink()
    with pytest.raises(ConfigError, match=f"{TOME} has no pictures: draw them first"):
        list(pictures(out, TOME))


def test_pictures_of_two_sizes_are_refused(tmp_path, pipe):
    out = tmp_path / "a"
    draw(out, pipe, prompts=PROMPTS[:2], variants=VARIANTS[:1])
    run = load_run(out)
    item = run.items[UNPATCHED][1]
    (out / item.file).unlink()
    store.add(out, 0, item, np.zeros((16, 24, 3), np.uint8), store.settings_hash(run.asked, VARIANTS[0].to_dict()))
    with pytest.raises(ConfigError, match=r"000001-0-.*\.png is 24x16, .*000000-0-.*\.png is 16x16"):
        list(pictures(out, UNPATCHED))
