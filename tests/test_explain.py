"""`explain`: numbers worked out by hand, and the same as what a run reports."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

import diffusion_tokred as tokred
from diffusion_tokred.backbones import backbone_of
from diffusion_tokred.testing import families, tiny
from diffusion_tokred.testing.passes import pass_count
from diffusion_tokred.tokens import Merge

# A block of the tiny sd's level 0: N = 16 x 16 tokens, d = 32 channels; D = 64 destinations, S = 192 sources.
N, d, D, S = 256, 32, 64, 192
DENSE = 2 * (4 * N * d * d + 2 * N * N * d)
BLOCKS = 3  # one in the first down block, two in the last up block


def test_tome_by_hand() -> None:
    found = tokred.explain(tiny.sd(), method="tome", guidance=False, text_tokens=7)
    m = N // 2
    assert found.flops["attention"][0] - found.flops["attention"][1] == BLOCKS * (
        DENSE - 2 * (4 * m * d * d + 2 * m * m * d)
    )
    assert found.flops["method"] == (0, BLOCKS * 2 * S * D * d)
    dense, reduced = found.flops["total"]
    assert dense == 153_492_480  # torch's count
    assert found.flop_ratio == dense / reduced
    assert found.ceiling == pytest.approx(dense / (dense - BLOCKS * DENSE))
    assert found.levels[0] == type(found.levels[0])(0, (16, 16), 256, 128, 128, 9, 3)
    assert (found.height, found.width, found.batch, found.calls) == (16, 16, 1, 1)
    assert found.cache_bytes == 0


def test_todo_by_hand() -> None:
    found = tokred.explain(tiny.sd(), method="todo", batch_size=3)
    assert found.batch == 6
    k = N // 4
    reduced = 2 * (2 * N * d * d + 2 * k * d * d + 2 * N * k * d)
    line = next(site for site in found.sites if site.reason is None)
    assert (line.tokens, line.queries, line.keys) == (256, 256, 64)
    assert (line.flops_dense, line.flops) == (6 * DENSE, 6 * reduced)
    assert found.flops["method"] == (0, 0)
    assert found.cache_bytes == 8 * k  # which tokens are kept, int64


def test_joint_attention_by_hand() -> None:
    """SD3: 64 image and 7 text tokens of 32 channels, all projected; keys of the image reduced to 16."""
    found = tokred.explain(tiny.sd3(), method="todo", text_tokens=7, guidance=False)
    first, _, last = (site for site in found.sites if site.kind == "attention")
    rows = 4 * (64 + 7) * d * d
    assert first.flops_dense == 2 * (rows + 2 * 71 * 71 * d)
    assert first.flops == 2 * (rows + 2 * 71 * (16 + 7) * d)
    assert last.flops_dense == first.flops_dense - 2 * 7 * d * d  # the last block has no output for the text


@pytest.mark.parametrize(
    "name, options",
    [
        ("sd", dict(method="tome", merge_ff=True, merge_cross_attn=True)),
        ("sd", dict(method="tome", reuse_every=3, levels=(0, 1), policy=[(0.8, 0.25), (0.6, 0.6), (0.3, 0.0)])),
        ("sd", dict(method="todo", policy=lambda u: 0.75 if u < 0.5 else 0.0)),
        ("sdxl", dict(method="todo", factor=3)),
        ("sd3", dict(method="tome", reuse_every=2, merge_ff=True)),
        ("sd3", dict(method="todo", policy=[(0.7, 0.75)])),
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (40, 56)], ids=str)
def test_same_as_the_run(name: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    pipe = tiny.BUILDERS[name]()
    asked = dict(height=size[0], width=size[1])
    found = tokred.explain(pipe, **options, **asked, num_inference_steps=6, batch_size=2, text_tokens=7)
    tokred.patch(pipe, **options)
    tiny.run(pipe, steps=6, batch=2, **asked)
    report = tokred.report(pipe)
    assert [s.flops for s in found.steps] == [s.flops for s in report.steps]
    assert [(s.mode, s.ratio) for s in found.steps] == [(s.mode, s.ratio) for s in report.steps]
    assert [s.u for s in found.steps] == pytest.approx([s.u for s in report.steps])
    assert found.flops["total"] == (report.flops_dense, report.flops)
    if "policy" in options:
        assert len({s.ratio for s in found.steps}) > 1


ALL = tiny.BUILDERS | families.BUILDERS
# Uneven, where the pipeline allows it: neither the picture's tokens nor the prompt's are multiples of 32.
SIZES = {"dit": (32, 32), "sana": (32, 64), "wan": (48, 32)}


@pytest.mark.parametrize(
    "name, method",
    [(name, method) for name in ALL for method in ("tome", "todo") if (name, method) != ("sana", "todo")],  # refused
)
def test_every_family_as_the_run(name: str, method: str) -> None:
    """Step by step; a step's passes of guidance are one step of the plan, with the rows of all of them."""
    pipe = ALL[name]()
    height, width = SIZES.get(name, (40, 24))
    asked: dict[str, Any] = {} if name == "dit" else dict(height=height, width=width)
    more: dict[str, Any] = {}
    if name == "lumina2":  # by design: the run's text has the rows that masks leave it, 6 in the tiny pipeline's prompt
        more = dict(prompt_attention_mask=torch.ones(1, 7, dtype=torch.long))
    levels = tokred.explain(pipe, method=method, num_inference_steps=4, height=height, width=width).steps
    ratio = 0.75 if method == "todo" else 0.5
    policy = [((levels[1].u + levels[2].u) / 2, ratio), ((levels[2].u + levels[3].u) / 2, 0.0)]
    rows, calls = pass_count(pipe, lambda pipe, **kw: tiny.run(pipe, **asked, **more, **kw))
    found = tokred.explain(
        pipe,
        method=method,
        policy=policy,
        height=height,
        width=width,
        num_inference_steps=4,
        guidance=rows * calls == 2,
        text_tokens=0 if name == "dit" else 7,
        num_frames=5 if name == "wan" else None,
    )
    tokred.patch(pipe, method=method, policy=policy)
    tiny.run(pipe, steps=4, **asked, **more)
    report = tokred.report(pipe)
    assert len(found.steps) * calls == len(report.steps) == 4 * calls
    for plan in found.steps:
        passes = [record for record in report.steps if record.index == plan.index]
        assert len(passes) == calls
        assert [record.u for record in passes] == pytest.approx([plan.u] * calls, abs=1e-6)
        assert {(record.mode, record.ratio) for record in passes} == {(plan.mode, plan.ratio)}
        assert plan.flops == sum(record.flops for record in passes)
    assert found.flops["total"] == (report.flops_dense, report.flops)
    assert {step.ratio for step in found.steps} == {0.0, ratio}
    assert found.text_tokens == (0 if name == "dit" else 7)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2", "flux2_klein", "qwenimage", "zimage", "lumina2"])
