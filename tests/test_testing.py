"""The contract kit: what is right passes it, and what is deliberately broken is found by the right check."""

from __future__ import annotations

import re

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.backbones import BACKBONES, register_backbone
from diffusion_tokred.backbones.sd3 import SD3
from diffusion_tokred.methods import CONFIGS, METHODS, register_method
from diffusion_tokred.methods.random_keep import RandomKeep, RandomKeepConfig, keep
from diffusion_tokred.runtime.work import Work
from diffusion_tokred.testing import tiny
from tests.contract.helpers import Snapshot
from tests.guides import Guide


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is gone after it."""
    saved = dict(METHODS), dict(CONFIGS), dict(BACKBONES)
    yield
    for registry, before in zip((METHODS, CONFIGS, BACKBONES), saved, strict=True):
        registry.clear()
        registry.update(before)


def broken(findings):
    """check -> what it says, of those that are not ok."""
    return {finding.check: finding.text for finding in findings if not finding.ok}


# --- what is right passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tome", "todo", "random-keep"])
def test_methods_pass(method):
    found = testing.check_method(method, pipes=("sd", "sd3"))
    testing.assert_contract(found)
    assert [f.check for f in found] == 2 * [name for name in testing.CHECKS if name not in testing.SLOW]
    assert {f.pipe for f in found} == {"sd", "sd3"} and all(f.text for f in found)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_backbones_pass(kind):
    found = testing.check_backbone(tiny.BUILDERS[kind], tiny.run, checks=["grid", "offers", "acts"])
    testing.assert_contract(found)
    family = {"sd": "unet"}.get(kind, kind)
    working = [method for method in tokred.methods() if family in method.backbones]
    assert [f.check for f in found] == ["grid", "offers"] + ["acts"] * len(working)


def test_a_config_of_its_own():
    config = tokred.ToMeConfig(ratio=0.6, merge_ff=True, reuse_every=2, share_cfg=True)
    (found,) = testing.check_method(config, pipes=["sd3"], checks=["passes"])
    assert found.ok and found.config == "tome(ratio=0.6, merge_ff=True, reuse_every=2, share_cfg=True)"
    assert str(found).startswith(f"ok     passes, {found.config} on sd3: ")


def test_compiled(dynamo):
    (found,) = testing.check_method("random-keep", pipes=["sd3"], checks=["compiled"])
    assert found.ok and found.text.startswith("1 graph(s), no breaks"), found


# --- broken methods ---------------------------------------------------------------------------------------------------


class Base(RandomKeep):
    """Random keep with what follows gone wrong. `choose` is what it should be."""

    def choose(self, call):
        n = call.x.shape[1]
        return keep(call.level.key, *call.grid, n - int(n * call.plan.ratio))

    def apply(self, call):
        at, slot = self.choose(call)
        return call.compute(call.x.index_select(1, at), at=at).map(lambda y: y.index_select(1, slot))


class Rand(Base):
    def choose(self, call):
        n = call.x.shape[1]
        return keep(torch.randint(2**60, ()), *call.grid, n - int(n * call.plan.ratio))


class Counts(Base):
    """Draws from the number of its calls: a run depends on those before it."""

    calls = 0

    def choose(self, call):
        self.calls += 1
        n = call.x.shape[1]
        return keep(torch.tensor(self.calls), *call.grid, n - int(n * call.plan.ratio))


class Averages(Base):
    def apply(self, call):
        return super().apply(call).map(lambda y: y + 0.1 * y.mean(0, keepdim=True))


class Caps(Base):
    """Never leaves out more than half, and says nothing."""

    def choose(self, call):
        n = call.x.shape[1]
        return keep(call.level.key, *call.grid, n - int(n * min(call.plan.ratio, 0.5)))

    def work(self, site, grid, ratio):
        return super().work(site, grid, min(ratio, 0.5))


class CapsAndLies(Caps):
    def work(self, site, grid, ratio):
        return RandomKeep.work(self, site, grid, ratio)


class Leaves(Base):
    def apply(self, call):
        call.site.module.seen = True
        return super().apply(call)


class Crosses(Base):
    """Adds what the pass before it saw."""

    shares_passes, every = True, 100

    def apply(self, call):
        memory, x = call.level.memory, call.x.mean((0, 1), keepdim=True)
        old, memory.value = (x if memory.value is None else memory.value), x
        return super().apply(call).map(lambda y: y + old)


class Inexact(Base):
    def apply(self, call):
        return super().apply(call).map(lambda y: y * 1.001)


class Idle(Base):
    def work(self, site, grid, ratio):
        return Work(grid[0] * grid[1])

    def apply(self, call):
        return call.compute()


class Overflows(Base):
    def apply(self, call):
        return super().apply(call).map(lambda y: y / 0)


class Branches(Base):
    """Looks at the data, which a graph cannot."""

    def apply(self, call):
        if call.x.sum().item() > 1e9:
            return call.compute()
        return super().apply(call)


BROKEN = [
    (Rand, "generators", "global random state changed .*: draw from level.key"),
    (Rand, "repeat", r"max difference \d\.\de-\d+ at \(0, \d+, \d+, \d+\); must be bit-equal"),
    (Counts, "repeat", r"the second run of a pipeline: max difference .* must be bit-equal"),
    (Counts, "history", r"after a run with 3 steps: max difference"),
    (Counts, "exception", r"the run after a RuntimeError in a block: max difference"),
    (Averages, "batch", r"row 0 of a batch of 3 against it alone: max difference \d.*; allowed \de-08"),
    (Caps, "ratio", r"ratio 0.75 is accepted, but \S+ computes 32 of 64 tokens \(0.500 left out\)"),
    (CapsAndLies, "ratio", r"at ratio 0.75 \S+ computes 32 of 64 tokens where work\(\) says 16"),
    (Leaves, "unpatched", r"after patch, a run and unpatch the model is not .*: \S+attn.seen new: True and 2 more"),
    (Crosses, "passes", r"the first pass of step 1 after other inputs in the passes beside it \(order \(0, 1\)\): max"),
    (Inexact, "machinery", r"forced on with all tokens kept, float32: max difference .*; allowed \de-05"),
    (Idle, "acts", "ratio 0.5 changes nothing: the output is bit-equal"),
    (Overflows, "acts", r"2 of 2 denoiser calls returned values that are not finite"),
    (Branches, "compiled", r"raised \w+: .*"),
]  # fmt: skip


@pytest.mark.parametrize("method, check, says", BROKEN, ids=lambda v: getattr(v, "__name__", str(v)[:10]))
def test_broken_methods_are_found(method, check, says):
    config = type("Config", (RandomKeepConfig,), {})
    register_method("broken", config)(method)
    found = testing.check_method("broken", pipes=["sd3"], checks=[check])
    assert re.search(says, broken(found)[check])
    with pytest.raises(AssertionError, match=f"1 of 1 checks are broken:\nBROKEN {check}, broken on sd3: "):
        testing.assert_contract(found)


def test_the_rest_of_a_broken_method_is_not_blamed():
    register_method("broken", type("Config", (RandomKeepConfig,), {}))(Leaves)
    found = testing.check_method("broken", pipes=["sd3"])
    assert broken(found).keys() == {"unpatched", "exception"}
    with pytest.raises(AssertionError, match=f"2 of {len(found)} checks are broken"):
        testing.assert_contract(found)


# --- broken backbones -------------------------------------------------------------------------------------------------


class Swapped(SD3):
    name = "swapped"

    def grids(self, denoiser, height, width):
        return [(w, h) for h, w in super().grids(denoiser, height, width)]


class Miscounts(SD3):
    name = "miscounts"

    def grids(self, denoiser, height, width):
        return [(h, w - 1) for h, w in super().grids(denoiser, height, width)]


class Overclaims(SD3):
    name = "overclaims"

    def layout(self, denoiser):
        layout = super().layout(denoiser)
        for site in layout.sites:
            if site.kind == "feed_forward":
                site.offers = frozenset({"at", "kv"})
        return layout


def placed():
    """SD3 with an attention that knows its tokens' places, while no site tells it which tokens it gets."""
    pipe = tiny.sd3()
    for block in pipe.transformer.transformer_blocks:
        block.attn.to_q.register_forward_hook(lambda module, args, out: out + torch.arange(out.shape[1])[:, None] / 10)
    return pipe


