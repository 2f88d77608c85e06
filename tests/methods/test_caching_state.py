"""What is kept belongs to one pass of one run, to its tokens and its prompt: whatever changes makes a step full."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import PIPES, dense, loop, near, run, same
from tests.methods.caches import CACHES, KINDS, PACKED, all_rows, cast, driver, modes, options, patched

SLOWLY = dict(warmup=1, interval=10)  # the first step alone is full, but for what happens
PLAIN = dict(size=(32, 32), batch=1, text=7, scale=1.0)
CHANGES = {"size": dict(size=(48, 32)), "batch": dict(batch=2), "text": dict(text=9), "prompt": dict(scale=1.5)}


@torch.no_grad()
def calls(pipe, steps):
    """Denoiser calls of SD3 in a loop, one a step, with inputs that each step says: the outputs."""
    model, scheduler, outs = tiny.denoiser(pipe), pipe.scheduler, []
    scheduler.set_timesteps(len(steps))
    for t, inputs in zip(scheduler.timesteps, steps, strict=True):
        draws = torch.Generator().manual_seed(len(outs))
        height, width = inputs["size"]
        x = torch.randn(inputs["batch"], 16, height // 2, width // 2, generator=draws)
        words = torch.linspace(-1, 1, inputs["text"] * tiny.TEXT).view(1, -1, tiny.TEXT) * inputs["scale"]
        pooled = torch.ones(len(x), tiny.POOLED)
        outs.append(model(x, words.repeat(len(x), 1, 1), pooled, t.expand(len(x)), return_dict=False)[0])
    return outs


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["fora", "taylorseer", "toca", "ras", "cat-faithful"])
def test_a_change_makes_a_step_full(name, change):
    """In the fourth step: it is the dense model's, and what follows builds on it."""
    steps = [PLAIN] * 3 + [PLAIN | CHANGES[change]] * 2
    pipe = patched("sd3", name, **SLOWLY | dict(warmup=2 if name[:3] == "cat" else 1))
    found, first = calls(pipe, steps), driver(pipe).method.config.warmup
    between = modes(pipe)[-1]
    assert modes(pipe) == ["full"] * first + [between] * (3 - first) + ["full", between] and between != "full"
    want = calls(PIPES["sd3"](), steps)
    assert same(found[3], want[3]) and not torch.equal(found[2], want[2]) and not torch.equal(found[4], want[4])


def test_the_same_prompt_in_another_tensor_changes_nothing():
    pipe = patched("sd3", "fora", **SLOWLY)
    calls(pipe, [PLAIN] * 4)
    assert modes(pipe) == ["full", "reuse", "reuse", "reuse"]


def test_prompt_and_guidance_changed_by_a_callback():
    """As users do: other words from the third step on, no guidance from the fifth."""

    def change(pipe, index, t, kwargs):
        if index == 2:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"] * 1.5
        if index == 4:
            pipe._guidance_scale = 1.0
            kwargs = {key: value[1:] for key, value in kwargs.items()}
        return kwargs

    more = dict(callback_on_step_end_tensor_inputs=["prompt_embeds", "pooled_prompt_embeds"], steps=7)
    pipe = patched("sd3", "toca", **SLOWLY)
    once = run(pipe, **more, callback_on_step_end=change)
    assert modes(pipe) == ["full", "reduce", "reduce", "full", "reduce", "full", "reduce"]
    assert same(run(pipe, **more, callback_on_step_end=change), once)


@pytest.mark.parametrize("kind, text", [("sd3", "prompt_embeds"), ("dit", "class_labels")])
def test_a_pass_that_takes_another_s_place(kind, text):
    """Two calls a step, then the second alone, which is now the first: its prompt, or label, says what it is."""
    pipe, seen = patched(kind, "fora", **SLOWLY), []
    tiny.denoiser(pipe).register_forward_hook(lambda *args: seen.append(driver(pipe).decided[0]))
    order = iter([("uncond", "cond")] * 2 + [("cond",)] * 2)

    class Order(tuple):
        def __iter__(self):
            return iter(next(order))

    loop(pipe, Order(("cond", "uncond")), steps=4)
    assert seen == ["full", "full", "reuse", "reuse", "full", "reuse"]


