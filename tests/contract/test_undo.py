"""Contract 2: `unpatch` is bit-exact and leaves nothing, whatever else has been done to the model."""

import copy
import gc
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import (
    CONFIGS,
    PIPES,
    Snapshot,
    dense,
    each,
    leaves,
    near,
    options,
    patch,
    private_modules,
    reduced,
    run,
    same,
    some,
)


@each
def test_nothing_is_left(kind, config):
    pipe = PIPES[kind]()
    run(pipe)  # attributes that a run itself sets
    model = tiny.denoiser(pipe)
    before, pipe_before, scheduler_before = Snapshot(model), dict(vars(pipe)), dict(vars(pipe.scheduler))
    assert patch(pipe, kind, config) is pipe
    assert before.differences(model)
    assert vars(pipe) == pipe_before and vars(pipe.scheduler) == scheduler_before
    assert tokred.unpatch(pipe) is pipe  # before any run
    assert before.differences(model) == []

    private = []  # a tap's modules live as long as the model, and are no more each time it is patched
    for _ in range(2):
        patch(pipe, kind, config)
        assert same(run(pipe), reduced(kind, config))
        tokred.unpatch(pipe)
        assert before.differences(model) == []
        assert vars(pipe).keys() == pipe_before.keys() and vars(pipe.scheduler).keys() == scheduler_before.keys()
        gc.collect()
        private.append(private_modules())
    assert set(private[1]) <= set(private[0])  # (those of earlier tests' models go when they go)
    assert same(run(pipe), dense(kind))


@some
def test_patch_on_the_denoiser_itself(kind, config):
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    before = Snapshot(model)
    assert patch(model, kind, config) is model
    assert same(run(pipe), reduced(kind, config))
    tokred.unpatch(model)
    assert before.differences(model) == []
    assert same(run(pipe), dense(kind))


@some
def test_with_block(kind, config):
    pipe = PIPES[kind]()
    before = Snapshot(tiny.denoiser(pipe))
    with pytest.raises(RuntimeError, match="mine"), tokred.patched(pipe, **options(kind, config)) as inside:
        assert inside is pipe
        assert same(run(pipe), reduced(kind, config))
        raise RuntimeError("mine")
    assert before.differences(tiny.denoiser(pipe)) == []
    assert same(run(pipe), dense(kind))


@pytest.mark.parametrize("times", [0, 1, 2, 3])
@some
def test_patched_often_unpatched_once(kind, config, times):
    pipe = PIPES[kind]()
    before = Snapshot(tiny.denoiser(pipe))
    for _ in range(times):
        patch(pipe, kind, config)
    tokred.unpatch(pipe)
    assert before.differences(tiny.denoiser(pipe)) == []
    tokred.unpatch(pipe)
    assert before.differences(tiny.denoiser(pipe)) == []
    assert same(run(pipe), dense(kind))


# --- other tools on the same modules ---------------------------------------------------------------------------------


def scaled(output):
    return tuple(1.25 * o for o in output) if isinstance(output, tuple) else 1.25 * output


class Wrapped:
    """A well-behaved foreign wrapper of `forward`: puts back what it found."""

    def __init__(self, module):
        self.module, self.base, self.had = module, module.forward, "forward" in vars(module)
        module.forward = lambda *args, **kwargs: scaled(self.base(*args, **kwargs))

    def remove(self):
        if self.had:
            self.module.forward = self.base
        else:
            del self.module.forward


class Accelerated:
    """accelerate leaves its `forward` in the module's `__dict__`: the class's own, bound."""

    class Hook(ModelHook):
        def post_forward(self, module, output):
            return scaled(output)

    def __init__(self, module):
        self.module = module
        add_hook_to_module(module, self.Hook())

    def remove(self):
        remove_hook_from_module(self.module)


class Registered:
    """diffusers' own registry. It leaves `forward` and `_diffusers_hook` on the module when its last hook goes."""

    class Hook(DiffusersHook):
        def post_forward(self, module, output):
            return scaled(output)

    def __init__(self, module):
        self.registry = HookRegistry.check_if_exists_or_initialize(module)
        self.registry.register_hook(self.Hook(), "foreign")

    def remove(self):
        self.registry.remove_hook("foreign", recurse=False)


