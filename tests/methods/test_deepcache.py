"""DeepCache against its definition: the UNet is run whole at every step, and what comes up from the inner part is
replaced, between full steps, by what came up at the last one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, T2IAdapter, UNet2DConditionModel
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.methods import make_config
from diffusion_tokred.testing import tiny
from tests.compat.test_adapters import ip_inputs, load_ip_adapter
from tests.contract.helpers import near, same
from tests.methods.caches import driver, hooks, modes

SHORT = dict(method="deepcache", min_steps=0)
BRANCHES = {"sd": range(8), "sdxl": range(6)}  # one for each skip


def run(pipe: Any, steps: int = 5, **more: Any) -> torch.Tensor:
    return tiny.run(pipe, steps=steps, **more)


def defined(pipe: Any, branch: int, interval: int = 3, **more: Any) -> torch.Tensor:
    """DeepCache by its definition, on an unpatched pipeline."""
    unet, calls = tiny.denoiser(pipe), [-1]
    resnets = [resnet for block in unet.up_blocks for resnet in block.resnets][::-1]  # by the skip that each uses
    before = [*resnets[1:], unet.mid_block.resnets[-1]]
    kept: list[torch.Tensor] = []

    def count(*_: Any) -> None:
        calls[0] += 1

    def exchange(module: Any, args: Any) -> Any:
        rows = args[0].clone()  # what comes up, and the skip
        inner = rows[:, : before[branch].out_channels]
        if calls[0] % interval == 0:
            kept[:] = [inner.clone()]
        inner.copy_(kept[0])
        return (rows, *args[1:])

    with hooks([unet.register_forward_pre_hook(count), resnets[branch].register_forward_pre_hook(exchange)]):
        return run(pipe, **more)


def adapter(pipe: Any) -> Any:
    """The T2I-Adapter pipeline around `pipe`, with an adapter whose outputs are not zero."""
    torch.manual_seed(5)
    net = T2IAdapter(3, [32, 32, 64, 64], num_res_blocks=1, downscale_factor=2).eval()
    parts = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    made = StableDiffusionAdapterPipeline(
        **parts, adapter=net, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def freeu(pipe: Any) -> Any:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    return pipe


def ip_adapter(pipe: Any) -> Any:
    load_ip_adapter(pipe.unet)
    return pipe


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, branch", [(kind, branch) for kind in BRANCHES for branch in BRANCHES[kind]])
def test_is_what_it_is_defined_as(kind, branch):
    want = defined(tiny.BUILDERS[kind](), branch)
    pipe = tokred.patch(tiny.BUILDERS[kind](), branch=branch, **SHORT)
    assert same(run(pipe), want)
    assert modes(pipe) == ["full", "reuse", "reuse", "full", "reuse"]
    assert not torch.equal(want, run(tokred.unpatch(pipe)))


@pytest.mark.parametrize("size", [(40, 48), (48, 32)], ids=str)  # 20 x 24 latents, then 10 x 12, 5 x 6, 3 x 3
@pytest.mark.parametrize("kind, branch", [("sd", 2), ("sd", 5), ("sdxl", 1)])
def test_other_sizes_and_batches(kind, branch, size):
    height, width = size
    pipe = tokred.patch(tiny.BUILDERS[kind](), branch=branch, **SHORT)
    run(pipe)  # another run before
    for batch in (1, 2):
        want = defined(tiny.BUILDERS[kind](), branch, height=height, width=width, batch=batch)
        assert same(run(pipe, height=height, width=width, batch=batch), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("branch", [0, 3, 4])
@pytest.mark.parametrize(
    "variant, more",
    [
        (tiny.img2img, dict(strength=0.8)),
        (tiny.inpaint, dict(strength=0.8)),
        (tiny.controlnet, {}),
        (adapter, {}),
        (freeu, {}),
        (ip_adapter, ip_inputs()),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_variants(variant, more, branch):
    """Beside what else is put on a UNet. The adapters' residuals are added to skips that are left out, too."""
    want = defined(variant(tiny.sd()), branch, **more)
    assert not torch.equal(want, run(variant(tiny.sd()), **more))
    pipe = tokred.patch(variant(tiny.sd()), branch=branch, **SHORT)
    assert same(run(pipe, **more), want)
    assert same(run(pipe, **more), want)