@pytest.mark.parametrize("shift", [0.5, 2.5])
def test_dynamic_shifts_as_in_the_run(name: str, shift: float) -> None:
    """At 160 tokens, with bounds that make them matter, and with a terminal value, as Qwen-Image has it."""
    pipe = ALL[name](
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=shift, base_image_seq_len=100, max_image_seq_len=500,
            shift_terminal=0.02,
        )
    )  # fmt: skip
    size = dict(height=64, width=40)
    found = tokred.explain(pipe, method="tome", num_inference_steps=3, **size)
    tokred.patch(pipe, method="tome")
    tiny.run(pipe, steps=3, guidance=1.0, **size)
    assert [s.u for s in found.steps] == pytest.approx([s.u for s in tokred.report(pipe).steps], abs=1e-6)


def test_schedulers_with_more_calls_than_steps() -> None:
    pipe = tiny.sd(scheduler=PNDMScheduler(skip_prk_steps=True))
    assert tokred.explain(pipe, method="todo", num_inference_steps=4).calls == 5


def test_reuse_pays_for_the_matching_once() -> None:
    every = tokred.explain(tiny.sd(), method="tome", reuse_every=3, num_inference_steps=7, guidance=False)
    assert [s.fresh for s in every.steps] == [True, False, False, True, False, False, True]
    assert every.flops["method"][1] == 3 * 2 * S * D * d


