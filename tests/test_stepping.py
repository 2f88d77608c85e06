"""`tokred.steps`: beginning, end and errors; copies, files and compilers."""

import copy
import gc
import re
import textwrap
import types
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError, StateError, ToDoAttnProcessor, ToMeAttnProcessor, UnsupportedError
from diffusion_tokred.processors import installed
from diffusion_tokred.testing import tiny
from tests.compat.test_adapters import ip_inputs, load_ip_adapter
from tests.contract.helpers import PIPES, Snapshot, loop, near, private_modules, run, same
from tests.test_processors import CROSS, TODO, TOME, by_patch, install, stepped

some = pytest.mark.parametrize("kind, cls", [("sd", ToMeAttnProcessor), ("sd3", ToDoAttnProcessor)])


@some
def test_outside_of_steps(kind, cls):
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    for processors in (cls.around(model), cls()):
        model.set_attn_processor(processors)
        with pytest.raises(StateError, match=rf"{cls.__name__} must be told the step.*tokred\.steps\(pipe\)"):
            run(pipe)
        stepped(pipe)
        with pytest.raises(StateError, match="must be told the step"):
            run(pipe)


@some
def test_an_exception_leaves_nothing(kind, cls):
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    model.set_attn_processor(cls())
    ready = Snapshot(model)
    want = stepped(pipe)
    handle = model.transformer_blocks[1].register_forward_hook(fail) if kind == "sd3" else fail_in(model)
    before = Snapshot(model)
    with pytest.raises(ZeroDivisionError):
        stepped(pipe)
    assert before.differences(model) == []
    handle.remove()
    with pytest.raises(ZeroDivisionError), tokred.steps(pipe):
        fail()
    assert ready.differences(model) == []
    assert same(stepped(pipe), want)


def fail(*args):
    raise ZeroDivisionError


def fail_in(unet):
    return unet.mid_block.register_forward_hook(fail)


def test_refusals():
    pipe = tiny.sd()
    unet = pipe.unet
    with pytest.raises(UnsupportedError, match="StableDiffusionPipeline has no attention processor of this library"):
        stepped(pipe)
    with pytest.raises(ConfigError, match=r"merge_ff: an attention processor does not reach"):
        ToMeAttnProcessor(tokred.ToMeConfig(merge_ff=True))
    with pytest.raises(ConfigError, match="ToMeAttnProcessor takes a ToMeConfig"):
        ToMeAttnProcessor(TODO)
    with pytest.raises(ConfigError, match=r"such as AttnProcessor2_0\(\)"):
        ToMeAttnProcessor(inner=AttnProcessor2_0)
    mixed = ToMeAttnProcessor.around(unet)
    name = next(iter(mixed))
    mixed[name] = ToDoAttnProcessor(inner=AttnProcessor2_0())
    before = unet.attn_processors
    for processors, match in (
        (mixed, "have 2 different configs"),
        (ToMeAttnProcessor(tokred.ToMeConfig(levels=(7,))), "nothing"),
        (before | {n: ToMeAttnProcessor(CROSS, p) for n, p in before.items() if "attn1" in n}, "merge_cross_attn"),
        (before | {n: ToMeAttnProcessor(TOME, p) for n, p in before.items() if "attn2" in n}, "no processor of tome"),
    ):
        install(unet, processors)
        ready = Snapshot(unet)
        with pytest.raises(UnsupportedError, match=match):
            stepped(pipe)
        assert ready.differences(unet) == []
    unet.set_attn_processor(ToMeAttnProcessor())
    with pytest.raises(ConfigError, match="record"), tokred.steps(pipe, record="everything"):
        pass
    with pytest.raises(UnsupportedError, match="has attention processors of this library"):
        tokred.patch(pipe, TOME)
    install(unet, before)
    with tokred.patched(pipe, TOME):
        unet.set_attn_processor(ToMeAttnProcessor())
        with pytest.raises(StateError, match="is patched, and has"):
            stepped(pipe)
        install(unet, before)


def test_marks_a_run_of_a_patched_denoiser():
    """Calls of a bare denoiser outside of any loop: a run for each block."""
    model = tiny.sd3().transformer
    tokred.patch(model, tokred.ToMeConfig(reuse_every=100), record="tokens")
    x, text, pooled = torch.randn(1, 16, 16, 16), torch.randn(1, 7, tiny.TEXT), torch.randn(1, tiny.POOLED)

    def call(count):
        with tokred.steps(model), torch.no_grad():
            outs = [model(x, text, pooled, torch.tensor([500.0])).sample for _ in range(count)]
        return outs, tokred.report(model)

    (first, second), report = call(2)
    assert [(step.run, step.index) for step in report.steps] == [(0, 0), (0, 1)]
    (again,), report = call(1)
    assert [(step.run, step.index) for step in report.steps] == [(1, 0)]
    assert same(again, first)
    assert same(second, first)  # the matching of the first step is kept
    with pytest.raises(ConfigError, match=r"pass them to tokred\.patch"), tokred.steps(model, seed=1):
        pass
    assert "_tokred" in vars(model)  # still patched
    tokred.unpatch(model)


@pytest.mark.parametrize("patched", [True, False])
def test_handwritten_loop(patched):
    pipe = tiny.sd()
    if patched:
        tokred.patch(pipe, TOME)
    else:
        pipe.unet.set_attn_processor(ToMeAttnProcessor())
    outs = []
    for steps in (4, 3, 4):
        with tokred.steps(pipe):
            outs.append(loop(pipe, steps=steps))
        assert len(tokred.report(pipe).steps) == steps
    assert same(outs[0], outs[2])