@pytest.mark.parametrize("variant", [tiny.controlnet, adapter, freeu], ids=lambda f: f.__name__)
@pytest.mark.parametrize("branch", [1, 7])
def test_what_others_add_is_not_kept(variant, branch):
    """They write into what a module returned, at the middle too: at the next step it is not there twice."""
    pipe = tokred.patch(variant(tiny.sd()), branch=branch, interval=4, **SHORT)
    seen: list[torch.Tensor] = []

    def look(*_: Any) -> None:
        slot = next(iter(driver(pipe)._memories.values())).slots[driver(pipe).sites[0].name]
        seen.append(slot.factors[0].clone())

    with hooks([pipe.unet.register_forward_hook(look)]):
        run(pipe, steps=4)
    assert all(torch.equal(other, seen[0]) for other in seen[1:]) and len(seen) == 4


def test_controlnet_xl():
    want = defined(tiny.controlnet(tiny.sdxl()), 3)
    assert same(run(tokred.patch(tiny.controlnet(tiny.sdxl()), branch=3, **SHORT)), want)


@pytest.mark.parametrize("kind, branch", [("sd", 0), ("sd", 7), ("sdxl", 4)])
def test_interval_of_one_is_dense(kind, branch):
    want = run(tiny.BUILDERS[kind]())
    for more in (dict(interval=1), dict(policy=0.0), dict(min_steps=6), dict(warmup=5)):
        pipe = tokred.patch(tiny.BUILDERS[kind](), **SHORT | dict(branch=branch) | more)
        assert same(run(pipe), want)
        assert tokred.report(pipe).flops == tokred.report(pipe).flops_dense


@pytest.mark.parametrize("kind, options", [("sd", dict(branch=2, order=1)), ("sdxl", dict(branch=1))], ids=str)
def test_contract(kind, options):
    """Repetition, batches, other runs before, exceptions, passes, copies, undo."""
    config = make_config(**SHORT, interval=2, **options)
    testing.assert_contract(testing.check_method(config, [kind]))


def test_compiles(dynamo):
    """Two graphs a size, and no third."""
    pipe, other = (tokred.patch(tiny.sdxl(), branch=1, interval=2, **SHORT) for _ in range(2))
    pipe.unet.compile(fullgraph=True, backend="eager")
    for sizes, graphs in (((32, 32), 2), ((48, 32), 4), ((32, 32), 4)):
        size = dict(zip(("height", "width"), sizes, strict=True))
        near(run(pipe, **size), run(other, **size), 1e-5)
        assert dynamo["stats"]["unique_graphs"] == graphs and not dynamo["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("kind, branch, order", [("sd", 0, 1), ("sd", 3, 0), ("sd", 7, 1), ("sdxl", 4, 1)])
def test_compiles_everywhere(kind, branch, order):
    config = make_config(**SHORT, branch=branch, order=order, interval=2)
    testing.assert_contract(testing.check_method(config, [kind], ["compiled"]))


# --- forecasts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def calls(unet: Any, count: int) -> list[torch.Tensor]:
    """The same call of a UNet, again and again; what the middle returns is a plane that grows with each."""
    torch.manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, tiny.TEXT)
    index = [-1]
    unet.register_forward_pre_hook(lambda *_: index.__setitem__(0, index[0] + 1))
    unet.mid_block.resnets[-1].register_forward_hook(lambda module, args, out: out * 0 + index[0])
    return [unet(sample, 500, text, return_dict=False)[0] for _ in range(count)]


def test_linear_features_are_forecast_exactly():
    options = dict(SHORT, branch=7, order=1, damping=1.0)
    want, found = calls(tiny.sd().unet, 9), calls(tokred.patch(tiny.sd().unet, **options), 9)
    for step in (0, 3, 4, 5, 6, 7, 8):  # from the second full step on
        near(found[step], want[step], 1e-6)
    assert (found[2] - want[2]).abs().max() > 1e-3
    reused = calls(tokred.patch(tiny.sd().unet, **dict(options, order=0)), 9)
    assert (reused[5] - want[5]).abs().max() > 1e-3
    asked = tokred.patch(tiny.sd().unet, **options, policy=[(1.0, 1.0, "reuse")])
    assert all(torch.equal(*pair) for pair in zip(calls(asked, 9), reused, strict=True))
    half = calls(tokred.patch(tiny.sd().unet, **dict(options, damping=0.5)), 9)
    kept = calls(tokred.patch(tiny.sd().unet, **dict(options, damping=0.0)), 9)
    for step in (4, 5, 7, 8):  # what a linear feature misses is linear in the damping, up to what lies behind it
        assert (half[step] - want[step]).norm() < 0.75 * (kept[step] - want[step]).norm()
    assert all(torch.equal(*pair) for pair in zip(kept, reused, strict=True))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_constant_features_are_forecast_exactly(order):
    unet = tiny.sd().unet
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, tiny.TEXT)
    with torch.no_grad():
        want = unet(sample, 500, text, return_dict=False)[0]
        tokred.patch(unet, branch=1, order=order, **SHORT)
        for _ in range(8):
            assert same(unet(sample, 500, text, return_dict=False)[0], want)
    assert unet._tokred.report.steps[-1].mode == ("forecast" if order else "reuse")