def test_bytes_of_a_kept_matching() -> None:
    found = tokred.explain(tiny.sd(), method="tome", reuse_every=1, batch_size=2, levels=(0, 1))
    kept = [Merge(torch.arange(n).repeat(4, 1) // 2 * 2, n // 2) for n in (256, 64)]
    assert found.cache_bytes == sum(t.nbytes for m in kept for t in vars(m).values() if isinstance(t, torch.Tensor))
    # At least the place of each token, as int64.
    assert found.cache_bytes >= 4 * (256 + 64) * 8


def test_reasons() -> None:
    found = tokred.explain(tiny.sd(), method="tome", merge_ff=True)
    why = {(site.kind, site.level): site.reason for site in found.sites}
    assert why["attention", 0] is None and why["feed_forward", 0] is None
    assert why["attention", 1] == "level 1 not in levels=(0,)"
    assert why["cross_attention", 0] == "merge_cross_attn is off"
    assert tokred.explain(tiny.sd(), method="todo").sites[1].reason == "todo does not act on cross_attention"
    assert sum(site.reason is None for site in found.sites) == 6
    assert "10 x merge_cross_attn is off" in found.table()


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(method="tom"),
        dict(method="tome", ratios=0.5),
        dict(method="tome", ratio=0.8),
        dict(method="tome", levels=(7,)),
        dict(method="todo", policy=0.5),
        dict(method="todo", policy="policy.json"),
        dict(method="todo", policy=[(0.2, 0.75), (0.5, 0.0)]),
    ],
    ids=str,
)
def test_the_errors_of_patch(options: dict[str, Any]) -> None:
    pipe = tiny.sd()
    with pytest.raises(ValueError) as of_patch:
        tokred.patch(pipe, **options)
    with pytest.raises(type(of_patch.value)) as of_explain:
        tokred.explain(pipe, **options)
    assert str(of_explain.value) == str(of_patch.value)


def test_other_errors() -> None:
    pipe = tiny.sd()
    with pytest.raises(tokred.ConfigError, match="height must be a multiple of 2 pixels here, got 33"):
        tokred.explain(pipe, method="tome", height=33)
    with pytest.raises(tokred.ConfigError, match="batch_size"):
        tokred.explain(pipe, method="tome", batch_size=0)
    with pytest.raises(tokred.ConfigError, match="holds no complete cell"):
        tokred.explain(pipe, method="tome", height=2, width=64)
    with pytest.raises(tokred.ConfigError, match="explain the pipeline"):
        tokred.explain(pipe.unet, method="todo", policy=[(0.5, 0.75)], num_inference_steps=3)
    with pytest.raises(tokred.UnsupportedError):
        tokred.explain(torch.nn.Linear(2, 2), method="tome")


def test_changes_nothing() -> None:
    pipe = tiny.sd(scheduler=DPMSolverMultistepScheduler())
    pipe.scheduler.set_timesteps(7)
    state = copy.deepcopy(pipe.scheduler.__dict__)
    modules = {name: dict(module.__dict__) for name, module in pipe.unet.named_modules()}
    before = torch.random.get_rng_state()
    tokred.explain(pipe, method="tome", policy=[(0.5, 0.5)], reuse_every=2, num_inference_steps=20)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, value in state.items():
        now = pipe.scheduler.__dict__[name]
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else str(now) == str(value), name
    assert modules == {name: module.__dict__ for name, module in pipe.unet.named_modules()}
    assert tokred.report(pipe) is None


def test_of_a_patched_pipeline() -> None:
    pipe = tiny.sd()
    expected = tokred.explain(pipe, method="todo")
    tokred.patch(pipe, method="tome")
    assert tokred.explain(pipe, method="todo") == expected
    tiny.run(pipe, steps=1)
    assert tokred.report(pipe).method == "tome"


def test_sizes() -> None:
    pipe = tiny.sdxl()
    assert tokred.explain(pipe, method="todo").levels[0].grid == (8, 8)  # native: 32 px, 16x16 latents, attention below
    found = tokred.explain(pipe, method="todo", height=40, width=72)
    assert [level.grid for level in found.levels] == [(10, 18), (5, 9)]
    assert (found.levels[0].queries, found.levels[0].keys) == (180, 45)
    assert tokred.explain(pipe.unet, method="todo", height=20, width=36) == found


@pytest.mark.parametrize("name, tokens", [("sd", 77), ("sdxl", 77), ("sd3", 77 + 256)])
def test_text_tokens(name: str, tokens: int) -> None:
    pipe = tiny.BUILDERS[name]()
    assert tokred.explain(pipe, method="todo").text_tokens == tokens
    assert tokred.explain(tiny.denoiser(pipe), method="todo").text_tokens == tokens
    assert tokred.explain(pipe, method="todo", text_tokens=5).text_tokens == 5
    if name == "sd":
        pipe.tokenizer = type("Tokenizer", (), {"model_max_length": 24})()
        assert tokred.explain(pipe, method="todo").text_tokens == 24
        pipe.tokenizer.model_max_length = 10**30
        assert tokred.explain(pipe, method="todo").text_tokens == 77


