"""Contract 6 and 8: what cannot work is refused, with what was found and what is allowed, and nothing has changed."""

import pytest
import torch
from diffusers import AutoencoderKL

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import Snapshot, dense, loop, patch, reduced, run, same

# (pipeline, arguments, exception, words of the message: found and allowed)
REFUSED = [
    ("sd", dict(), tokred.ConfigError, ["method", "tome", "todo"]),
    ("sd", dict(method="tom"), tokred.ConfigError, ["'tom'", "did you mean 'tome'", "todo"]),
    ("sd", dict(method="tome", ration=0.5), tokred.ConfigError, ["'ration'", "did you mean 'ratio'", "merge_ff"]),
    ("sd", dict(method="todo", ratio=0.5), tokred.ConfigError, ["todo", "'ratio'", "factor", "levels"]),
    ("sd", dict(method="tome", ratio="0.5"), tokred.ConfigError, ["ratio", "float", "'0.5'"]),
    ("sd", dict(method="tome", ratio=True), tokred.ConfigError, ["ratio", "True"]),
    ("sd", dict(method="tome", ratio=-0.1), tokred.ConfigError, ["ratio", "-0.1"]),
    ("sd", dict(method="tome", ratio=float("nan")), tokred.ConfigError, ["ratio", "nan"]),
    ("sd", dict(method="tome", ratio=0.76), tokred.ConfigError, ["0.76", "0.75", "2x2"]),
    ("sdxl", dict(method="tome", ratio=0.6, sx=2, sy=1), tokred.ConfigError, ["0.6", "0.5", "1x2"]),
    ("sd", dict(method="tome", sx=1, sy=1), tokred.ConfigError, ["sx=1", "sx=2"]),
    ("sd", dict(method="tome", sx=0), tokred.ConfigError, ["sx", "0", "[1, 64]"]),
    ("sd", dict(method="tome", share_cfg=True), tokred.ConfigError, ["share_cfg", "reuse_every"]),
    ("sd", dict(method="tome", merge_attn=False), tokred.ConfigError, ["merge_attn", "merge_cross_attn", "merge_ff"]),
    ("sd", dict(method="tome", reuse_every=-1), tokred.ConfigError, ["reuse_every", "-1"]),
    ("sd", dict(method="tome", levels="0"), tokred.ConfigError, ["levels", "(0, 1)"]),
    ("sd", dict(method="tome", levels=(-1,)), tokred.ConfigError, ["levels", "-1"]),
    ("sd", dict(method="todo", mode="cubic"), tokred.ConfigError, ["mode", "'cubic'", "'nearest'", "'area'"]),
    ("sd", dict(method="todo", factor=0), tokred.ConfigError, ["factor", "0"]),
    ("sd", dict(method="todo", factor=1.5), tokred.ConfigError, ["factor", "int", "1.5"]),
    (
        "sd",
        dict(method="tome", levels=(7,)),
        tokred.UnsupportedError,
        ["UNet2DConditionModel", "levels=(7,)", "level 0"],
    ),
    ("sdxl", dict(method="todo", levels=(2, 3)), tokred.UnsupportedError, ["level 0: ", "level 1: "]),
    ("sd3", dict(method="tome", levels=(1,)), tokred.UnsupportedError, ["SD3Transformer2DModel", "level 0: "]),
    (
        "sd3",
        dict(method="tome", merge_attn=False, merge_cross_attn=True),
        tokred.UnsupportedError,
        ["matches nothing", "attention, feed_forward"],
    ),
    ("sd", dict(method="tome", levels=()), tokred.UnsupportedError, ["matches nothing", "level 0"]),
    ("sd", dict(method="tome", policy="fast"), tokred.ConfigError, ["policy", "str"]),
    ("sd", dict(method="tome", policy=[(0.2, 0.5), (0.9, 0.3)]), tokred.ConfigError, ["descending", "0.9"]),
    ("sd", dict(method="tome", policy=[(1.0, 0.9)]), tokred.ConfigError, ["0.9", "0.75"]),
    ("sd", dict(method="tome", policy=[(1.0, 0.5, "reuse")]), tokred.ConfigError, ["'reuse'", "reduce"]),
    ("sd3", dict(method="fora", policy=[(1.0, 0.5, "reuse")]), tokred.ConfigError, ["'reuse'", "ratio is 1", "0.5"]),
    ("sd", dict(method="tome", policy=[(1.0, 0.5, "off")]), tokred.ConfigError, ["'off'", "reduce"]),
    ("sd", dict(method="todo", policy=0.5), tokred.ConfigError, ["0.5", "0.75"]),
    ("sd", dict(method="tome", policy=1.0), tokred.ConfigError, ["1"]),
    ("sd", dict(method="tome", record="all"), tokred.ConfigError, ["'all'", "'time'", "'tokens'"]),
    ("sd", dict(method="tome", seed="a"), tokred.ConfigError, ["seed", "'a'"]),
    ("sd", dict(config=dict(ratio=0.5)), tokred.ConfigError, ["ToMeConfig", "method="]),
    ("sd", dict(config="tome"), tokred.ConfigError, ["'tome'", "method="]),
    ("sd", dict(config=tokred.ToMeConfig(), ratio=0.5), tokred.ConfigError, ["ratio", "ToMeConfig"]),
    ("sd", dict(config=tokred.ToMeConfig(), method="todo"), tokred.ConfigError, ["'todo'", "'tome'"]),
]