class Native:
    def __init__(self, module):
        self.handle = module.register_forward_hook(lambda module, args, output: scaled(output))

    def remove(self):
        self.handle.remove()


TOOLS = {tool.__name__: tool for tool in (Wrapped, Accelerated, Registered, Native)}


@pytest.mark.filterwarnings("ignore:unpatched, but")
@pytest.mark.parametrize("ours_leaves_first", [True, False])
@pytest.mark.parametrize("ours_comes_first", [True, False])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind, config", [("sd", "tome-all"), ("sd", "todo"), ("sd3", "todo"), ("sd3-dual", "tome")])
def test_foreign_hooks_in_any_order(kind, config, tool, ours_comes_first, ours_leaves_first):
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    before = Snapshot(model)
    theirs = [TOOLS[tool](m) for m in leaves(model)]
    alone = run(pipe)
    assert not torch.equal(alone, dense(kind))
    [t.remove() for t in theirs]
    assert same(run(pipe), dense(kind))
    left_by_tool = before.differences(model)  # by the tool alone

    def ours():
        patch(pipe, kind, config)

    def foreign():
        theirs[:] = [TOOLS[tool](m) for m in leaves(model)]

    for step in (ours, foreign) if ours_comes_first else (foreign, ours):
        step()
    both = run(pipe)
    assert same(run(pipe), both)
    assert not torch.equal(both, alone) and not torch.equal(both, reduced(kind, config))
    if ours_leaves_first:
        tokred.unpatch(pipe)
        assert same(run(pipe), alone)  # the other tool goes on working, ours does not
        [t.remove() for t in theirs]
    else:
        [t.remove() for t in theirs]
        # A tool that came before ours and puts back what it found takes ours away with it. Not so a native hook.
        if ours_comes_first or tool == "Native":
            assert same(run(pipe), reduced(kind, config))
        tokred.unpatch(pipe)
    assert same(run(pipe), dense(kind))
    if tool in ("Registered", "Accelerated"):
        assert {d.split(" ")[0] for d in before.differences(model)} <= {d.split(" ")[0] for d in left_by_tool}
    else:
        assert before.differences(model) == left_by_tool == []


def test_unpatch_says_what_had_to_stay():
    pipe = patch(tiny.sd(), "sd", "tome")
    tool = Wrapped(leaves(pipe.unet)[0])
    with pytest.warns(UserWarning, match="wrapped by another tool"):
        tokred.unpatch(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokred.unpatch(pipe)
    tool.remove()
    assert same(run(pipe), dense("sd"))


@pytest.mark.filterwarnings("ignore:unpatched, but")
@pytest.mark.parametrize("config", ["tome-all", "todo"])
def test_patch_again_over_another_tool(config):
    """Ours, theirs, ours again: the first of ours is inert, not applied a second time."""
    pipe = tiny.sd()
    before = Snapshot(pipe.unet)
    patch(pipe, "sd", config)
    theirs = [Wrapped(m) for m in leaves(pipe.unet)]
    want = run(pipe)
    patch(pipe, "sd", config)
    near(run(pipe), want, 1e-5)  # scaling and unmerging, or pooling, commute up to rounding
    tokred.unpatch(pipe)
    [t.remove() for t in theirs]
    assert same(run(pipe), dense("sd"))
    assert before.differences(pipe.unet) == []


# --- sharing, copying, saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["first", "second"])
@pytest.mark.parametrize("config", ["tome", "todo"])
def test_two_pipelines_one_denoiser(config, through):
    pipe = tiny.sd()
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    plain = run(other, strength=0.7, steps=3)
    before = Snapshot(pipe.unet)
    patch(pipe, "sd", config)
    assert same(run(pipe), reduced("sd", config))
    changed = run(other, strength=0.7, steps=3)
    assert not torch.equal(changed, plain)
    later = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    later.set_progress_bar_config(disable=True)
    assert same(run(later, strength=0.7, steps=3), changed)
    assert same(run(pipe), reduced("sd", config))  # in turns
    tokred.unpatch(pipe if through == "first" else other)
    assert before.differences(pipe.unet) == []
    assert same(run(pipe), dense("sd")) and same(run(other, strength=0.7, steps=3), plain)


@some
def test_save_pretrained_writes_the_unpatched_model(kind, config, tmp_path):
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    model.save_pretrained(tmp_path / "plain")
    patch(pipe, kind, config)
    run(pipe)
    model.save_pretrained(tmp_path / "patched")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "patched")
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    # Loaded weights lie elsewhere in memory, which moves the last bit of a product (FLUX, also without us).
    near(run(type(pipe)(**pipe.components | {name: loaded} | _more(pipe))), dense(kind), 1e-5)
    pipe.save_pretrained(tmp_path / "pipe")
    again = type(pipe).from_pretrained(tmp_path / "pipe", **_more(pipe))
    again.set_progress_bar_config(disable=True)
    near(run(again), dense(kind), 1e-5)
    assert same(run(pipe), reduced(kind, config))  # still patched


