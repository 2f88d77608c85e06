"""First-block reuse against its definition: all blocks are run at every step, and what leaves the last one is replaced
where the first one says so."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.methods import make_config
from diffusion_tokred.testing import families, tiny
from tests.contract.helpers import PIPES, near, same
from tests.methods.caches import driver, hooks

SHORT = dict(method="firstblock", min_steps=0, warmup=2)
MIDDLE = {"sd3": 0.3, "sd3-dual": 0.3, "flux": 0.4, "pixart": 0.15, "dit": 0.2}  # thresholds that split 8 steps


def run(pipe: Any, steps: int = 8, **more: Any) -> torch.Tensor:
    return tiny.run(pipe, steps=steps, **more)


def blocks(pipe: Any) -> list[Any]:
    model = tiny.denoiser(pipe)
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


def image(out: Any) -> torch.Tensor:
    """The image's rows of what a block returned."""
    return out[-1] if isinstance(out, tuple) else out


class Defined:
    """The method by its definition, on an unpatched pipeline. `passes`: denoiser calls a step."""

    def __init__(self, pipe: Any, threshold: float, passes: int = 1, interval: int = 1000) -> None:
        self.kept: list[dict[str, Any]] = [{} for _ in range(passes)]
        self.modes: list[str] = []
        self.threshold, self.interval = threshold, interval
        first, *_, last = blocks(pipe)
        self.handles = [
            first.register_forward_hook(self.decide, with_kwargs=True),
            last.register_forward_hook(self.end),
        ]

    def decide(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        kept, step = self.kept[len(self.modes) % len(self.kept)], len(self.modes) // len(self.kept)
        self.after, added = image(out), image(out) - x
        full = step < 2 or step - kept["step"] >= self.interval
        if not full:
            change = (added - kept["added"]).abs().mean() / kept["added"].abs().mean()
            full = not change < self.threshold
        self.modes.append("full" if full else "reuse")
        if full:
            kept |= dict(step=step, added=added)

    def end(self, module: Any, args: Any, out: Any) -> Any:
        kept = self.kept[(len(self.modes) - 1) % len(self.kept)]
        if self.modes[-1] == "full":
            kept["rest"] = image(out) - self.after
            return out
        replaced = self.after + kept["rest"]
        return (*out[:-1], replaced) if isinstance(out, tuple) else replaced


def defined(kind: str, threshold: float, interval: int = 1000, **more: Any) -> tuple[torch.Tensor, list[str]]:
    pipe = PIPES[kind]()
    found = Defined(pipe, threshold, 2 if kind == "flux" else 1, interval)
    return run(pipe, **more), found.modes


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1000, 3])
@pytest.mark.parametrize("kind", MIDDLE)
def test_is_what_it_is_defined_as(kind, interval):
    """The decisions too: those of conditional and unconditional calls by themselves. A full step restarts the count."""
    for threshold in (MIDDLE[kind], 100.0):
        want, modes = defined(kind, threshold, interval)
        pipe = tokred.patch(PIPES[kind](), threshold=threshold, interval=interval, **SHORT)
        for _ in range(2):
            assert same(run(pipe), want)
            assert [step.mode for step in tokred.report(pipe).steps] == modes
        assert {"full", "reuse"} == set(modes)
    assert not torch.equal(want, run(tokred.unpatch(pipe)))


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart"])
def test_other_sizes_and_batches(kind):
    pipe = tokred.patch(PIPES[kind](), threshold=MIDDLE[kind], **SHORT)
    run(pipe)  # another run before
    for more in (dict(height=48), dict(batch=2)):
        want, modes = defined(kind, MIDDLE[kind], **more)
        assert same(run(pipe, **more), want)
        assert [step.mode for step in tokred.report(pipe).steps] == modes


@pytest.mark.parametrize("kind", MIDDLE)
def test_neutral_settings_are_dense(kind):
    want = run(PIPES[kind]())
    for more in (dict(interval=1), dict(threshold=0.0), dict(policy=0.0), dict(warmup=8), dict(min_steps=9)):
        pipe = tokred.patch(PIPES[kind](), **SHORT | dict(threshold=100.0) | more)
        assert same(run(pipe), want)
        assert {step.mode for step in tokred.report(pipe).steps} == {"full"}


def test_threshold_that_nothing_falls_below():
    """The machinery at work, and every decision is "full"."""
    want, modes = defined("sd3", 1e-6)
    pipe = tokred.patch(PIPES["sd3"](), threshold=1e-6, **SHORT)
    assert set(modes) == {"full"} and same(run(pipe), want) and same(want, run(PIPES["sd3"]()))


def test_first_block_that_adds_nothing():
    """No change of nothing can be judged: such steps are full."""
    pipe = PIPES["pixart"]()
    for module in (blocks(pipe)[0].attn1.to_out[0], blocks(pipe)[0].attn2.to_out[0], blocks(pipe)[0].ff.net[2]):
        for parameter in module.parameters():
            parameter.data.zero_()
    want = run(pipe)
    assert same(run(tokred.patch(pipe, threshold=100.0, **SHORT)), want)
    assert {step.mode for step in tokred.report(pipe).steps} == {"full"}


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_contract(kind):
    """Where all decisions are alike. A batch, or a batched guidance pair, shares its decision."""
    config = make_config(**SHORT | dict(warmup=1), threshold=100.0)
    testing.assert_contract(testing.check_method(config, {kind: PIPES[kind]}))


