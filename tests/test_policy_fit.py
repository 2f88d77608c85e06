"""Policies on models: rules at sites, what a policy brings with it, and what is refused when patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError, Policy, UnsupportedError
from diffusion_tokred.testing import tiny


def drawn(pipe: Any, steps: int = 4, **options: Any) -> torch.Tensor:
    with tokred.patched(pipe, **options):
        return tiny.run(pipe, steps=steps)


def ruled(others: Any, **rule: Any) -> Policy:
    return Policy(points=others, rules=[rule])


HALF, FULL = [(1.0, 0.5)], [(1.0, 0.0)]


@pytest.mark.parametrize(
    "rule, same",
    [
        (dict(level=1), dict(levels=(0,))),
        (dict(level=0), dict(levels=(1,))),
        (dict(kind="feed_forward"), dict(merge_ff=False)),
        (dict(kind="attention"), dict(merge_attn=False)),
    ],
    ids=str,
)
def test_a_rule_that_computes_all_is_as_if_the_sites_were_not_there(rule: Any, same: Any) -> None:
    """Bit by bit, for levels and kinds that the method's options can leave out too."""
    pipe = tiny.sd()
    both = dict(method="tome", levels=(0, 1), merge_ff=True)
    by_rule = drawn(pipe, **both, policy=ruled(HALF, points=FULL, **rule))
    assert torch.equal(by_rule, drawn(pipe, **(both | same), policy=HALF))
    assert not torch.equal(by_rule, drawn(pipe, **both, policy=HALF))