@pytest.mark.parametrize("name", ["fora", "taylorseer", "toca", "ras"])
def test_passes_do_not_mix(name):
    """FLUX's conditional pass, beside an unconditional one and alone, on the same latents."""
    pipe, seen = patched("flux", name, torch.float64, interval=3), []
    handle = tiny.denoiser(pipe).register_forward_hook(
        lambda model, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    run(pipe, steps=4)
    handle.remove()
    latents, outs = iter([x for x, _ in seen[::2]]), []
    tiny.denoiser(pipe).register_forward_pre_hook(
        lambda model, args, kwargs: (args, {**kwargs, "hidden_states": next(latents)}), with_kwargs=True
    )
    tiny.denoiser(pipe).register_forward_hook(lambda model, args, out: outs.append(out[0]))
    run(pipe, steps=4, guidance=1.0)
    assert len(seen) == 8 and len(outs) == 4
    assert all(same(alone, both) for alone, (_, both) in zip(outs, seen[::2], strict=True))


# --- kinds of runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHES)
def test_second_order(name):
    """Two evaluations at one noise level are two steps: eleven of them."""
    pipe = tokred.patch(tiny.sd3(scheduler=FlowMatchHeunDiscreteScheduler(shift=3.0)), **options(name, interval=3))
    once = run(pipe, steps=6)
    assert len(modes(pipe)) == 11 and modes(pipe).count("full") in (4, 5)
    assert same(run(pipe, steps=6), once)


def test_img2img_begins_with_a_full_step():
    pipe = tokred.patch(tiny.img2img(tiny.sd3()), **options("toca", interval=3, warmup=2, min_steps=6))
    run(pipe, steps=10, strength=0.6)
    assert modes(pipe) == ["full", "full", "reduce", "reduce", "full", "reduce"]
    with pytest.warns(UserWarning, match="toca leaves this run of 5 steps as it is"):
        run(pipe, steps=10, strength=0.5)
    assert modes(pipe) == ["full"] * 5


@pytest.mark.parametrize("name", ["fora", "taylorseer", "toca", "cat-faithful"])
def test_after_an_interrupted_run(name):
    def stop(pipe, index, t, kwargs):
        pipe._interrupt = index == 2
        return kwargs

    pipe = patched("sd3", name)
    run(pipe, steps=5, callback_on_step_end=stop)
    assert len(modes(pipe)) == 3
    assert same(run(pipe, steps=4), run(patched("sd3", name), steps=4))


@pytest.mark.parametrize("name", CACHES)
def test_few_steps(name):
    """By default short runs are dense, keep nothing, and say so: once, and in `explain`."""
    asked = CACHES[name] | dict(warmup=2)
    pipe = tokred.patch(PIPES["flux"](), **asked)
    kept = []
    tiny.denoiser(pipe).register_forward_hook(lambda *args: kept.extend(driver(pipe).levels[0].memory.slots))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert same(run(pipe, steps=4), dense("flux", steps=4))
    texts = [str(w.message) for w in told if "as it is" in str(w.message)]
    method = asked["method"]
    assert len(texts) == 1 and texts[0].startswith(f"{method} leaves this run of 4 steps as it is")
    assert "min_steps=4" in texts[0] and kept == [] and set(modes(pipe)) == {"full"}
    found = tokred.explain(PIPES["flux"](), **asked, num_inference_steps=4)
    assert found.warnings == tuple(texts) and found.cache_bytes == 0 and found.flop_ratio == 1
    tokred.patch(pipe, **asked, min_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(pipe, steps=4)
    assert "full" in modes(pipe) and len(set(modes(pipe))) > 1


# --- with others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHES)
def test_controlnet(name):
    """Its residuals are added between the blocks: what takes these as one refuses, what works inside of them does."""
    pipe, plain = tiny.controlnet(tiny.sd3()), tiny.controlnet(tiny.sd3())
    tokred.patch(pipe, **options(name))
    if name in ("fora", "taylorseer-modules", "clusca", "toca-faithful", "cat-faithful"):
        far = (run(pipe, steps=4) - run(plain, steps=4)).abs().max()
        assert 1e-4 < far < 1
        return
    with pytest.raises(tokred.UnsupportedError, match=r"ControlNet's residuals .*mode='faithful'"):
        run(pipe, steps=4)
    assert same(run(tokred.unpatch(pipe)), run(plain))


def test_controlnet_of_flux():
    model = patched("flux", "toca").transformer
    inputs = dict(
        hidden_states=torch.zeros(1, 64, 16), encoder_hidden_states=torch.zeros(1, 7, tiny.TEXT),
        pooled_projections=torch.zeros(1, tiny.POOLED), timestep=torch.ones(1), txt_ids=torch.zeros(7, 3),
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0)),
    )  # fmt: skip
    for samples in ("controlnet_block_samples", "controlnet_single_block_samples"):
        with torch.no_grad(), pytest.raises(tokred.UnsupportedError, match="ControlNet's residuals"):
            model(**inputs, **{samples: [torch.ones(1, 64, 32)]})