@pytest.mark.parametrize("kind", ["auraflow", "flux2", "qwenimage", "wan"])
def test_later_families(kind):
    """Wherever there is a stack. (What they are wrapped by is tested with the other methods on stacks.)"""
    pipe = families.BUILDERS[kind]()
    try:
        tokred.patch(pipe, threshold=100.0, **SHORT)
    except tokred.UnsupportedError:
        pytest.skip("no stack")
    want = run(tokred.patch(families.BUILDERS[kind](), method="fora", what="stack", interval=8, warmup=2, min_steps=0))
    found = run(pipe)
    assert torch.isfinite(found).all() and not torch.equal(found, want)
    assert tokred.report(pipe).flops < tokred.report(pipe).flops_dense


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart", "dit"])
def test_only_the_first_block_runs(kind):
    pipe = tokred.patch(PIPES[kind](), threshold=100.0, **SHORT)
    model = tiny.denoiser(pipe)
    ran: list[set[str]] = []
    handles: list[Any] = [model.register_forward_pre_hook(lambda *_: ran.append(set()))]
    for name, module in model.named_modules():
        if not [*module.children()]:
            handles.append(module.register_forward_hook(lambda *_, name=name: ran[-1].add(name)))
    with hooks(handles):
        run(pipe, steps=4)
    later = [name for name in ran[0] if "blocks." in name and not name.startswith("transformer_blocks.0.")]
    assert later and ran[-1] == ran[0] - {*later}


@pytest.mark.parametrize("more", [{}, dict(height=48, batch=2)], ids=str)
@pytest.mark.parametrize("kind", MIDDLE)
def test_flops_of_each_step(kind, more):
    """Ours are torch's, whatever was decided."""
    if kind == "dit":
        more = dict(batch=2)
    pipe = tokred.patch(PIPES[kind](), threshold=MIDDLE[kind], **SHORT)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        totals = [0]
        model = tiny.denoiser(pipe)
        with hooks([model.register_forward_hook(lambda *_: totals.append(counter.get_total_flops()))]):
            run(pipe, **more)
    steps = tokred.report(pipe).steps
    assert [step.flops for step in steps] == [b - a for a, b in pairwise(totals)]
    assert all((step.flops < step.flops_dense) == (step.mode == "reuse") for step in steps)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_kept_bytes(kind):
    pipe = tokred.patch(PIPES[kind](), **SHORT)
    kept: list[int] = []

    def count(*_: Any) -> None:
        kept.append(max(memory.nbytes for memory in driver(pipe)._memories.values()))

    with hooks([tiny.denoiser(pipe).register_forward_hook(count)]):
        run(pipe, steps=3)
    found = tokred.explain(pipe, height=32, width=32, num_inference_steps=8, **SHORT)
    assert kept[-1] == found.cache_bytes
    assert [step.mode for step in found.steps] == ["full"] * 2 + ["reuse"] * 6
    assert any("decides in each step" in text for text in found.warnings)


def test_record_of_tokens():
    pipe = tokred.patch(PIPES["sd3"](), threshold=MIDDLE["sd3"], record="tokens", **SHORT)
    run(pipe)
    states = tokred.report(pipe).token_map[:, 0, 0]
    modes = [step.mode for step in tokred.report(pipe).steps]
    assert [{0: "full", 2: "reuse"}[int(state.max())] for state in states] == modes


# --- compiled, and refused -------------------------------------------------------------------------------------------


def test_compiles_with_a_break(dynamo):
    """The host decides, so that the graph is broken there: the same results, and nothing is compiled anew later. In one
    graph it is refused, with the reason."""
    pipe = tokred.patch(tiny.sd3(), threshold=MIDDLE["sd3"], **SHORT)
    want = run(pipe)
    modes = [step.mode for step in tokred.report(pipe).steps]
    pipe.transformer.compile(backend="eager")
    graphs = []
    for _ in range(3):
        near(run(pipe), want, 1e-5)
        assert [step.mode for step in tokred.report(pipe).steps] == modes
        graphs.append(dynamo["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] and dynamo["graph_break"]
    pipe.transformer.compile(backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="firstblock decides on the host"):
        run(pipe)


def test_what_cannot_work():
    with pytest.raises(tokred.UnsupportedError, match="firstblock acts on stack, and this UNet2DConditionModel has"):
        tokred.patch(tiny.sd(), **SHORT)
    pipe = tiny.sd3()
    del pipe.transformer.transformer_blocks[1:]
    with pytest.raises(tokred.UnsupportedError, match="nothing is left after 1"):
        tokred.patch(pipe, **SHORT)
    pipe = tokred.patch(tiny.controlnet(tiny.sd3()), **SHORT)
    with pytest.raises(tokred.UnsupportedError, match="ControlNet"):
        run(pipe)