def _more(pipe):
    """Arguments without which a pipeline that lacks its optional parts is not made."""
    absent = {name: None for name, part in pipe.components.items() if part is None}
    return absent | (dict(requires_safety_checker=False) if type(pipe).__name__ == "StableDiffusionPipeline" else {})


@pytest.mark.parametrize("after_a_run", [False, True])
@pytest.mark.parametrize("of", ["pipeline", "denoiser"])
@pytest.mark.parametrize(
    "kind, config", [("sd", "tome-all"), ("sdxl", "todo"), ("sd3-dual", "tome-share"), ("sd3", "todo")]
)
def test_deepcopy_is_an_independent_patched_copy(kind, config, of, after_a_run):
    pipe = patch(PIPES[kind](), kind, config)
    if after_a_run:
        run(pipe)
    if of == "pipeline":
        twin = copy.deepcopy(pipe)
    else:
        name = "unet" if hasattr(pipe, "unet") else "transformer"
        twin = copy.copy(pipe)
        twin.scheduler = copy.deepcopy(pipe.scheduler)
        setattr(twin, name, copy.deepcopy(tiny.denoiser(pipe)))
    a, b = tiny.denoiser(pipe), tiny.denoiser(twin)
    assert not {p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()}
    assert same(run(twin), reduced(kind, config)) and same(run(pipe), reduced(kind, config))
    # Nothing of one is reached from the other: other weights in one leave the other alone.
    with torch.no_grad():
        for p in a.parameters():
            p.mul_(1.5)
    assert same(run(twin), reduced(kind, config))
    assert not torch.equal(run(pipe), reduced(kind, config))
    tokred.unpatch(pipe)
    assert same(run(twin), reduced(kind, config))
    tokred.unpatch(twin)
    assert same(run(twin), dense(kind))
    fresh = Snapshot(tiny.denoiser(PIPES[kind]()))
    for model in (a, b):
        contents = {name: parts.keys() for name, (_, _, parts) in Snapshot(model).modules.items()}
        assert contents == {name: parts.keys() for name, (_, _, parts) in fresh.modules.items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_unpatched_copies_stay_patched(config):
    """The other way round: the copy is unpatched first."""
    pipe = patch(tiny.sd3(), "sd3", config)
    twin = copy.deepcopy(pipe)
    tokred.unpatch(twin)
    assert same(run(twin), dense("sd3")) and same(run(pipe), reduced("sd3", config))
    gc.collect()
    tokred.unpatch(pipe)
    del twin
    gc.collect()
    assert same(run(pipe), dense("sd3"))


def test_state_dict_has_the_same_keys():
    pipe = tiny.sd3()
    keys = list(pipe.transformer.state_dict())
    patch(pipe, "sd3", "todo")
    run(pipe)
    assert list(pipe.transformer.state_dict()) == keys
    assert [n for n, _ in pipe.transformer.named_modules()] == [n for n, _ in tiny.sd3().transformer.named_modules()]


@pytest.mark.parametrize("unpatched", [False, True])
def test_a_patched_pipeline_can_be_freed(unpatched):
    import weakref

    others = private_modules()
    pipe = patch(tiny.sd3(), "sd3", "todo", record="tokens")
    run(pipe)
    assert set(private_modules()) - set(others)
    if unpatched:
        tokred.unpatch(pipe)
    model = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert model() is None
    assert not set(private_modules()) - set(others)
