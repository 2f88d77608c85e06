"""Contract 7: number types, storage types and offloading."""

import gc

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.compat.test_adapters import check
from tests.contract.helpers import CONFIGS, PIPES, Snapshot, dense, near, patch, reduced, run, same


def embeds(kind):
    """The prompt, made beside the pipeline: of an offloaded model `tiny.inputs` would put it on "meta", as it does."""
    return {name: value for name, value in tiny.inputs(PIPES[kind]()).items() if "embeds" in name}


def offload(pipe):
    """accelerate's sequential offload of every part (a pipeline asks the first for the device to run on)."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, execution_device="cpu")


def unload(pipe):
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            remove_hook_from_module(part, recurse=True)


KINDS = pytest.mark.parametrize("kind", PIPES)
EVERY = pytest.mark.parametrize("config", CONFIGS)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3-dual", "pixart", "flux"])
def test_half(kind, dtype, config):
    pipe = PIPES[kind]().to(dtype)
    out = check(pipe, kind, config)
    assert out.dtype == dtype


@pytest.mark.parametrize("config", ["tome-all", "tome-reuse", "todo-area"])
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16], ids=["fp8", "bf16"])
@pytest.mark.parametrize("kind", ["sd", "sd3-dual", "flux"])
def test_layerwise_casting(kind, storage, config):
    pipe = PIPES[kind]()
    tiny.denoiser(pipe).enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    want = check(pipe, kind, config)
    late = patch(PIPES[kind](), kind, config)
    tiny.denoiser(late).enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert same(run(late), want)
    tokred.unpatch(late)
    assert not [m for m in tiny.denoiser(late).modules() if "forward" in vars(m) and "_diffusers_hook" not in vars(m)]


@pytest.mark.parametrize("config", ["tome-all", "tome-reuse", "todo"])
@pytest.mark.parametrize("kind", ["sd", "sd3-dual", "flux"])
def test_offload_first(kind, config):
    pipe = PIPES[kind]()
    offload(pipe)
    assert same(check(pipe, kind, config, loose="_parameters[", **embeds(kind)), reduced(kind, config))
    assert same(run(pipe, **embeds(kind)), dense(kind))


@pytest.mark.filterwarnings("ignore:unpatched, but")
@pytest.mark.parametrize("leaves_first", ["ours", "theirs"])
@pytest.mark.parametrize("config", ["tome-all", "tome-reuse", "todo"])
@pytest.mark.parametrize("kind", ["sd", "sd3-dual", "flux"])
def test_offload_after_patching(kind, config, leaves_first):
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    patch(pipe, kind, config)
    offload(pipe)
    assert same(run(pipe, **embeds(kind)), reduced(kind, config))
    assert same(run(pipe, **embeds(kind)), reduced(kind, config))
    if leaves_first == "ours":
        tokred.unpatch(pipe)
        assert same(run(pipe, **embeds(kind)), dense(kind))
        unload(pipe)
    else:
        unload(pipe)
        assert same(run(pipe, **embeds(kind)), reduced(kind, config))
        tokred.unpatch(pipe)
    assert same(run(pipe, **embeds(kind)), dense(kind))
    assert "_tokred" not in vars(model) and not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize("kind, config", [("sd", "tome-reuse"), ("sd3", "todo"), ("flux", "tome")])
def test_hooks_removed_after_every_call(kind, config):
    """Model offload takes accelerate's hooks off the denoiser, and puts them on, after every run."""
    pipe = patch(PIPES[kind](), kind, config)
    for _ in range(2):
        offload(pipe)
        assert same(run(pipe, **embeds(kind)), reduced(kind, config))
        unload(pipe)
    assert same(run(pipe, **embeds(kind)), reduced(kind, config))


@pytest.mark.parametrize("kind, config", [("sd", "tome-all"), ("sd3", "todo")])
def test_group_offload(kind, config):
    """diffusers' own offloading, by leaves, before and after patching."""
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    for late in (False, True):
        pipe = PIPES[kind]()
        if late:
            patch(pipe, kind, config)
        try:
            apply_group_offloading(tiny.denoiser(pipe), cpu, cpu, offload_type="leaf_level")
        except (ValueError, RuntimeError) as error:
            pytest.skip(f"not without an accelerator: {error}")
        if not late:
            patch(pipe, kind, config)
        assert same(run(pipe), reduced(kind, config))
        assert same(run(pipe), reduced(kind, config))


@KINDS
def test_to_another_dtype_while_patched(kind):
    pipe = patch(PIPES[kind](), kind, "tome-reuse")
    run(pipe)
    pipe.to(torch.float64)
    near(run(pipe), run(patch(PIPES[kind]().to(torch.float64), kind, "tome-reuse")), 1e-12)


@EVERY
def test_nothing_is_kept_between_runs(config):
    """After a run no tensor of it is held: not by the memory of the levels, not by a tap, not by the scratch."""
    pipe = patch(tiny.sd3(), "sd3", config)
    parameters = {id(t) for t in [*pipe.transformer.parameters(), *pipe.transformer.buffers()]}
    driver = pipe.transformer._tokred
    run(pipe, batch=3)
    gc.collect()

    def held(thing, depth=0):
        if isinstance(thing, torch.Tensor):
            return [] if id(thing) in parameters else [thing.shape]
        if isinstance(thing, dict):
            return [s for value in thing.values() for s in held(value, depth + 1)]
        if isinstance(thing, (list, tuple)):
            return [s for value in thing for s in held(value, depth + 1)]
        if type(thing).__module__.startswith("diffusion_tokred.") and depth < 6:
            return held(
                {k: v for k, v in vars(thing).items() if k != "report"} if hasattr(thing, "__dict__") else (), depth + 1
            )
        return []

    assert held(driver) == []
    before = Snapshot(pipe.transformer)
    run(pipe)
    assert before.differences(pipe.transformer) == []  # and the model's own attributes are as between runs