@pytest.mark.parametrize("name", ["fora", "taylorseer", *PACKED, "cat-faithful"])
@pytest.mark.parametrize("skipped", [[0], [2]], ids=str)
def test_skip_layer_guidance(name, skipped):
    """SD3's third pass leaves out blocks, maybe the first or the last of a stack. Without reuse it is the dense run."""
    more = dict(steps=6, skip_guidance_layers=skipped, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.8)
    plain = run(tiny.sd3(), **more)
    pipe = patched("sd3", name, interval=3)
    once = run(pipe, **more)
    third = [s.mode for s in tokred.report(pipe).steps if s.pass_key == "1"]
    assert third[0] == "full" and len(set(third)) > 1
    assert same(run(pipe, **more), once) and (once - plain).abs().max() > 1e-3
    if name in ("toca", "ras", "cat", "cat-faithful"):  # DuCa reuses, whatever the ratio
        near(run(all_rows(pipe), **more), plain, 1e-5)


@pytest.mark.parametrize("name", ["toca", "cat-faithful", "fora"])
def test_ip_adapter_of_flux(name):
    """Its attention returns a third result, with a row for each image token. With all tokens it is the dense run's."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    def pipe():
        made = PIPES["flux"]()
        torch.manual_seed(3)
        for block in made.transformer.transformer_blocks:
            block.attn.processor = FluxIPAdapterAttnProcessor(32, 32, num_tokens=(4,))
        made.transformer.encoder_hid_proj = torch.nn.Identity()
        return made

    def images(scale):
        image = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(9))
        return dict(joint_attention_kwargs=dict(ip_hidden_states=[scale * image]), steps=3)

    adapted = tokred.patch(pipe(), **options(name))
    assert (run(adapted, **images(1)) - run(adapted, **images(2))).abs().max() > 1e-4
    if name != "fora":
        near(run(all_rows(adapted), **images(2)), run(pipe(), **images(2)), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["toca", "cat-faithful", "fora", "toca-faithful"])
def test_reference_pictures_of_flux(name):
    """Kontext's tokens follow the image's: they are computed at each reduced step, and go through as they are."""
    steps, rows = 3, []

    def outs(model, scheduler):
        scheduler.set_timesteps(steps, mu=0.8)
        ids = torch.cartesian_prod(torch.arange(2.0), torch.arange(8.0), torch.arange(8.0))[:80]
        x = torch.randn(1, 80, 16, generator=torch.Generator().manual_seed(0))
        text, pooled = torch.ones(1, 7, tiny.TEXT), torch.ones(1, tiny.POOLED)
        for t in scheduler.timesteps:
            yield (out := model(x, text, pooled, t[None] / 1000, ids, torch.zeros(7, 3), return_dict=False)[0])
            x = scheduler.step(out, t, x, return_dict=False)[0]

    pipe, plain = patched("flux", name, interval=3, **{} if name == "fora" else {"ratio": 0.75}), PIPES["flux"]()
    want = [*outs(plain.transformer, plain.scheduler)]
    pipe.transformer.transformer_blocks[0].ff.net[0].proj.register_forward_pre_hook(
        lambda module, args: rows.append(args[0].shape[1])
    )
    found = [*outs(pipe.transformer, pipe.scheduler)]
    full = driver(pipe).method.config.warmup
    assert all(map(same, found[:full], want[:full])) and not torch.equal(found[full], want[full])
    assert rows[full:] == [] if name == "fora" else rows[full] == 16 + 16
    if name in ("toca", "cat-faithful"):
        near(torch.cat([*outs(all_rows(pipe).transformer, pipe.scheduler)]), torch.cat(want), 1e-5)


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart"])
@pytest.mark.parametrize("name", ["toca", "cat-faithful"])
def test_fused_projections(kind, name):
    pipe = PIPES[kind]()
    tiny.denoiser(pipe).fuse_qkv_projections()
    near(run(tokred.patch(pipe, **options(name)), steps=3), run(patched(kind, name), steps=3), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half(kind):
    pipe = patched(kind, "toca", torch.bfloat16, interval=3)
    out, plain = run(pipe, steps=4), run(cast(PIPES[kind](), torch.bfloat16), steps=4)
    assert out.dtype == torch.bfloat16 and same(run(pipe, steps=4), out) and not torch.equal(out, plain)


STATES = {"toca": 3, "ras": 2, "cat-faithful": 2, "toca-faithful": 2, "fora": 2}


@pytest.mark.parametrize("name, state", STATES.items())
def test_token_map(name, state):
    """0 where a token was computed; each image of the batch has its own."""
    pipe = patched("sd3", name, record="tokens", **({} if name == "fora" else {"ratio": 0.75}))
    run(pipe, steps=3, batch=2)
    found = tokred.report(pipe).token_map[driver(pipe).method.config.warmup]
    computed = (found == 0).sum((1, 2, 3))
    assert set(found[found != 0].tolist()) == {state}
    assert (computed == (0 if name == "fora" else 16)).all()
