"""Drop-in attention processors: the same image as `patch`, all that diffusers asks of a processor, and back."""

import inspect
import types

import pytest
import torch
from diffusers.models import attention_processor as upstream
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
)

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError, ToDoAttnProcessor, ToMeAttnProcessor, UnsupportedError
from diffusion_tokred.processors import AttnReducer, installed
from diffusion_tokred.testing import families, tiny
from tests.compat.test_adapters import ip_inputs, load_ip_adapter
from tests.contract.helpers import PIPES, Snapshot, near, run, same

TOME, TODO = tokred.ToMeConfig(merge_parallel=False), tokred.ToDoConfig()
CROSS = tokred.ToMeConfig(levels=(0, 1), merge_cross_attn=True, reuse_every=2)
EACH = [(kind, cls, cfg) for kind in PIPES for cls, cfg in ((ToMeAttnProcessor, TOME), (ToDoAttnProcessor, TODO))]
each = pytest.mark.parametrize("kind, cls, config", [*EACH, ("sd", ToMeAttnProcessor, CROSS)])


def install(model, processors):
    """As users do: by `set_attn_processor`, or, where there is none, one by one."""
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(dict(processors) if isinstance(processors, dict) else processors)
        return
    for name in installed(model):
        one = processors[name] if isinstance(processors, dict) else processors
        model.get_submodule(name.removesuffix(".processor")).processor = one


def stepped(pipe, **more):
    with tokred.steps(pipe):
        return run(pipe, **more)


def by_patch(pipe, config, **more):
    """The image of the same method by `patch`, restricted to attention."""
    with tokred.patched(pipe, config):
        return run(pipe, **more)


# --- The same image, and back ----------------------------------------------------------------------------------------


@each
def test_is_patch_restricted_to_attention(kind, cls, config):
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    plain = run(pipe)
    want = by_patch(pipe, config)
    counted = tokred.report(pipe)
    untouched, before = Snapshot(model), installed(model)
    install(model, cls.around(model, config))
    ready = Snapshot(model)
    assert same(stepped(pipe), want) and not torch.equal(want, plain)
    assert same(stepped(pipe), want)
    assert ready.differences(model) == []
    report = tokred.report(pipe)
    assert (report.tokens_saved, report.flops) == (counted.tokens_saved, counted.flops)
    install(model, before)
    assert untouched.differences(model) == []
    assert same(run(pipe), plain)


@each
def test_one_shared_instance_without_inner(kind, cls, config):
    """It goes around what a new model of this class has: not the same for all modules, Wan or Sana."""
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    want = by_patch(pipe, config)
    shared = cls() if config in (TOME, TODO) else cls(config)
    install(model, shared)
    assert set(installed(model).values()) == {shared}
    ready = Snapshot(model)
    assert same(stepped(pipe), want)
    assert ready.differences(model) == []


@pytest.mark.parametrize("kind", families.BUILDERS)
def test_every_other_family(kind):
    pipe = families.BUILDERS[kind]()
    model = tiny.denoiser(pipe)
    try:
        want = by_patch(pipe, TOME)
    except UnsupportedError as error:
        pytest.skip(f"patch does not know it: {error}")
    for processors in (ToMeAttnProcessor.around(model), ToMeAttnProcessor()):
        before = installed(model)
        install(model, processors)
        ready = Snapshot(model)
        assert same(stepped(pipe), want)
        assert ready.differences(model) == []
        install(model, before)


def test_modules_that_the_method_leaves_alone_are_dense():
    """Ours at the smallest level, where the config does nothing, and at the prompt's attention: bit-equal."""
    pipe = tiny.sd()
    plain = run(pipe)
    pipe.unet.set_attn_processor(ToMeAttnProcessor.around(pipe.unet))
    with tokred.steps(pipe, policy=0.0):
        assert same(run(pipe), plain)


def test_some_modules_only():
    """Ours in one block: that one merges."""
    pipe = tiny.sd3()
    first = pipe.transformer.transformer_blocks[0].attn
    first.processor = ToMeAttnProcessor(inner=first.processor)
    out = stepped(pipe)
    whole = by_patch(tiny.sd3(), TOME)
    assert not same(out, whole) and not same(out, run(tiny.sd3()))
    assert [step.tokens_total for step in tokred.report(pipe).steps] == [64, 64]


@pytest.mark.parametrize("policy", [[(1.0, 0.5), (0.7, 0.0)], lambda u: 0.25])
def test_policy_seed_and_record(policy):
    pipe = tiny.sd()
    with tokred.patched(pipe, TOME, policy=policy, seed=3, record="tokens"):
        want = run(pipe)
    tokens = tokred.report(pipe).token_map
    pipe.unet.set_attn_processor(ToMeAttnProcessor())
    with tokred.steps(pipe, policy=policy, seed=3, record="tokens"):
        assert same(run(pipe), want)
    assert (tokred.report(pipe).token_map == tokens).all()