def test_rows_at_each_site() -> None:
    """What the modules are handed, watched from outside: kinds, levels and blocks have ratios of their own."""
    pipe = tiny.sd()
    blocks = [m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    rows: dict[str, list[int]] = {"attention": [], "feed_forward": []}
    handles = []
    for block in blocks:
        for kind, module in (("attention", block.attn1.to_q), ("feed_forward", block.ff.net[0])):
            handles.append(
                module.register_forward_pre_hook(lambda _, args, kind=kind: rows[kind].append(args[0].shape[1]))
            )
    policy = Policy(
        points=HALF,
        rules=[
            dict(level=0, kind="feed_forward", points=[(1.0, 0.25)]),
            dict(blocks=[0, 0], points=[(1.0, 0.75)]),
            dict(level=1, points=FULL),
        ],
    )
    drawn(pipe, steps=1, method="tome", levels=(0, 1), merge_ff=True, policy=policy)
    for handle in handles:
        handle.remove()
    # Levels of 256, 64, 16 tokens with three blocks each, and one of 4; the first block is of level 0.
    assert sorted(rows["attention"]) == [4, *3 * [16], *3 * [64], 64, 128, 128]
    assert sorted(rows["feed_forward"]) == [4, *3 * [16], *3 * [64], *3 * [192]]


@pytest.mark.parametrize(
    "name, options, policy",
    [
        ("sd", dict(method="tome", levels=(0, 1), merge_ff=True),
         Policy(points=[(1.0, 0.5), (0.5, 0.25)], rules=[dict(kind="feed_forward", level=0, points=[(0.8, 0.25)]),
                                                         dict(level=1, points=[(0.7, 0.6)])])),
        ("sd3", dict(method="tome", reuse_every=2),
         Policy(points=[(0.9, 0.5)], rules=[dict(kind="attention", points=[(0.7, 0.4)])])),
        ("sd3", dict(method="todo"), Policy(points=[(1.0, 0.75)], rules=[dict(blocks=[1, 1], points=FULL)])),
        ("pixart", dict(method="toca", mode="faithful", min_steps=0, interval=2, warmup=1),
         Policy(points=[(1.0, 0.5)], rules=[dict(kind="feed_forward", points=[(1.0, 0.8)])])),
        ("sd", dict(method="fora", min_steps=0, interval=2, warmup=1),
         Policy(points=[(1.0, 1.0, "reuse")], rules=[dict(level=1, points=[(0.6, 1.0, "reuse")])])),
    ],
    ids=lambda value: value.get("method", "") if isinstance(value, dict) else value if isinstance(value, str) else "",
)  # fmt: skip
def test_explained_as_run(name: str, options: dict[str, Any], policy: Policy) -> None:
    pipe = tiny.BUILDERS[name]()
    found = tokred.explain(pipe, **options, policy=policy, num_inference_steps=6, text_tokens=7)
    drawn(pipe, steps=6, **options, policy=policy)
    steps = tokred.report(pipe).steps
    assert [(s.mode, s.ratio, s.flops) for s in found.steps] == [(s.mode, s.ratio, s.flops) for s in steps]
    assert len({s.flops for s in steps}) > 1 or policy.is_constant
    assert found.groups[0] == str(policy.rules[0]) and len(found.steps[0].parts) == len(found.groups)


@pytest.mark.parametrize(
    "method, options", [("toca", {}), ("fora", dict(what="stack")), ("taylorseer", {}), ("ras", {})]
)
def test_whole_stacks_have_no_groups_of_blocks(method: str, options: Any) -> None:
    pipe = tiny.sd3()
    mode, ratio = (
        ("reduce", 0.5) if method in ("toca", "ras") else ("forecast" if method == "taylorseer" else "reuse", 1.0)
    )
    policy = ruled([(1.0, ratio, mode)], blocks=[0, 1], points=FULL)
    with pytest.raises(UnsupportedError, match=r"rule for blocks 0-1, and .* takes all blocks .* one clock"):
        tokred.patch(pipe, method=method, policy=policy, **options)
    assert "_tokred" not in vars(pipe.transformer)
    with pytest.raises(UnsupportedError, match="takes all blocks"):
        tokred.explain(pipe, method=method, policy=policy, **options)
    with pytest.raises(UnsupportedError, match=r"rule for attention matches no site .* it acts at stack; levels 0"):
        tokred.patch(pipe, method=method, policy=ruled([(1.0, ratio, mode)], kind="attention", points=FULL), **options)
    tokred.patch(pipe, method=method, policy=ruled(FULL, kind="stack", points=[(1.0, ratio, mode)]), **options)
    tokred.unpatch(pipe)


@pytest.mark.parametrize(
    "options, policy, says",
    [
        (dict(method="tome"), ruled(HALF, level=1, points=FULL), "rule for level 1 matches no site .* levels 0; bl"),
        (dict(method="tome"), ruled(HALF, blocks=[90, 99], points=FULL), "rule for blocks 90-99 .* blocks 0, 8-9$"),
        (dict(method="tome"), ruled(HALF, kind="cross_attention", points=FULL), "cross-attention matches no site"),
        (dict(method="tome"), Policy(rules=[dict(level=0, points=HALF), dict(kind="attention", points=FULL)]),
         "rule for attention is never reached: all its sites go by earlier ones, such as level 0"),
        (dict(method="tome", reuse_every=1, merge_ff=True), ruled(HALF, kind="feed_forward", points=[(1.0, 0.25)]),
         "one choice of tokens .* at u=1 they are .*attention.*0.5.*feed-forward: reduce 0.25|one choice of tokens"),
        (dict(method="fora"), ruled([(1.0, 1.0, "reuse")], kind="feed_forward", points=[(0.5, 1.0, "reuse")]),
         "one clock, which says what steps are full.*feed-forward: full 0"),
        (dict(method="cat", mode="faithful"), ruled(HALF, kind="feed_forward", points=[(1.0, 0.25)]),
         "one choice of tokens"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_followed(options: Any, policy: Policy, says: str) -> None:
    pipe = tiny.sd()
    for call in (tokred.patch, tokred.explain):
        with pytest.raises(UnsupportedError, match=says):
            call(pipe, policy=policy, **options)
    assert "_tokred" not in vars(pipe.unet)


@pytest.mark.slow
def test_compiled() -> None:
    """Without a graph break, and the same picture: several ratios in a block, and a block that computes all."""
    policy = Policy(
        points=[(1.0, 0.5), (0.6, 0.25)],
        rules=[dict(blocks=[1, 1], points=[]), dict(kind="feed_forward", points=[(1.0, 0.25)])],
    )
    pipe = tokred.patch(tiny.sd3(), method="tome", merge_ff=True, policy=policy)
    plain = tiny.run(pipe, steps=4)
    torch._dynamo.reset()
    pipe.transformer.compile(fullgraph=True, backend="eager")
    assert torch.equal(plain, tiny.run(pipe, steps=4))


def test_three_ratios_at_most() -> None:
    pipe, many = tiny.sd(), [(1.0, 0.5), (0.8, 0.4), (0.6, 0.3), (0.4, 0.2)]
    with pytest.raises(ConfigError, match=r"4 different ratios at .*\(0.5, 0.4, 0.3, 0.2\), and it may have 3"):
        tokred.patch(pipe, method="tome", policy=many)
    with pytest.raises(ConfigError, match=r"101 different ratios|100 different ratios .* Policy.shaped\(function\)"):
        tokred.patch(pipe, method="tome", policy=lambda u: u / 2)
    with pytest.raises(ConfigError, match="toca for 4 different ratios"):
        tokred.explain(tiny.sd3(), method="toca", policy=many)
    tokred.explain(pipe, method="tome", policy=[*many[:3], (0.4, 0.0), (0.1, 0.5)])
    tokred.explain(tiny.sd3(), method="toca", mode="faithful", policy=many)  # the papers' counts
    tokred.explain(pipe, method="tome", policy=Policy.shaped(lambda u: u / 2))


def test_a_policy_brings_its_method() -> None:
    pipe = tiny.sd()
    config = tokred.ToMeConfig(levels=(0, 1), merge_ff=True)
    policy = Policy.linear(0.6).for_pipe(pipe, config)
    assert torch.equal(drawn(pipe, policy=policy), drawn(pipe, config=config, policy=Policy.linear(0.6)))
    for call in (tokred.patch, tokred.explain):
        call(pipe, policy=policy)
        call(pipe, method="tome", policy=policy)
    assert tokred.explain(pipe, method="tome", policy=policy).config == config.to_dict()
    given = tokred.explain(pipe, policy=policy, levels=(0,)).config
    assert given == config.to_dict() | {"levels": [0]}, "options given win"
    assert tokred.explain(pipe, tokred.ToMeConfig(), policy=policy).config == tokred.ToMeConfig().to_dict()
    named = Policy(points=HALF, method="tome")
    assert tokred.explain(pipe, policy=named).config == tokred.ToMeConfig().to_dict()


def test_a_policy_for_another_method() -> None:
    pipe = tiny.sd()
    policy = Policy(points=[(1.0, 0.5)], method=tokred.ToMeConfig().to_dict())
    for given in (dict(method="random-keep"), dict(config=tokred.RandomKeepConfig())):
        with pytest.raises(ConfigError, match=r"made for tome, and this is random-keep.*without_method\(\)"):
            tokred.patch(pipe, policy=policy, **given)
        tokred.explain(pipe, policy=policy.without_method(), **given)
    with pytest.raises(ConfigError, match="which method"):
        tokred.patch(pipe, policy=policy.without_method())
    for wrong, says in [
        ("tomme", "did you mean 'tome'"),
        ({"_type": "tome", "_version": 9}, "version 9"),
        ({"_type": "tome", "_version": 1, "ratio": 7}, "ratio must be in"),
        ({}, "version None"),
        (3, "found 3"),
    ]:
        with pytest.raises(ConfigError, match=f"the policy's method.*{says}"):
            tokred.patch(pipe, policy=Policy(points=HALF, method=wrong))
    with pytest.raises(ConfigError, match="tome has no option 'interval'"):
        tokred.patch(pipe, policy=policy, interval=3)


def test_a_policy_for_another_model() -> None:
    pipe = tiny.sd()
    policy = Policy.constant(0.5).for_pipe(pipe, tokred.ToMeConfig())
    tokred.unpatch(tokred.patch(tiny.sd(seed=3), policy=policy))
    tokred.unpatch(tokred.patch(pipe.unet, policy=policy))
    other = tiny.sdxl()
    for call in (tokred.patch, tokred.explain):
        with pytest.raises(ConfigError, match="made for UNet2DConditionModel of the shape"):
            call(other, policy=policy)
    assert "_tokred" not in vars(other.unet)
    tokred.patch(other, policy=policy.without_model())
    with pytest.raises(ConfigError, match="this is SD3Transformer2DModel"):
        tokred.patch(tiny.sd3(), policy=policy)


def test_processors_go_by_the_same() -> None:
    pipe = tiny.sd()
    pipe.unet.set_attn_processor(tokred.ToMeAttnProcessor.around(pipe.unet, tokred.ToMeConfig(levels=(0, 1))))
    with tokred.steps(pipe, policy=ruled(HALF, level=1, points=FULL)):
        first = tiny.run(pipe, steps=2)
    assert torch.equal(first, drawn(tiny.sd(), steps=2, method="tome", levels=(0,)))
    with (
        pytest.raises(UnsupportedError, match="rule for level 3 matches no site"),
        tokred.steps(pipe, policy=ruled(HALF, level=3, points=FULL)),
    ):
        pass