@pytest.mark.parametrize("kind, arguments, error, words", REFUSED, ids=lambda v: str(v)[:60])
def test_refused_with_reason_and_unchanged(kind, arguments, error, words):
    pipe = tiny.BUILDERS[kind]()
    before = Snapshot(tiny.denoiser(pipe))
    with pytest.raises(error) as found:
        tokred.patch(pipe, **arguments)
    message = str(found.value)
    assert not [word for word in words if word not in message], message
    assert isinstance(found.value, ValueError) and "\n" not in message  # one line, for the command line
    assert before.differences(tiny.denoiser(pipe)) == []


def test_a_refused_patch_keeps_the_old_one():
    pipe = patch(tiny.sd(), "sd", "tome")
    before = Snapshot(pipe.unet)
    for arguments in (dict(method="tome", ratio=0.9), dict(method="todo", levels=(9,)), dict(method="x")):
        with pytest.raises(ValueError):
            tokred.patch(pipe, **arguments)
    assert before.differences(pipe.unet) == []
    assert same(run(pipe), reduced("sd", "tome"))


class Holder:
    """A pipeline-like thing around any module."""

    def __init__(self, module):
        self.unet = module


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda: torch.nn.Linear(4, 4), lambda: tiny.sd().vae, lambda: torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1))],
    ids=["Linear", "AutoencoderKL", "Sequential"],
)
def test_unknown_architecture(make, wrapped):
    module = make()
    before = Snapshot(module)
    with pytest.raises(tokred.UnsupportedError) as found:
        tokred.patch(Holder(module) if wrapped else module, method="tome")
    for word in (type(module).__name__, "UNet2DConditionModel", "SD3Transformer2DModel"):
        assert word in str(found.value)
    assert before.differences(module) == []


@pytest.mark.parametrize("target", [None, 3, "sd", object(), Holder(None)], ids=lambda v: type(v).__name__)
def test_no_denoiser(target):
    with pytest.raises(tokred.UnsupportedError, match=rf"{type(target).__name__}.*unet.*transformer"):
        tokred.patch(target, method="tome")


def test_vae_is_no_denoiser():
    assert isinstance(tiny.sd().vae, AutoencoderKL)
    with pytest.raises(tokred.UnsupportedError, match="AutoencoderKL is not supported"):
        tokred.patch(tiny.sd().vae, method="todo")


@pytest.mark.parametrize(
    "kind, options, size",
    [
        ("sd", dict(method="tome", sx=16, sy=16, levels=(1,)), 32),
        ("sd3", dict(method="tome", sx=4, sy=12), 32),
        ("sd", dict(method="todo", factor=9, levels=(1,)), 32),
        ("sd3", dict(method="todo", factor=9), 32),
        ("sdxl", dict(method="tome", levels=(1,), sx=8, sy=8), 32),
    ],
    ids=str,
)
def test_grid_smaller_than_a_cell(kind, options, size):
    """Known only when the model runs: an error that names the grid; after it the model works at a larger size."""
    pipe = tiny.BUILDERS[kind]()
    before = Snapshot(tiny.denoiser(pipe))
    tokred.patch(pipe, **options)
    side = {"sd": 8, "sd3": 8, "sdxl": 4}[kind]
    with pytest.raises(ValueError, match=rf"{side} x {side}"):
        run(pipe)
    assert torch.isfinite(run(pipe, height=96, width=96, steps=1)).all()
    tokred.unpatch(pipe)
    assert before.differences(tiny.denoiser(pipe)) == []
    assert same(run(pipe), dense(kind))


