import pytest
import torch

from diffusion_tokred import Policy, ToDoConfig, ToMeConfig, patched
from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation.variants import UNPATCHED, Variant, check, name_of, parse_variant, suited
from diffusion_tokred.testing import tiny


def test_methods_as_typed():
    assert parse_variant("tome") == Variant("tome-ratio-0.5", ToMeConfig())
    assert parse_variant("tome:ratio=0.6,levels=0,1,merge_ff") == Variant(
        "tome-ratio-0.6-levels-0_1-merge_ff", ToMeConfig(ratio=0.6, levels=(0, 1), merge_ff=True)
    )
    assert parse_variant(" tome: ratio=0.6, merge_ff=true, no_randomize ").config == ToMeConfig(
        ratio=0.6, merge_ff=True, randomize=False
    )
    assert parse_variant("todo:factor=3").config == ToDoConfig(factor=3)
    assert parse_variant("tome:randomize=false").name == "tome-ratio-0.5-no_randomize"


def test_policies_as_typed(tmp_path):
    Policy(points=((0.8, 0.5, "reduce"), (0.2, 0.0, "full"))).save(tmp_path / "Late Steps.json")
    found = parse_variant(f"tome:policy={tmp_path}/Late Steps.json,merge_ff")
    assert found.config == ToMeConfig(merge_ff=True)
    assert found.policy == Policy.load(tmp_path / "Late Steps.json")
    assert found.name == "tome-ratio-0.5-merge_ff-policy-late_steps"
    assert parse_variant("tome:policy=0.3") == Variant("tome-ratio-0.5-policy-0.3", ToMeConfig(), Policy.constant(0.3))


def test_anchors_as_typed():
    assert parse_variant("numerics") == Variant("numerics", anchor="numerics")
    assert parse_variant("seed") == Variant("seed", anchor="seed")
    assert parse_variant("steps:12", 25) == Variant("steps-12", call={"num_inference_steps": 12}, anchor="steps")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tomee", "no method 'tomee': there is .*tome.*; and numerics, seed and steps:N"),
        ("", "no method ''"),
        ("unpatched", "drawn in any case"),
        ("tome:rato=0.5", "did you mean --ratio"),
        ("tome:ratio=half", r"takes number in \[0, 0.99\], got 'half'"),
        ("tome:ratio=2", r"ratio must be in \[0, 0.99\]"),
        ("tome:ratio", "--ratio needs a value"),
        ("tome:policy=0.1,policy=0.2", "more than one policy"),
        ("tome:policy=none.json", "cannot read the policy none.json"),
        ("seed:3", "seed takes no options"),
        ("steps", "as steps:12, got ''"),
        ("steps:0", "as steps:12, got '0'"),
        ("steps:\u0663", "as steps:12"),
        ("steps:25", "25 steps are not fewer than the run's 25"),
    ],
)
def test_what_is_typed_wrong(text, message):
    with pytest.raises(ConfigError, match=message) as found:
        parse_variant(text, 25)
    assert str(found.value).startswith(f"variant {text!r}: ")


def test_long_names_are_cut_and_stay_different():
    a, b = (name_of(ToMeConfig(), f"{'a' * 90}{end}.json") for end in "xy")
    assert len(a) == len(b) == 64
    assert a != b
    Variant(a)


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", ".a", "a b", "a" * 65])
def test_names_are_safe_as_folders(name):
    with pytest.raises(ConfigError, match="name is at most 64 of a-z"):
        Variant(name)


def test_what_makes_no_sense():
    with pytest.raises(ConfigError, match="anchor is one of numerics, seed, steps"):
        Variant("a", anchor="noise")
    with pytest.raises(ConfigError, match="it takes no method"):
        Variant("a", ToMeConfig(), anchor="seed")
    with pytest.raises(ConfigError, match="a policy without a method"):
        Variant("a", policy=Policy.constant(0.3))
    with pytest.raises(ConfigError, match="latents of a variant is a number or text, got Tensor"):
        Variant("a", call={"latents": torch.zeros(1)})
    with pytest.raises(ConfigError, match="first variant is"):
        check([Variant("a", ToMeConfig())])
    with pytest.raises(ConfigError, match="first variant is"):
        check([])
    with pytest.raises(ConfigError, match="two variants are called a:"):
        check([Variant(UNPATCHED), Variant("a", ToMeConfig()), Variant("a", ToDoConfig())])


def test_as_data_and_back():
    for text in ("tome:ratio=0.6,levels=0,1", "tome:policy=0.3", "numerics", "steps:3"):
        variant = parse_variant(text)
        assert Variant.from_dict(variant.to_dict()) == variant
    assert Variant(UNPATCHED).to_dict() == {"name": "unpatched", "anchor": None, "reduction": None, "call": {}}
    with pytest.raises(ConfigError, match="a function cannot be saved"):
        Variant("a", ToMeConfig(), lambda u: 0.5).to_dict()


def test_a_bare_method_is_what_patch_makes_of_it():
    pipe = tiny.sd3()
    typed = [parse_variant(text) for text in ("taylorseer", "taylorseer:interval=3", "steps:4")]
    found = suited(typed, pipe)
    with patched(pipe, method="taylorseer"):
        driver = pipe.transformer._tokred
        assert found[0].config == driver.method.config != typed[0].config
        assert found[0].policy is not None and found[0].policy.measured is not None
        assert found[0].name == name_of(driver.method.config)
    assert found[1:] == typed[1:]
    assert suited(typed, tiny.pixart()) == typed  # nothing was measured for its family


def test_applied_is_the_patch_and_leaves_nothing():
    pipe = tiny.sd()
    before = tiny.run(pipe)
    for variant, seed in ((parse_variant("tome:ratio=0.6"), 5), (parse_variant("tome:policy=0.3"), 0)):
        with variant.applied(pipe, seed):
            found = tiny.run(pipe)
        with patched(pipe, variant.config, policy=variant.policy, seed=seed):
            assert torch.equal(found, tiny.run(pipe))
        assert not torch.equal(found, before)
        assert torch.equal(tiny.run(pipe), before)


def test_other_numerics_differ_by_rounding_only():
    pipe = tiny.sd()
    before = tiny.run(pipe)
    with parse_variant("numerics").applied(pipe):
        found = tiny.run(pipe)
    assert not torch.equal(found, before)
    assert torch.allclose(found, before, atol=1e-4)
    assert torch.equal(tiny.run(pipe), before)
