"""Contract 3 and 4: one run at a time, and no run leaves anything for the next."""

import inspect
import itertools
import threading

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import CONFIGS, PIPES, Snapshot, dense, each, leaves, near, patch, reduced, run, same, some

# What a pipeline may have been used for before the run that counts.
HISTORY = {
    "same": lambda pipe: run(pipe),
    "other size": lambda pipe: run(pipe, height=48, width=32),
    "more steps": lambda pipe: run(pipe, steps=3),
    "one step": lambda pipe: run(pipe, steps=1),
    "other batch": lambda pipe: run(pipe, batch=2),
    "no guidance": lambda pipe: run(pipe, guidance=1.0),
    "other seed": lambda pipe: run(pipe, seed=7),
    "callback raised": lambda pipe: broken_by_callback(pipe),
    "block raised": lambda pipe: broken_in_block(pipe),
    "keyboard": lambda pipe: broken_in_block(pipe, KeyboardInterrupt),
    "interrupted": lambda pipe: interrupted(pipe),
    "single call": lambda pipe: single_call(pipe),
}


def after_step(pipe, function):
    """Keywords that have a pipeline call `function` after each step. (DiT's and PixArt's have no callback for it.)"""
    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
        return dict(callback_on_step_end=lambda pipe, index, t, kwargs: function(pipe) or kwargs)
    if "callback" in inspect.signature(type(pipe).__call__).parameters:
        return dict(callback=lambda index, t, latents: function(pipe))
    return None


def broken_by_callback(pipe):
    def stop(pipe):
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback"):
        run(pipe, **after_step(pipe, stop))


def broken_in_block(pipe, error=RuntimeError):
    """Fail in the second step, in the middle of the model, as a foreign hook would."""
    calls = []
    modules = leaves(tiny.denoiser(pipe))

    def fail(module, args):
        calls.append(module)
        if len(calls) == 2:
            raise error("block")

    handle = modules[len(modules) // 2].register_forward_pre_hook(fail)
    with pytest.raises(error, match="block"):
        run(pipe, steps=3)
    handle.remove()


def interrupted(pipe):
    def stop(pipe):
        pipe._interrupt = True

    run(pipe, steps=3, **after_step(pipe, stop))


@torch.no_grad()
def single_call(pipe):
    """The denoiser outside of any pipeline, at another size."""
    model = tiny.denoiser(pipe)
    data = tiny.inputs(pipe)
    x = torch.randn(1, model.config.in_channels, 24, 16)
    name = type(model).__name__
    if name == "PixArtTransformer2DModel":
        added = {"resolution": None, "aspect_ratio": None}
        model(x, data["prompt_embeds"], torch.tensor([500.0]), added_cond_kwargs=added)
    elif name == "FluxTransformer2DModel":
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(12.0), torch.arange(8.0))
        x = torch.randn(1, 96, model.config.in_channels)
        more = dict(img_ids=ids, txt_ids=torch.zeros(7, 3))
        model(x, data["prompt_embeds"], data["pooled_prompt_embeds"], torch.tensor([0.5]), **more)
    elif "pooled_prompt_embeds" not in data:
        model(x, 500, data["prompt_embeds"])
    elif hasattr(pipe, "unet"):
        ids = torch.tensor([[32, 48, 0, 0, 32, 48]], dtype=torch.float32)
        more = dict(text_embeds=data["pooled_prompt_embeds"], time_ids=ids)
        model(x, 500, data["prompt_embeds"], added_cond_kwargs=more)
    else:
        model(x, data["prompt_embeds"], data["pooled_prompt_embeds"], torch.tensor([500.0]))


@pytest.mark.parametrize("before", HISTORY)
@pytest.mark.parametrize(
    "kind, config",
    [
        ("sd", "tome-all"), ("sd", "tome-reuse"), ("sdxl", "todo"), ("sd3-dual", "tome-reuse"), ("sd3", "todo-area"),
        ("pixart", "tome-reuse"), ("flux", "tome-reuse"), ("flux", "todo"),
    ],
)  # fmt: skip
def test_history(kind, config, before):
    pipe = patch(PIPES[kind](), kind, config)
    HISTORY[before](pipe)
    assert same(run(pipe), reduced(kind, config))
    assert len(tokred.report(pipe).steps) == (4 if kind == "flux" else 2)  # FLUX: two passes a step