# --- what is computed ------------------------------------------------------------------------------------------------

OUTER = {  # tiny.sd: a layer and a downsampler a block on the way down, two layers a block on the way up
    0: ("up_blocks.3.resnets.1", "up_blocks.3.attentions.1"),
    1: ("down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "up_blocks.3.resnets.0", "up_blocks.3.attentions.0"),
    2: ("down_blocks.0.downsamplers", "up_blocks.2.resnets.1", "up_blocks.2.attentions.1", "up_blocks.2.upsamplers"),
    3: ("down_blocks.1.resnets.0", "down_blocks.1.attentions.0", "up_blocks.2.resnets.0", "up_blocks.2.attentions.0"),
}  # fmt: skip


@pytest.mark.parametrize("variant", [tiny.controlnet, adapter, freeu, lambda pipe: pipe])
def test_stand_ins_have_samples_only_where_something_is_added(variant):
    """Joining them would take its time."""
    pipe = tokred.patch(variant(tiny.sd()), interval=5, **SHORT)
    seen, middle = [], tiny.denoiser(pipe).mid_block
    inner = middle.forward

    def watched(*args, **kwargs):
        seen.append(len(found := inner(*args, **kwargs)))
        return found

    middle.forward = watched
    run(pipe)
    added = variant in (tiny.controlnet, adapter, freeu)
    assert seen == [2, *[2 if added else 0] * 4]


@pytest.mark.parametrize("branch", [0, 3])
def test_hooks_of_others_find_the_right_shapes(branch):
    """Torch's, on what is left out: what they add is of no effect there, as it is not kept."""
    pipe, want = tiny.sd(), run(tokred.patch(tiny.sd(), branch=branch, **SHORT), batch=2)
    tokred.patch(pipe, branch=branch, **SHORT)
    noise, shapes = torch.zeros(4, 1, 1, 1), set()

    def add(module, args, output):
        shapes.add(len(output))
        return output + noise

    tiny.denoiser(pipe).mid_block.register_forward_hook(add)
    assert same(run(pipe, batch=2), want) and shapes == {4}


@pytest.mark.parametrize("branch", OUTER)
def test_nothing_inside_runs(branch):
    pipe = tokred.patch(tiny.sd(), branch=branch, **SHORT)
    ran: list[set[str]] = []
    handles: list[Any] = [pipe.unet.register_forward_pre_hook(lambda *_: ran.append(set()))]
    for name, module in pipe.unet.named_modules():
        if not [*module.children()]:
            handles.append(module.register_forward_hook(lambda *_, name=name: ran[-1].add(name)))
    with hooks(handles):
        run(pipe, steps=4)
    assert ran[0] == ran[3] and ran[1] == ran[2]
    ends = ["conv_in", "conv_out", "conv_norm_out", "conv_act", "time_"]
    ends += [name for outer in range(branch + 1) for name in OUTER[outer]]
    assert ran[1] == {name for name in ran[0] if name.startswith(tuple(ends))}


@pytest.mark.parametrize("options", [{}, dict(height=40, width=56), dict(batch=2, guidance=1.0)], ids=str)
@pytest.mark.parametrize("kind, branch", [("sd", 0), ("sd", 3), ("sd", 6), ("sd", 7), ("sdxl", 0), ("sdxl", 2)])
def test_flops_of_each_step(kind, branch, options):
    """Ours are torch's."""
    pipe = tokred.patch(tiny.BUILDERS[kind](), branch=branch, **SHORT)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        totals = [0]
        with hooks([pipe.unet.register_forward_hook(lambda *_: totals.append(counter.get_total_flops()))]):
            run(pipe, steps=4, **options)
    steps = tokred.report(pipe).steps
    assert [step.flops for step in steps] == [b - a for a, b in pairwise(totals)]
    assert steps[1].flops < steps[0].flops == steps[0].flops_dense


@pytest.mark.parametrize("branch, share", [(0, 0.0787), (1, 0.2243), (3, 0.4699)])
def test_flops_of_sd15(branch, share):
    """At its real size, on fake tensors: torch's count, and the share of a whole step that is left."""
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        tokred.patch(unet, branch=branch, **SHORT)
        sample, text, found = torch.zeros(2, 4, 64, 64), torch.zeros(2, 77, 768), []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                unet(sample, torch.full((2,), 5), text)
            found.append(counter.get_total_flops())
    assert found == [step.flops for step in unet._tokred.report.steps]
    assert found[1] / found[0] == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(
    "kind, branch, order", [("sd", 0, 0), ("sd", 3, 1), ("sd", 7, 0), ("sdxl", 0, 1), ("sdxl", 5, 0)]
)
def test_kept_bytes(kind, branch, order):
    """`stored` is what is kept, and the budget is held."""
    options = dict(SHORT, branch=branch, order=order)
    pipe = tokred.patch(tiny.BUILDERS[kind](), **options)
    kept: list[int] = []

    def count(*_: Any) -> None:
        kept.append(sum(memory.nbytes for memory in driver(pipe)._memories.values()))

    with hooks([pipe.unet.register_forward_hook(count)]):
        run(pipe, steps=4)
    said = tokred.explain(pipe, height=32, width=32, **options).cache_bytes
    assert 0 <= kept[-1] - said <= 100  # and the zeros that stand-ins are made of
    with pytest.raises(tokred.ConfigError, match="cache_budget"):
        run(tokred.patch(pipe, cache_budget=said - 1, **options))
    run(tokred.patch(pipe, cache_budget=said, **options))


def test_record_of_tokens():
    pipe = tokred.patch(tiny.sd(), order=1, record="tokens", **SHORT)
    run(pipe)
    states = tokred.report(pipe).token_map[:, 0, 0]
    assert [int(state.max()) for state in states] == [0, 3, 3, 0, 3] and (states == states[:, :1, :1]).all()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_branch_of_another_model():
    with pytest.raises(tokred.ConfigError, match=r"branch=8 .* 0 to 7"):
        tokred.patch(tiny.sd(), branch=8, **SHORT)
    with pytest.raises(tokred.UnsupportedError, match="deepcache acts on deep, and this SD3Transformer2DModel has"):
        tokred.patch(tiny.sd3(), **SHORT)


def test_unet_without_a_middle():
    """Distilled UNets have none: the innermost branch is one less deep."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=tiny.TEXT,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, mid_block_type=None,
    ).eval()  # fmt: skip
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, tiny.TEXT)
    with torch.no_grad():
        want = unet(sample, 500, text, return_dict=False)[0]
        for branch in range(3):
            tokred.patch(unet, branch=branch, **SHORT)
            outs = [unet(sample, 500, text, return_dict=False)[0] for _ in range(2)]
            assert all(same(out, want) for out in outs) and unet._tokred.report.steps[-1].mode == "reuse"
    with pytest.raises(tokred.ConfigError, match="0 to 2"):
        tokred.patch(unet, branch=3, **SHORT)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_a_step_that_was_broken_off(error):
    """A loop that goes on all the same finds nothing stale."""
    pipe = tokred.patch(tiny.sd(), **SHORT)
    unet, scheduler = pipe.unet, pipe.scheduler
    scheduler.set_timesteps(4)
    first, second = scheduler.timesteps[:2]
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, tiny.TEXT)

    def fail(*_: Any) -> None:
        raise error

    with torch.no_grad():
        with hooks([unet.mid_block.register_forward_pre_hook(fail)]), pytest.raises(error):
            unet(sample, first, text)
        if error is RuntimeError:
            unet(sample, second, text)
            assert unet._tokred.report.steps[-1].mode == "full"
        else:  # this one no hook sees
            with pytest.raises(tokred.StateError, match="begin a new run"):
                unet(sample, second, text)
    assert same(run(pipe), run(tokred.patch(tiny.sd(), **SHORT)))
