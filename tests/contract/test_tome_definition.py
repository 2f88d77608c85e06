"""ToMe on whole models: against the definition in loops, and against tomesd 0.1.3. All in float64."""

import copy

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from diffusion_tokred.tokens import draw, mix
from tests.contract.helpers import PIPES, loop, near, run
from tests.reference import tome_model


def blocks_at(pipe, level):
    """The transformer blocks of a level, found by their names, not by our backbones."""
    model = tiny.denoiser(pipe)
    if hasattr(model, "transformer_blocks"):
        return list(model.transformer_blocks) if level == 0 else []
    depth = level + (
        type(pipe).__name__ == "StableDiffusionXLPipeline"
    )  # SDXL has no attention in its outermost blocks
    last = len(model.down_blocks) - 1
    stages = (f"down_blocks.{depth}.", f"up_blocks.{last - depth}.", *(["mid_block."] if depth == last else []))
    kind = "BasicTransformerBlock"
    return [m for n, m in model.named_modules() if type(m).__name__ == kind and n.startswith(stages)]


UNET_PARTS = dict(merge_attn="attn1", merge_cross_attn="attn2", merge_ff="ff")
CASES = [
    ("sd", (0,), dict()),
    ("sd", (0, 1), dict(merge_cross_attn=True, merge_ff=True)),
    ("sd", (2,), dict(merge_attn=False, merge_ff=True)),
    ("sdxl", (0,), dict(ratio=0.3)),
    ("sdxl", (0, 1), dict(merge_ff=True)),
    ("sdxl", (0,), dict(merge_attn=False, merge_cross_attn=True, ratio=0.75)),
    ("sd3", (0,), dict()),
    ("sd3", (0,), dict(merge_ff=True, sx=4, sy=1, ratio=0.7)),
    ("sd3-dual", (0,), dict(ratio=0.75, merge_ff=True)),
    ("dit", (0,), dict(ratio=0.6, merge_ff=True)),
    ("pixart", (0,), dict(merge_cross_attn=True)),
]


@pytest.mark.parametrize("randomize", [False, True], ids=["top-left", "random"])
@pytest.mark.parametrize("kind, levels, more", CASES, ids=str)
def test_loop_definition(kind, levels, more, randomize):
    """One step with guidance, so that both samples of the batch have their own matching; 32 x 24 pixels."""
    pipe = PIPES[kind]().to(torch.float64)
    width = {"sd": 16, "sdxl": 16, "dit": 32}.get(kind, 24)
    size = dict(height=32, width=width, steps=1)
    other = copy.deepcopy(pipe)
    plain = run(pipe, **size)
    tokred.patch(pipe, method="tome", levels=levels, randomize=randomize, seed=3, **more)
    ours = run(pipe, **size)

    defaults = tokred.ToMeConfig(**more)
    parts = [name for option, name in UNET_PARTS.items() if getattr(defaults, option)]
    if kind.startswith("sd3"):
        parts = [name.replace("attn1", "attn") for name in parts if name != "attn2"]
    h, w = size["height"] // 2, width // 2

    def grid_of(n):
        shrink = round((h * w / n) ** 0.5)
        assert (h // shrink) * (w // shrink) == n
        return h // shrink, w // shrink

    for level in levels:
        found = blocks_at(other, level)
        assert found

        def offset_of(cells, level=level):
            return draw(torch.tensor(mix(3, 0, level)), cells, defaults.sx * defaults.sy).tolist()

        names = parts + (["attn2"] if kind == "sd3-dual" and defaults.merge_attn else [])
        for block in found:
            here = [n for n in names if getattr(block, n, None) is not None]
            tome_model.install(
                [block], grid_of, defaults.ratio, here, defaults.sy, defaults.sx, offset_of if randomize else None
            )
    theirs = run(other, **size)
    assert (theirs - plain).abs().max() > 1e-4
    near(ours, theirs, 1e-9)


@pytest.mark.parametrize("kind", [kind for kind in PIPES if kind != "flux"])  # flux: see test_flux_definition.py
def test_one_matching_for_the_level(kind):
    """reuse_every: all blocks of the level use the first one's matching, for that many steps."""
    pipe = PIPES[kind]().to(torch.float64)
    other = copy.deepcopy(pipe)
    tokred.patch(pipe, method="tome", randomize=False, reuse_every=2)
    ours = loop(pipe, ("cond",), steps=3)

    kept, calls = {}, []

    def each_call(module, args, kwargs):
        if len(calls) % 2 == 0:  # one pass a step: steps 0 and 2
            kept.clear()
        calls.append(1)

    def each_block(module, args, kwargs):
        if not kept:
            x = args[0] if args else kwargs["hidden_states"]
            side = int(x.shape[1] ** 0.5)
            kept["matching"] = tome_model.Matching(x, side, side, 2, 2, 0.5)

    tiny.denoiser(other).register_forward_pre_hook(each_call, with_kwargs=True)
    for block in blocks_at(other, 0):
        block.register_forward_pre_hook(each_block, with_kwargs=True)
        for name in ("attn", "attn2") if kind.startswith("sd3") else ("attn1",):
            if getattr(block, name, None) is not None:
                tome_model.around(getattr(block, name), lambda: kept["matching"])
    near(ours, loop(other, ("cond",), steps=3), 1e-9)


# tomesd's max_downsample counts the factor of the latent, our levels count from the largest attention.
DEPTHS = [((0,), 1), ((0, 1), 2), ((0, 1, 2), 4)]
PARTS = [(0.3, dict()), (0.75, dict()), (0.5, dict(merge_crossattn=True, merge_mlp=True))]


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (48, 32)], ids=str)
@pytest.mark.parametrize(
    "ratio, parts, levels, max_downsample",
    [(0.5, dict(), *depth) for depth in DEPTHS] + [(*parts, *DEPTHS[1]) for parts in PARTS],
    ids=str,
)
def test_tomesd(ratio, parts, size, levels, max_downsample):
    tomesd = pytest.importorskip("tomesd")
    pipe = tiny.sd().to(torch.float64)
    more = dict(height=size[0], width=size[1])
    plain = run(pipe, **more)
    tomesd.apply_patch(pipe, ratio=ratio, use_rand=False, max_downsample=max_downsample, **parts)
    theirs = run(pipe, **more)
    tomesd.remove_patch(pipe)
    names = dict(merge_crossattn="merge_cross_attn", merge_mlp="merge_ff")
    tokred.patch(
        pipe, method="tome", ratio=ratio, randomize=False, levels=levels, **{names[k]: v for k, v in parts.items()}
    )
    ours = run(pipe, **more)
    assert (ours - plain).abs().max() > 1e-3
    near(ours, theirs, 1e-9)
    tokred.unpatch(pipe)
    torch.testing.assert_close(run(pipe, **more), plain, rtol=0, atol=0)


def test_not_silent_where_tomesd_is():
    """On SDXL tomesd's defaults do nothing; ours act on the largest attention level. Above 3/4 it lowers the ratio."""
    tomesd = pytest.importorskip("tomesd")
    pipe = tiny.sdxl()
    plain = run(pipe)
    tomesd.apply_patch(pipe, ratio=0.5)
    assert torch.equal(run(pipe), plain)
    tomesd.remove_patch(pipe)
    tokred.patch(pipe, method="tome", ratio=0.5)
    assert not torch.equal(run(pipe), plain)
    with pytest.raises(tokred.ConfigError, match=r"0\.75"):
        tokred.patch(pipe, method="tome", ratio=0.8)
