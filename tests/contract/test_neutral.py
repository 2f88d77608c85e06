"""Contract 0 and 1: what `ratio` means, and that ratio 0 is the dense model."""

import itertools

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import PIPES, dense, each, near, options, patch, reduced, run, same

KINDS = pytest.mark.parametrize("kind", PIPES)


def test_ratio_is_the_share_not_computed():
    assert tokred.ToMeConfig(ratio=0.3).keep == 0.7
    assert tokred.ToDoConfig(factor=2).share == 0.75
    assert tokred.ToDoConfig(factor=4).keep == 1 / 16
    assert tokred.ToDoConfig(factor=1).share == 0


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@KINDS
def test_report_counts_tome(kind, ratio):
    pipe = tokred.patch(PIPES[kind](), method="tome", ratio=ratio)
    run(pipe, guidance=1.0)
    report = tokred.report(pipe)
    assert len(report.steps) == 2
    for step in report.steps:
        assert (step.mode, step.ratio) == ("reduce", ratio)
        assert step.tokens_computed == pytest.approx(step.tokens_total * (1 - ratio))
        assert step.flops < step.flops_dense
    assert report.tokens_saved == pytest.approx(ratio)


@KINDS
def test_report_counts_todo(kind):
    pipe = tokred.patch(PIPES[kind](), method="todo", factor=2)
    run(pipe, guidance=1.0)
    assert tokred.report(pipe).tokens_saved == 0.75
    assert [step.ratio for step in tokred.report(pipe).steps] == [0.75, 0.75]


@KINDS
def test_rows_that_reach_the_attention(kind):
    """The report's word is not taken for it: count the rows of the attention's input."""
    pipe = PIPES[kind]()
    rows = []
    # Under our wrapper: a processor's own input.
    for _, module in tiny.denoiser(pipe).named_modules():
        if hasattr(module, "to_q"):
            module.to_q.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[1]))
    run(pipe, steps=1)
    before, rows[:] = list(rows), []
    tokred.patch(pipe, method="tome", ratio=0.25)
    run(pipe, steps=1)
    text = 7 if kind == "flux" else 0  # in the single blocks, and never merged
    largest = max(before) - text
    assert len(rows) == len(before)
    changed = [(a, b) for a, b in zip(before, rows, strict=True) if a != b]
    merged = {(largest, largest * 3 // 4), (largest + text, largest * 3 // 4 + text)}
    assert changed and set(changed) <= merged
    if kind in ("sd3", "dit", "flux"):  # one level, and no attention to the prompt alone
        assert len(changed) == len(rows)


@each
def test_every_config_does_something(kind, config):
    out = reduced(kind, config)
    assert torch.isfinite(out).all()
    assert (out - dense(kind)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "neutral",
    [
        dict(method="tome", ratio=0),
        dict(method="tome", ratio=0.0, merge_ff=True, reuse_every=2, share_cfg=True),
        dict(method="tome", policy=0),
        dict(method="tome", policy=[(0.0, 0.5)]),  # never reached: the noise is above 0 in every call
        dict(method="todo", factor=1),
        dict(method="todo", factor=1, mode="area"),
        dict(method="todo", policy=0.0),
    ],
    ids=str,
)
@KINDS
def test_neutral_settings_are_bit_equal(kind, neutral):
    if kind == "flux" and neutral.get("mode") == "area":
        pytest.skip("refused on rotary models: keys can be chosen, not averaged")
    pipe = tokred.patch(PIPES[kind](), **neutral)
    assert same(run(pipe), dense(kind))
    assert all(step.mode == "full" and step.tokens_computed == step.tokens_total for step in tokred.report(pipe).steps)
    assert tokred.report(pipe).flops == tokred.report(pipe).flops_dense


class AllRows:
    """A policy that forces the machinery on, with nothing left out."""

    calls = 0

    def at(self, *args):
        self.calls += 1
        return "reduce", 0.0


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@each
def test_machinery_with_all_rows(kind, config, dtype, atol):
    pipe = PIPES[kind]().to(dtype)
    want = run(pipe)
    patch(pipe, kind, config)
    policy = tiny.denoiser(pipe)._tokred.policy = AllRows()
    near(run(pipe), want, atol)
    assert policy.calls


@KINDS
def test_report_says_what_ran(kind):
    pipe = PIPES[kind]()
    assert tokred.report(pipe) is None
    patch(pipe, kind, "tome")
    assert tokred.report(pipe) is None
    run(pipe, steps=3)
    tokred.unpatch(pipe)
    report = tokred.report(pipe)
    passes = ("cond", "uncond") if kind == "flux" else ("0",)
    assert report.method == "tome" and report.config == tokred.ToMeConfig().to_dict()
    assert report.model == type(tiny.denoiser(pipe)).__name__
    assert [(s.index, s.total, s.pass_key) for s in report.steps] == [(i, 3, p) for i in range(3) for p in passes]
    assert all(a.u > b.u for a, b in itertools.pairwise(report.steps[:: len(passes)]))


@pytest.mark.parametrize("config", ["tome", "tome-share", "todo", "todo-area"])
@KINDS
def test_token_map(kind, config):
    pipe = patch(PIPES[kind](), kind, config, record="tokens")
    assert same(run(pipe), reduced(kind, config))  # recording changes nothing
    found = tokred.report(pipe).token_map
    side = 16 if kind == "sd" else 8
    levels = len(options(kind, config).get("levels", (0,)))
    assert found.shape == (2, 2, levels, side, side)
    # Contract 0 again: the share of tokens that have no output, or no keys, of their own.
    share = options(kind, config).get("ratio", 0.75 if options(kind, config)["method"] == "todo" else 0.5)
    if options(kind, config).get("mode") == "area":
        assert (found == 1).all()  # merged: no token has keys of its own
    else:
        gone = (found[:, :, 0] != 0).mean(axis=(2, 3))
        assert gone == pytest.approx(int(side * side * share) / side**2)