@pytest.mark.parametrize("before", ["block raised", "keyboard", "callback raised", "interrupted", "single call"])
@some
def test_unpatch_after_a_broken_run(kind, config, before):
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    start = Snapshot(model)
    patch(pipe, kind, config)
    HISTORY[before](pipe)
    tokred.unpatch(pipe)
    assert start.differences(model) == []
    assert same(run(pipe), dense(kind))


@pytest.mark.parametrize("before", CONFIGS)
@pytest.mark.parametrize("after", ["tome", "tome-reuse", "todo"])
@pytest.mark.parametrize("kind", ["sd", "sd3-dual"])
def test_patch_replaces(kind, before, after):
    pipe = patch(PIPES[kind](), kind, before)
    run(pipe)
    patch(pipe, kind, after)
    assert same(run(pipe), reduced(kind, after))
    assert tokred.report(pipe).method == after.split("-")[0]


@each
def test_two_pipelines_in_turns(kind, config):
    """Denoiser calls of two patched pipelines alternate: neither knows of the other."""
    one, two = patch(PIPES[kind](), kind, config), patch(PIPES["sd3"](seed=5), "sd3", "tome-reuse")
    alone = run(patch(PIPES["sd3"](seed=5), "sd3", "tome-reuse"), steps=2)
    found = []

    def nested(pipe):
        found.append(run(two, steps=2))

    if after_step(one, nested) is None:
        pytest.skip("this pipeline has no callback")
    assert same(run(one, **after_step(one, nested)), reduced(kind, config))
    assert found and all(same(x, alone) for x in found)


def test_two_denoisers_of_the_same_weights():
    one, two = patch(tiny.sd(), "sd", "tome-reuse"), patch(tiny.sd(), "sd", "todo")
    for _ in range(2):
        assert same(run(one), reduced("sd", "tome-reuse"))
        assert same(run(two), reduced("sd", "todo"))
    tokred.unpatch(one)
    assert same(run(one), dense("sd")) and same(run(two), reduced("sd", "todo"))


@pytest.mark.parametrize("where", ["between steps", "in a block"])
@pytest.mark.parametrize("kind, config", [("sd", "tome"), ("sd", "todo"), ("sd3", "todo"), ("sd3-dual", "tome-reuse")])
def test_second_thread_is_refused_and_does_no_harm(kind, config, where):
    pipe = PIPES[kind]()
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # a scheduler serves one run, patched or not
    more = dict(requires_safety_checker=False) if kind == "sd" else {}
    second = type(pipe)(**pipe.components | dict(scheduler=scheduler), **more)
    second.set_progress_bar_config(disable=True)
    patch(pipe, kind, config)
    inside, go_on, result = threading.Event(), threading.Event(), []

    def wait(*args):
        if threading.current_thread() is worker and not inside.is_set():
            inside.set()
            assert go_on.wait(60)
        return args[-1] if where == "between steps" else None

    more = {}
    if where == "between steps":
        more["callback_on_step_end"] = wait
    else:
        modules = leaves(tiny.denoiser(pipe))
        handle = modules[0].register_forward_pre_hook(wait)
    worker = threading.Thread(target=lambda: result.append(run(pipe, **more)), daemon=True)
    worker.start()
    assert inside.wait(60)
    try:
        for _ in range(2):
            with pytest.raises(tokred.StateError, match="thread"):
                run(second)
    finally:
        go_on.set()
        worker.join(60)
    if where == "in a block":
        handle.remove()
    assert same(result[0], reduced(kind, config))
    assert same(run(second), reduced(kind, config))  # and it is free now
    assert len(tokred.report(pipe).steps) == 2