@pytest.mark.parametrize(
    "backbone, build, check, says",
    [
        (
            Swapped,
            tiny.sd3,
            "grid",
            r"a grid of 8 x 12 tokens .* row 12, column 15 of the 24 x 16 latent .* rows and columns",
        ),
        (
            Miscounts,
            tiny.sd3,
            "grid",
            r"raised StateError: transformer_blocks\.0\.attn got 96 tokens .* a grid of 12 x 7",
        ),
        (
            Overclaims,
            tiny.sd3,
            "offers",
            r"transformer_blocks\.0\.ff offers 'kv': with half of the keys .* are not used",
        ),
        (SD3, placed, "offers", r"transformer_blocks\.0\.attn offers 'at': on rearranged tokens.* max difference"),
    ],
)
def test_broken_backbones_are_found(backbone, build, check, says):
    BACKBONES.clear()
    register_backbone(backbone)
    found = testing.check_backbone(build, tiny.run, configs=[], checks=["grid", "offers"])
    assert re.search(says, broken(found)[check]), found
    assert found[0].pipe == "SD3Transformer2DModel"


# --- names, refusals --------------------------------------------------------------------------------------------------


def test_unknown_names():
    with pytest.raises(tokred.ConfigError, match="unknown check 'natural'; there are: neutral, acts"):
        testing.check_method("tome", checks=["natural"])
    with pytest.raises(tokred.ConfigError, match="unknown pipeline 'sd9'; there are: sd, "):
        testing.check_method("tome", pipes=["sd9"])
    with pytest.raises(tokred.ConfigError, match="unknown method 'tom'"):
        testing.check_method("tom")