# --- What diffusers asks of a processor ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPES)
def test_signature_classes_and_names(kind):
    model = tiny.denoiser(PIPES[kind]())
    keys = list(model.state_dict())
    for name, mine in ToMeAttnProcessor.around(model).items():
        theirs = installed(model)[name]
        assert inspect.signature(mine.__call__) == inspect.signature(theirs.__call__)
        assert isinstance(mine, (type(theirs),)) and isinstance(mine, ToMeAttnProcessor)
        assert type(theirs).__name__ in str(type(mine)) and vars(mine) is vars(theirs)
        assert hasattr(mine, "_attention_backend") == hasattr(theirs, "_attention_backend")
        assert type(mine.tokred_inner) is type(theirs)
        again = type(mine)()
        assert type(again) is type(mine) and again.tokred_config is mine.tokred_config
    install(model, ToMeAttnProcessor.around(model))
    assert list(model.state_dict()) == keys


def test_zero_arguments():
    for cls, config in ((ToMeAttnProcessor, TOME), (ToDoAttnProcessor, TODO)):
        mine = cls()
        assert mine.tokred_config == config and mine.tokred_inner is None and isinstance(mine, cls)
        again = type(cls(config))()  # as `load_ip_adapter` does
        assert again.tokred_config == config


def test_around_ours_replaces_it():
    model = tiny.sd3().transformer
    model.set_attn_processor(ToDoAttnProcessor.around(model))
    for mine in ToMeAttnProcessor.around(model).values():
        assert type(mine.tokred_inner) is JointAttnProcessor2_0 and not isinstance(mine, ToDoAttnProcessor)


def test_a_family_of_ones_own():
    """A subclass is its config class, and what is restricted."""

    class RandomKeepAttnProcessor(AttnReducer):
        config_type = tokred.RandomKeepConfig
        refused = {"feed_forward": "it is elsewhere"}

    pipe = tiny.pixart()
    want = by_patch(pipe, tokred.RandomKeepConfig())
    pipe.transformer.set_attn_processor(RandomKeepAttnProcessor())
    assert same(stepped(pipe), want)
    with pytest.raises(ConfigError, match="feed_forward: it is elsewhere"):
        RandomKeepAttnProcessor(tokred.RandomKeepConfig(feed_forward=True))


def test_registered_for_guiders():
    """diffusers' layer-skip guiders look a processor up by its exact class."""
    helpers = pytest.importorskip("diffusers.hooks._helpers")
    mine = ToMeAttnProcessor(inner=AttnProcessor2_0())
    get = helpers.AttentionProcessorRegistry.get
    assert get(type(mine)) is get(AttnProcessor2_0)


# --- Around other processors -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [TOME, CROSS, TODO], ids=["tome", "tome-cross", "todo"])
def test_around_ip_adapter(config):
    more = ip_inputs(masks=True)
    pipe = tiny.sd()
    load_ip_adapter(pipe.unet)
    want, keys = by_patch(pipe, config, **more), list(pipe.unet.state_dict())
    cls = ToDoAttnProcessor if config is TODO else ToMeAttnProcessor
    pipe.unet.set_attn_processor(cls.around(pipe.unet, config))
    assert same(stepped(pipe, **more), want)
    assert list(pipe.unet.state_dict()) == keys
    # What diffusers does to adapters reaches the weights and the scale.
    pipe.set_ip_adapter_scale(0.0)
    off = stepped(pipe, **more)
    assert not torch.equal(off, want)
    pipe.set_ip_adapter_scale(1.0)
    assert same(stepped(pipe, **more), want)
    pipe.unet.to(torch.float64)
    mine = next(p for p in pipe.unet.attn_processors.values() if isinstance(p, IPAdapterAttnProcessor2_0))
    assert mine.to_k_ip[0].weight.dtype == torch.float64
    pipe.unet.to(torch.float32)
    assert same(stepped(pipe, **more), want)


@pytest.mark.filterwarnings("ignore")
def test_ip_adapter_loaded_over_ours():
    """It makes self-attention's processors anew by their class, and puts its own at the prompt's attention."""
    pipe = tiny.sd()
    load_ip_adapter(pipe.unet)
    want = by_patch(pipe, TOME, **ip_inputs())
    for mine in (ToMeAttnProcessor(), None):
        late = tiny.sd()
        late.unet.set_attn_processor(mine or ToMeAttnProcessor.around(late.unet))
        load_ip_adapter(late.unet)
        assert same(stepped(late, **ip_inputs()), want)
        late.unload_ip_adapter()
        assert same(stepped(late), by_patch(tiny.sd(), TOME))


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
@pytest.mark.parametrize("cls, config", [(ToMeAttnProcessor, TOME), (ToDoAttnProcessor, TODO)])
def test_around_fused_projections(kind, cls, config):
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    model.fuse_qkv_projections()
    want = by_patch(pipe, config)
    model.set_attn_processor(cls.around(model, config))
    assert same(stepped(pipe), want)