def test_odd_grids_work():
    """Sides that do not divide by the cell or by the number of downsamplings: less merging, no error."""
    for kind in ("sd", "sdxl"):
        for options in (dict(method="tome", levels=(0, 1)), dict(method="todo", levels=(0, 1), mode="area")):
            pipe = tokred.patch(tiny.BUILDERS[kind](), **options)
            plain = loop(tiny.BUILDERS[kind](), steps=1, size=42)  # 21 x 21 latents: 21, 11, 6 tokens a side
            out = loop(pipe, steps=1, size=42)
            assert torch.isfinite(out).all() and not torch.equal(out, plain)


def test_more_than_an_odd_grid_has():
    """5 x 5 tokens have 4 complete cells and 21 sources, of which 18 go; of 3 x 3 one is a destination and 6 go."""
    for size in (10, 6):
        pipe = tokred.patch(tiny.sd3() if size == 10 else tiny.sd(), method="tome", ratio=0.75)
        assert torch.isfinite(loop(pipe, steps=1, size=2 * size if size == 10 else size)).all()
        assert tokred.report(tokred.unpatch(pipe)).steps[0].tokens_computed % (7 if size == 10 else 3) == 0


def test_policy_that_needs_noise_outside_of_a_loop():
    pipe = tokred.patch(tiny.sd(), method="tome", policy=[(0.9, 0.5), (0.5, 0.0)])
    data = tiny.inputs(pipe)
    with torch.no_grad(), pytest.raises(tokred.UnsupportedError, match="noise level"):
        pipe.unet(torch.randn(1, 4, 16, 16), 500, data["prompt_embeds"])
    tokred.unpatch(pipe)
    assert same(run(pipe), dense("sd"))


def test_builtin_cache_and_parallelism_are_refused():
    pipe = tiny.sd3()
    before = Snapshot(pipe.transformer)
    for name, words in (("is_cache_enabled", "disable_cache"), ("_parallel_config", "parallelism")):
        had = vars(pipe.transformer).get(name, ...)
        vars(pipe.transformer)[name] = True
        try:
            with pytest.raises(tokred.UnsupportedError, match=words):
                tokred.patch(pipe, method="tome")
        finally:
            if had is ...:
                del vars(pipe.transformer)[name]
            else:
                vars(pipe.transformer)[name] = had
    assert before.differences(pipe.transformer) == []


def test_gradients():
    """Contract 7: may be refused. They work: the patched model can be differentiated, or says that it cannot."""
    pipe = tokred.patch(tiny.sd(), method="tome")
    data = tiny.inputs(pipe)
    x = torch.randn(1, 4, 16, 16, requires_grad=True)
    pipe.unet(x, 500, data["prompt_embeds"]).sample.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def test_unknown_keyword_of_from_dict():
    data = tokred.ToMeConfig(ratio=0.25, levels=(0, 1)).to_dict()
    assert tokred.MethodConfig.from_dict(data) == tokred.ToMeConfig(ratio=0.25, levels=(0, 1))
    with pytest.raises(tokred.ConfigError, match="version"):
        tokred.MethodConfig.from_dict(data | {"_version": 99})
    with pytest.raises(tokred.ConfigError, match="did you mean 'ratio'"):
        tokred.MethodConfig.from_dict(data | {"ratoi": 1})
    with pytest.raises(tokred.ConfigError, match="unknown method"):
        tokred.MethodConfig.from_dict({"_version": 1, "_type": "nothing"})


@pytest.mark.parametrize(
    ("policy", "says"),
    [(lambda u: (0.5, "reuse"), "no mode 'reuse'"), (lambda u: 0.9 if u < 0.3 else 0.5, r"not in \[0, 0\.75\]")],
    ids=["mode", "ratio"],
)
def test_a_function_is_checked_like_points(policy, says):
    pipe = tiny.sd3()
    with pytest.raises(tokred.ConfigError, match=says):
        tokred.patch(pipe, method="tome", policy=policy)
    assert "_tokred" not in vars(pipe.transformer)


def test_a_function_that_hides_it_is_told_in_the_run():
    pipe = tokred.patch(
        tiny.sd3(), method="tome", policy=lambda u: 0.9 if u not in {i / 100 for i in range(101)} else 0.5
    )
    with pytest.raises(tokred.ConfigError, match=r"0\.9 is not in"):
        run(pipe, steps=3)


def test_a_grid_that_is_too_small_is_told():
    pipe = tokred.patch(tiny.sd3(), method="tome", sx=16, sy=16)
    with pytest.raises(tokred.ConfigError, match=r"tome at .*: a grid of 8 x 8 tokens holds no complete cell"):
        run(pipe)