def test_warnings() -> None:
    def warnings(**options: Any) -> str:
        return "\n".join(tokred.explain(tiny.sd(), **options).warnings)

    assert "level 0 has 256 tokens" in warnings(method="tome")
    assert "cannot pay here" in warnings(method="todo", levels=(2,))
    assert "cannot pay here" not in warnings(method="todo", height=128, width=128)
    assert warnings(method="todo", height=128, width=128) == ""  # 4,096 tokens, nearly all FLOPs are attention's
    assert "nothing is reduced" in warnings(method="tome", ratio=0.0)
    assert "nothing is reduced" in warnings(method="tome", policy=[(0.0001, 0.5)], num_inference_steps=2)
    assert "num_inference_steps" in warnings(method="tome", policy=[(0.5, 0.5)])
    assert "costs more FLOPs than it saves" in warnings(method="tome", ratio=0.01)
    assert "1.15x on SD1.5" in warnings(method="todo", levels=(1,), height=192, width=192)


def test_policy_without_steps_shows_its_largest_ratio() -> None:
    found = tokred.explain(tiny.sd(), method="tome", policy=[(0.9, 0.25), (0.5, 0.75), (0.2, 0.0)])
    assert found.levels[0].queries == 64 and found.calls == 1 and found.steps == ()
    found = tokred.explain(tiny.sd(), method="tome", policy=lambda u: 0.5 * (0.3 < u < 0.4))
    assert found.levels[0].queries == 128


def test_as_text_and_data() -> None:
    found = tokred.explain(tiny.sd3(), method="todo", num_inference_steps=3, policy=[(0.7, 0.75)])
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["flops"]["total"] == list(found.flops["total"]) and data["flop_ratio"] == found.flop_ratio
    assert len(data["steps"]) == 3 and data["levels"][0]["grid"] == [8, 8]
    assert str(found) == found.table()
    for part in ("todo on SD3Transformer2DModel", "8x8", "FLOP ratios are not speed-ups", "reduce", "! level 0"):
        assert part in found.table()
    unknown = tokred.explain(tiny.sd3().transformer, method="todo", num_inference_steps=2)
    assert math.isnan(unknown.steps[0].u) and unknown.to_dict()["steps"][0]["u"] is None