def test_fused_over_ours():
    """diffusers puts its own there, and puts ours back afterwards."""
    pipe = tiny.sd()
    pipe.unet.set_attn_processor(ToMeAttnProcessor.around(pipe.unet))
    want = stepped(pipe)
    pipe.fuse_qkv_projections()
    assert isinstance(next(iter(pipe.unet.attn_processors.values())), FusedAttnProcessor2_0)
    with pytest.raises(UnsupportedError, match="no attention processor of this library"):
        stepped(pipe)
    pipe.unfuse_qkv_projections()
    near(stepped(pipe), want, 1e-5)


def test_fused_without_inner():
    """The default processor reads the weights that fusing has left where they were."""
    pipe = tiny.sd()
    want = by_patch(pipe, TODO)
    pipe.fuse_qkv_projections()
    pipe.unet.set_attn_processor(ToDoAttnProcessor())
    near(stepped(pipe), want, 1e-5)


@pytest.mark.parametrize("change", [lambda p: p.enable_attention_slicing(1), lambda p: xformers_on(p)])
def test_replaced_by_diffusers(change):
    """Then nothing of ours is there, and `steps` says so."""
    pipe = tiny.sd()
    pipe.unet.set_attn_processor(ToMeAttnProcessor())
    change(pipe)
    with pytest.raises(UnsupportedError, match=r"xFormers.*put processors of their own"):
        stepped(pipe)


def xformers_on(pipe):
    """What `enable_xformers_memory_efficient_attention` comes to (it wants a GPU)."""
    for name in pipe.unet.attn_processors:
        pipe.unet.get_submodule(name.removesuffix(".processor")).set_processor(XFormersAttnProcessor())


@pytest.mark.parametrize("cls, config", [(ToMeAttnProcessor, CROSS), (ToDoAttnProcessor, TODO)])
def test_around_xformers_stub(cls, config, monkeypatch):
    """xFormers is not installed here: its processor runs, with a stub of its attention function."""
    calls = []

    def attention(query, key, value, attn_bias=None, op=None, scale=None):
        calls.append((query.shape[1], key.shape[1]))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)

    stub = types.SimpleNamespace(ops=types.SimpleNamespace(memory_efficient_attention=attention))
    monkeypatch.setattr(upstream, "xformers", stub)
    pipe = tiny.sd()
    want = by_patch(pipe, config)
    xformers_on(pipe)
    pipe.unet.set_attn_processor(cls.around(pipe.unet, config))
    near(stepped(pipe), want, 1e-4)
    assert ((256, 64) if cls is ToDoAttnProcessor else (128, 128)) in calls


def test_around_real_xformers():
    ops = pytest.importorskip("xformers.ops", reason="xFormers is not installed; its path is tested with a stub")
    if not torch.cuda.is_available():
        pytest.skip("xFormers runs on a GPU only; its path is tested with a stub")
    assert ops
    pipe = tiny.sd().to("cuda", torch.float16)
    want = by_patch(pipe, TOME)
    pipe.enable_xformers_memory_efficient_attention()
    pipe.unet.set_attn_processor(ToMeAttnProcessor.around(pipe.unet, TOME))
    near(stepped(pipe).float(), want.float(), 5e-2)


@pytest.mark.parametrize("inner", [AttnProcessor(), AttnProcessor2_0()], ids=["plain", "sdpa"])
def test_shared_inner(inner):
    """One instance around one instance, at all modules."""
    pipe = tiny.sdxl()
    pipe.unet.set_attn_processor(ToMeAttnProcessor(inner=inner))
    near(stepped(pipe), by_patch(tiny.sdxl(), TOME), 1e-4)


class Slotted:
    __slots__ = ()

    def __call__(self, attn, hidden_states):
        return hidden_states


@pytest.mark.parametrize("inner", [lambda attn, hidden_states: hidden_states, Slotted()])
def test_cannot_go_around(inner):
    with pytest.raises(UnsupportedError, match="ToMeAttnProcessor cannot go around a"):
        ToMeAttnProcessor(inner=inner)


# --- Backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbound", [False, True])
@pytest.mark.parametrize("cls", [ToMeAttnProcessor, ToDoAttnProcessor])
def test_backend_reaches_the_dispatcher(cls, unbound, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    backend, calls = AttentionBackendName("_native_math"), []
    math, native = _AttentionBackendRegistry._backends[backend], _AttentionBackendRegistry._active_backend

    def spy(*args, **kwargs):
        calls.append(backend)
        return math(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, spy)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", native)
    pipe = tiny.flux()
    model = pipe.transformer
    before = model.attn_processors
    model.set_attn_processor(cls() if unbound else cls.around(model))
    want = stepped(pipe)
    assert not calls
    model.set_attention_backend(backend.value)
    _AttentionBackendRegistry.set_active_backend(native)  # diffusers sets this for all models: only ours are left
    near(stepped(pipe), want, 1e-4)
    assert len(calls) == 4 * 4  # all blocks, 2 steps of 2 passes
    if not unbound:
        assert {p._attention_backend for p in before.values()} == {backend}
    model.set_attention_backend("native")
    assert same(stepped(pipe), want) and len(calls) == 16