def test_what_fits_nowhere_is_not_a_pass():
    with pytest.raises(tokred.UnsupportedError, match=r"works on none of these pipelines: sd: .*sd3: "):
        testing.check_method(tokred.ToMeConfig(levels=(9,)), pipes=["sd", "sd3"])
    with pytest.raises(tokred.UnsupportedError, match="on SD3Transformer2DModel: "):
        testing.check_backbone(tiny.sd3, tiny.run, [tokred.ToMeConfig(levels=(1,))])
    with pytest.raises(tokred.UnsupportedError, match="AutoencoderKL is not supported"):
        testing.check_backbone(lambda: tiny.sd3().vae, tiny.run)


def test_what_does_not_apply_is_no_finding():
    assert testing.check_method(tokred.ToMeConfig(ratio=0), pipes=["sd3"], checks=["acts"]) == []
    (found,) = testing.check_method(tokred.ToDoConfig(), pipes=["sd3"], checks=["history"])
    assert "another size" in found.text


def test_snapshot_sees_everything():
    pipe = tiny.sd3()
    before, block = Snapshot(pipe.transformer), pipe.transformer.transformer_blocks[0]
    assert before.differences(pipe.transformer) == []
    block.attn.extra = 1
    handle = block.ff.register_forward_hook(lambda *args: None)
    weight, block.ff.net[2].weight = block.ff.net[2].weight, torch.nn.Parameter(torch.zeros(1))
    found = before.differences(pipe.transformer)
    assert len(found) == 3 and any("extra new: 1" in text for text in found), found
    del block.attn.extra
    handle.remove()
    block.ff.net[2].weight = weight
    assert before.differences(pipe.transformer) == []


# --- the guide --------------------------------------------------------------------------------------------------------

GUIDE = Guide("your-method.md", "methods/random_keep.py")


def test_the_guide_is_the_file():
    GUIDE.assert_is_the_file(most=90)


def test_the_guide_runs(capsys, monkeypatch):
    monkeypatch.setattr(tiny.StableDiffusion3Pipeline, "encode_prompt", _encoded)
    space = GUIDE.follow(monkeypatch, rename=("random-keep", "my-keep"), pipe=tiny.sd3(), prompt="a star")
    assert tokred.report(space["pipe"]).method == "my-keep"
    assert "done as asked: 0.1" in capsys.readouterr().out
    space["test_contract"]("neutral")


def _encoded(pipe, *args, **kwargs):
    """The tiny pipelines have no text encoders."""
    data = tiny.inputs(pipe)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return tuple(data[name] for name in names)