def test_a_video_is_its_frames_one_below_another() -> None:
    pipe = families.BUILDERS["wan"]()
    found = tokred.explain(pipe, method="tome", height=32, width=32, num_frames=5)  # 5 frames are 3 latent ones
    model = pipe.transformer
    assert (found.height, found.width) == (48, 16) and found.levels[0].grid == (24, 8)
    assert found.flops == tokred.explain(model, method="tome", height=48, width=16, text_tokens=found.text_tokens).flops
    longer = tokred.explain(pipe, method="tome", height=32, width=32)  # the pipeline's own 81 frames
    assert longer.levels[0].tokens == 64 * (80 // pipe.vae_scale_factor_temporal + 1)
    with pytest.raises(tokred.ConfigError, match="makes pictures"):
        tokred.explain(tiny.sd(), method="tome", num_frames=5)
    with pytest.raises(tokred.ConfigError, match="num_frames"):
        tokred.explain(pipe, method="tome", num_frames=0)


@pytest.mark.parametrize("name, rows", [("flux", 1), ("flux2", 1), ("flux2_klein", 2), ("sd", 2), ("zimage", 2)])
def test_default_guidance(name: str, rows: int) -> None:
    """What the pipeline does when it is not told."""
    pipe = ALL[name]()
    for target in (pipe, tiny.denoiser(pipe)):
        size = dict(height=32, width=32)
        assert tokred.explain(target, method="todo", **size).batch == rows
        assert tokred.explain(target, method="todo", guidance=True, **size).batch == 2
        assert tokred.explain(target, method="todo", guidance=False, **size).batch == 1


def test_distilled_models_have_no_guidance() -> None:
    klein = families.flux2_klein()
    klein.register_to_config(is_distilled=True)
    assert tokred.explain(klein, method="todo").batch == 1
    lcm = tiny.sd()
    lcm.unet.register_to_config(time_cond_proj_dim=256)
    assert tokred.explain(lcm, method="todo").batch == 1


@pytest.mark.parametrize(
    "name, size",
    [("wan", (480, 832)), ("zimage", (1024, 1024)), ("auraflow", (1024, 1024)), ("sana", (32, 32)), ("sd", (32, 32))],
)
def test_default_size(name: str, size: tuple[int, int]) -> None:
    """The pipeline's own; Sana's bins bring its 1024 down to the model's size."""
    pipe = ALL[name]()
    found = tokred.explain(pipe, method="tome", num_frames=1)
    assert (2 * found.height, 2 * found.width) == size


def test_dit_has_one_size() -> None:
    pipe = tiny.dit()
    assert tokred.explain(pipe, method="todo", height=32, width=32) == tokred.explain(pipe, method="todo")
    with pytest.raises(tokred.ConfigError, match="DiTPipeline makes pictures of 32x32 pixels only, got height=64"):
        tokred.explain(pipe, method="todo", height=64, width=64)


def test_rows_beside_the_picture() -> None:
    """Z-Image pads its prompt, and 10 x 6 tokens of a picture, to multiples of 32; AuraFlow has 8 rows of its own."""
    for name, tokens, rows in (("zimage", 100, 128 + 4), ("auraflow", 100, 108), ("sd3", 100, 100)):
        pipe = ALL[name]()
        model = tiny.denoiser(pipe)
        assert tokred.explain(pipe, method="todo", height=40, width=24, text_tokens=tokens).text_tokens == tokens
        assert backbone_of(model).beside(model, tokens, 20, 12) == rows


def test_own_noise_levels_of_a_subclass() -> None:
    """Helpers are found beside the pipeline's ancestors; without any, flow matching's usual shift is taken."""
    pipe = families.flux2()
    steps = tokred.explain(pipe, method="todo", num_inference_steps=4).steps
    pipe.__class__ = type("Mine", (type(pipe),), {})
    assert tokred.explain(pipe, method="todo", num_inference_steps=4).steps == steps
    bare = type("Bare", (), {})()
    bare.transformer, bare.scheduler, bare.config = pipe.transformer, pipe.scheduler, {}
    other = tokred.explain(bare, method="todo", height=128, width=128, num_inference_steps=4).steps
    assert other[0].u == steps[0].u == 1.0 and other[1].u != steps[1].u


def marks(figure: Any) -> list[tuple[str, float, float]]:
    """Mode and place of each mark."""
    (axes,) = figure.axes
    return [
        (line.get_label(), float(x), float(y))
        for line in axes.lines
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def test_plot() -> None:
    """A mark a step, at its noise level and ratio; and what the policy asks for, which has its corners there."""
    pipe = tiny.sd3()
    found = tokred.explain(
        pipe, method="toca", interval=2, warmup=1, policy=[(0.9, 0.5), (0.4, 0.25)], num_inference_steps=12
    )
    figure = found.plot()
    assert sorted(marks(figure)) == sorted((s.mode, s.u, s.ratio) for s in found.steps)
    assert {s.mode for s in found.steps} == {"full", "reduce"}
    (stairs,) = figure.axes[0].patches
    values, edges, _ = stairs.get_data()
    assert list(zip(edges[1:], values, strict=True)) == [(0.4, 0.25), (0.9, 0.5), (1.0, 0.0)]
    ruled = tokred.Policy(points=[(1.0, 0.5)], rules=[dict(level=1, points=[(0.5, 0.25)])])
    found = tokred.explain(tiny.sd(), method="tome", levels=(0, 1), policy=ruled, num_inference_steps=5)
    assert len(marks(found.plot())) == 2 * 5 and len(found.plot().axes[0].patches) == 2
    assert "[1] level 1" in found.table() and "[2] other sites" in found.table()
    assert {parts[1] for parts in (s.parts for s in found.steps)} == {("reduce", 0.5)}
    assert list(found.to_pandas()["ratio, level 1"]) == [s.parts[0][1] for s in found.steps]
    for export in ("plot", "to_pandas"):
        with pytest.raises(tokred.ConfigError, match="give explain num_inference_steps"):
            getattr(tokred.explain(pipe, method="tome"), export)()