def test_within_a_block_within_a_block():
    """Of a pipeline, and of another that shares its denoiser."""
    pipe = tiny.sd()
    other = tiny.img2img(pipe)
    want = by_patch(other, TOME, strength=0.7, steps=3)
    first = by_patch(pipe, TOME)
    pipe.unet.set_attn_processor(ToMeAttnProcessor())
    ready = Snapshot(pipe.unet)
    with tokred.steps(pipe):
        assert same(run(pipe), first)
        with tokred.steps(other):
            assert same(run(other, strength=0.7, steps=3), want)
        assert same(run(pipe), first)
    assert ready.differences(pipe.unet) == []
    assert same(stepped(other, strength=0.7, steps=3), want)


@torch.no_grad()
def test_a_shared_module_called_from_elsewhere_is_dense():
    """Inside of the block, but not from the denoiser whose step it is."""
    pipe = tiny.sd3()
    attention = pipe.transformer.transformer_blocks[0].attn
    image, text = torch.randn(1, 64, 32), torch.randn(1, 7, 32)
    plain = attention(image, text)[0]
    pipe.transformer.set_attn_processor(ToMeAttnProcessor())
    with tokred.steps(pipe):
        run(pipe)
        assert same(attention(image, text)[0], plain)


# --- Copies, files, compilers ----------------------------------------------------------------------------------------


@some
@pytest.mark.parametrize("unbound", [False, True])
def test_deepcopy(kind, cls, unbound):
    """The copy's processors share nothing with the original's."""
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    model.set_attn_processor(cls() if unbound else cls.around(model))
    want = stepped(pipe)
    twin = copy.deepcopy(pipe)
    for mine, theirs in zip(installed(model).values(), installed(tiny.denoiser(twin)).values(), strict=True):
        assert type(mine) is type(theirs) and vars(mine) is not vars(theirs)
    assert same(stepped(twin), want)
    with tokred.steps(pipe):
        assert same(stepped(twin), want) and same(run(pipe), want)


def test_deepcopy_of_adapters():
    pipe = tiny.sd()
    load_ip_adapter(pipe.unet)
    pipe.unet.set_attn_processor(ToMeAttnProcessor.around(pipe.unet, CROSS))
    want = stepped(pipe, **ip_inputs())
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in twin.unet.parameters():
            parameter.zero_()
    assert same(stepped(pipe, **ip_inputs()), want)


def test_saved_without(tmp_path):
    pipe = tiny.sd()
    plain = run(pipe)
    pipe.unet.set_attn_processor(ToMeAttnProcessor.around(pipe.unet))
    with tokred.steps(pipe):
        pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    loaded = type(pipe).from_pretrained(tmp_path, requires_safety_checker=False, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert type(next(iter(loaded.unet.attn_processors.values()))) is AttnProcessor2_0
    near(run(loaded), plain, 1e-5)


@pytest.mark.parametrize(
    "kind, cls, config",
    [
        ("sd3", ToDoAttnProcessor, TODO),
        pytest.param("sd3", ToMeAttnProcessor, TOME, marks=pytest.mark.slow),
        pytest.param("flux", ToMeAttnProcessor, TOME, marks=pytest.mark.slow),
        pytest.param("flux", ToDoAttnProcessor, TODO, marks=pytest.mark.slow),
        pytest.param("sd", ToMeAttnProcessor, CROSS, marks=pytest.mark.slow),
        pytest.param("sd", ToDoAttnProcessor, TODO, marks=pytest.mark.slow),
    ],
)
def test_compiled(kind, cls, config, dynamo):
    """No graph break, and later blocks find what the first compiled."""
    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    model.set_attn_processor(cls(config))
    want = stepped(pipe)
    model.compile(fullgraph=True, backend="eager")
    near(stepped(pipe), want, 1e-5)
    first = dynamo["stats"]["unique_graphs"]
    assert first and not dynamo["graph_break"]
    for _ in range(2):
        near(stepped(pipe), want, 1e-5)
    assert dynamo["stats"]["unique_graphs"] == first


def test_nothing_is_kept_alive():
    """Without our processors, no tap and no place is left, though the model lives on."""
    from diffusion_tokred import processors

    gc.collect()
    taps, places = len(private_modules()), len(processors._PLACES)
    pipe = tiny.sd3()
    before = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(ToDoAttnProcessor.around(pipe.transformer))
    stepped(pipe)
    assert len(private_modules()) > taps
    pipe.transformer.set_attn_processor(before)
    gc.collect()
    assert len(private_modules()) == taps and len(processors._PLACES) == places


class Shown:
    """The `pipe` of the documents: one of either kind."""

    def __init__(self):
        self._pipe = tiny.sd()
        self.unet, self.transformer, self.scheduler = self._pipe.unet, tiny.dit().transformer, self._pipe.scheduler

    def __call__(self, prompt):
        return types.SimpleNamespace(images=run(self._pipe))


def test_what_is_shown_runs():
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    section = text.split("\n## As attention processors\n")[1].split("\n## ")[0]
    one, each, mark = (textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", section, re.S))
    pipe = Shown()
    space = dict(pipe=pipe, prompt="", tokred=tokred)
    untouched, plain = Snapshot(pipe.unet), pipe("").images[0]
    exec(one, space)
    assert untouched.differences(pipe.unet) == [] and not torch.equal(space["image"], plain)
    exec(each, space)
    assert all(isinstance(p, ToMeAttnProcessor) for p in installed(pipe.transformer).values())
    tokred.patch(pipe.unet, TOME)
    exec(mark, space)