# --- random draws, batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPES)
def test_draws_depend_on_seed_and_step(kind):
    def result(**more):
        return run(patch(PIPES[kind](), kind, "tome", **more))

    assert same(result(seed=0), reduced(kind, "tome"))
    one = result(seed=1)
    assert not torch.equal(one, reduced(kind, "tome"))
    assert same(result(seed=1), one)
    assert same(result(seed=0, randomize=False), result(seed=1, randomize=False))


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_destinations_change_from_step_to_step(kind):
    pipe = patch(PIPES[kind](), kind, "tome", ratio=0.75, record="tokens")  # all but the destinations
    run(pipe, steps=3, guidance=1.0)
    maps = tokred.report(pipe).token_map[:, 0, 0]
    assert all(((m == 0).reshape(m.shape[0] // 2, 2, -1, 2).sum((1, 3)) == 1).all() for m in maps)  # one in each cell
    assert (maps[0] != maps[1]).any() and (maps[1] != maps[2]).any()
    tokred.patch(pipe, method="tome", ratio=0.75, randomize=False, record="tokens")
    run(pipe, steps=3, guidance=1.0)
    fixed = tokred.report(pipe).token_map[:, 0, 0]
    assert (fixed[:, ::2, ::2] == 0).all() and fixed.mean() == 0.75


@some
def test_torch_generators_are_left_alone(kind, config):
    pipe, _ = patch(PIPES[kind](), kind, config), reduced(kind, config)
    for seed in (0, 123):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        assert same(run(pipe), reduced(kind, config))
        assert torch.equal(torch.get_rng_state(), before)


@each
def test_place_in_the_batch_does_not_matter(kind, config):
    pipe = patch(PIPES[kind]().to(torch.float64), kind, config)
    together = run(pipe, batch=3)
    for i in range(3):
        near(run(pipe, seed=i)[0], together[i], 1e-8)


@pytest.mark.parametrize("kind, config", [("sd", "tome-reuse"), ("sd", "tome-share"), ("sd3", "tome-reuse")])
def test_reuse_really_reuses(kind, config):
    """With reuse_every=k the matching is made once in k steps: the token maps of those steps are the same."""
    pipe = patch(PIPES[kind](), kind, config, reuse_every=2, ratio=0.5, record="tokens")
    run(pipe, steps=5)
    maps = tokred.report(pipe).token_map
    assert [bool((a == b).all()) for a, b in itertools.pairwise(maps)] == [True, False, True, False]
    if kind == "sd":  # level 1 comes after cross-attention: there the passes differ
        assert (maps[:, 0, 1] == maps[:, 1, 1]).all() == (config == "tome-share")


def test_batch_that_changes_in_a_run():
    """Guidance switched off half way, as diffusers' cut-off callbacks do."""

    def cut(pipe, index, t, kwargs):
        if index == 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]
        return kwargs

    more = dict(steps=4, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    for config in ("tome-reuse", "tome-share", "todo"):
        pipe = patch(tiny.sd(), "sd", config)
        once = run(pipe, **more)
        assert [s.tokens_computed < s.tokens_total for s in tokred.report(pipe).steps] == [True] * 4
        assert same(run(pipe, **more), once)


def test_patch_and_unpatch_in_the_middle_of_a_run():
    pipe = tiny.sd()

    def switch(pipe, index, t, kwargs):
        tokred.patch(pipe, method="tome") if index == 0 else tokred.unpatch(pipe)
        return kwargs

    out = run(pipe, steps=3, callback_on_step_end=switch)
    assert torch.isfinite(out).all() and not torch.equal(out, dense("sd", steps=3))
    assert same(run(pipe), dense("sd"))


@pytest.mark.parametrize("options", [dict(method="todo"), dict(method="tome", reuse_every=4, randomize=False)], ids=str)
@torch.no_grad()
def test_another_size_in_the_same_run(options):
    """Calls of a bare denoiser, and loops that raise the resolution: what was kept is for another grid."""
    model = tiny.denoiser(PIPES["flux"]())

    def call(rows, columns):
        draws = torch.Generator().manual_seed(rows)
        x = torch.randn(1, rows * columns, model.config.in_channels, generator=draws)
        text, pooled = torch.ones(1, 7, tiny.TEXT), torch.ones(1, tiny.POOLED)
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
        return model(x, text, pooled, torch.tensor([0.5]), ids, torch.zeros(7, 3), return_dict=False)[0]

    fresh = []
    for size in ((16, 8), (8, 16), (16, 16), (8, 8)):
        tokred.patch(model, **options)
        fresh.append(call(*size))
        tokred.unpatch(model)
    tokred.patch(model, **options)
    assert all(same(call(*size), want) for size, want in zip(((16, 8), (8, 16), (16, 16), (8, 8)), fresh, strict=True))
