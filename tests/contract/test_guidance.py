"""Contract 5: nothing crosses between conditional and unconditional passes, batched or separate."""

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import CONFIGS, PIPES, loop, near, patch, run, same

UNSHARED = [name for name in CONFIGS if name != "tome-share"]
KINDS = pytest.mark.parametrize("kind", PIPES)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("config", UNSHARED)
@KINDS
def test_batched_is_separate(kind, config, dtype, atol):
    pipe = PIPES[kind]().to(dtype)
    plain = loop(pipe, steps=3)
    patch(pipe, kind, config)
    batched = loop(pipe, steps=3)
    assert (batched - plain).abs().max() > 1e-3
    if dtype == torch.float32:  # where two similarities are equal up to rounding the order decides: look at one step
        near(loop(pipe, ("cond", "uncond"), steps=1), loop(pipe, steps=1), atol * 10)
        return
    near(loop(pipe, ("cond", "uncond"), steps=3), batched, atol)
    near(loop(pipe, ("uncond", "cond"), steps=3), batched, atol)


@pytest.mark.parametrize("config", CONFIGS)
@KINDS
def test_order_of_passes(kind, config):
    pipe = patch(PIPES[kind](), kind, config)
    first = loop(pipe, ("cond", "uncond"), steps=3)
    if config != "tome-share":  # that one shares the first pass's indices on purpose
        assert same(loop(pipe, ("uncond", "cond"), steps=3), first)
    assert same(loop(pipe, ("cond", "uncond"), steps=3), first)


@pytest.mark.parametrize("config", CONFIGS)
@KINDS
def test_guidance_off(kind, config):
    """The conditional pass alone is what it is beside an unconditional one."""
    pipe = patch(PIPES[kind]().to(torch.float64), kind, config)
    alone = loop(pipe, ("cond",), steps=3)
    assert torch.isfinite(alone).all()
    # cond + 0 * (uncond - cond): guidance 1 with two passes
    near(loop(pipe, ("cond", "uncond"), steps=3, guidance=1.0), alone, 1e-9)


@KINDS
def test_pass_names(kind):
    pipe = patch(PIPES[kind](), kind, "tome")
    loop(pipe, ("cond", "uncond"), steps=2)
    tokred.unpatch(pipe)
    assert [(s.index, s.pass_key) for s in tokred.report(pipe).steps] == [(0, "0"), (0, "1"), (1, "0"), (1, "1")]


@KINDS
def test_share_cfg_shares_indices_not_values(kind):
    """Batched: both halves have one matching, decided by both. Separate: that of the step's first pass."""
    pipe = patch(PIPES[kind](), kind, "tome-share", record="tokens")
    loop(pipe, steps=2)
    tokred.unpatch(pipe)
    batched = tokred.report(pipe).token_map
    assert (batched[:, 0] == batched[:, 1]).all() and (batched != 0).any()

    patch(pipe, kind, "tome-share", record="tokens")
    loop(pipe, ("cond", "uncond"), steps=2)
    tokred.unpatch(pipe)
    # Another unconditional prompt changes the unconditional pass only, so the first step's conditional output stays.
    outputs = {}
    model = tiny.denoiser(pipe)
    patch(pipe, kind, "tome-share")

    def keep(module, args, out):
        outputs[len(outputs)] = out[0]

    handle = model.register_forward_hook(keep)
    loop(pipe, ("cond", "uncond"), steps=1)
    want = dict(outputs)
    outputs.clear()
    loop(pipe, ("cond",), steps=1)
    handle.remove()
    assert same(outputs[0], want[0]) and not torch.equal(want[0], want[1])


@pytest.mark.parametrize("config", ["tome-reuse", "tome", "todo"])
@KINDS
def test_unconditional_half_does_not_see_the_other(kind, config):
    """Change the prompt: the unconditional half of the first call must not move by a bit."""
    pipe = patch(PIPES[kind](), kind, config)
    calls = []
    tiny.denoiser(pipe).register_forward_hook(lambda m, args, out: calls.append(out[0]))
    data = tiny.inputs(pipe)
    run(pipe, steps=1)
    other = dict(class_labels=[3]) if kind == "dit" else dict(prompt_embeds=data["prompt_embeds"] * 2 + 1)
    run(pipe, steps=1, **other)
    rows = torch.cat(calls).chunk(4)  # FLUX: one call a half; DiT and FLUX: the conditional half comes first
    (uncond, cond), (uncond_too, other) = (
        (b, a) if kind in ("dit", "flux") else (a, b) for a, b in (rows[:2], rows[2:])
    )
    assert same(uncond, uncond_too) and not torch.equal(cond, other)


@pytest.mark.parametrize("config", ["tome", "tome-reuse", "tome-share", "todo"])
def test_skip_layer_guidance(config):
    """SD3's third pass has half the batch and leaves out blocks, here the first: the one that leads the level."""
    pipe = patch(tiny.sd3(), "sd3", config, record="tokens")
    more = dict(steps=4, skip_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    once = run(pipe, **more)
    assert any(s.pass_key == "1" for s in tokred.report(pipe).steps)
    assert (tokred.report(pipe).token_map[1, :3] != 0).any((1, 2, 3)).all()  # the third pass's too
    assert same(run(pipe, **more), once)
    plain = tiny.run(tiny.sd3(), **more)
    assert (once - plain).abs().max() > 1e-3
