"""Options as text."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from diffusion_tokred import ConfigError, MethodConfig, Policy, ToDoConfig, ToMeConfig
from diffusion_tokred.evaluation.options import chosen, config_from, policy, seeds, size
from diffusion_tokred.evaluation.tables import option_rows
from diffusion_tokred.methods import CONFIGS, option


def test_options_come_from_the_config() -> None:
    words = ["--ratio", "0.6", "--levels", "0,1", "--merge-ff", "--no-randomize", "--sx=4", "--merge-cross-attn=off"]
    wanted = ToMeConfig(ratio=0.6, levels=(0, 1), merge_ff=True, randomize=False, sx=4)
    assert config_from("tome", words) == wanted
    assert config_from("todo", ["--mode", "area", "--factor", "3"]) == ToDoConfig(mode="area", factor=3)
    assert config_from("tome", []) == ToMeConfig()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--ratioo 1", r"did you mean --ratio\?.*--levels"),
        ("--factor 2", "tome has --ratio, "),
        ("--ratio", r"needs a value: number in \[0, "),
        ("--ratio many", r"--ratio takes number in \[0, .*got 'many'"),
        ("--levels a", "--levels takes integers"),
        ("--merge-ff=perhaps", "--no-merge-ff"),
        ("--ratio 0.9", "keeps one token in 4"),
        ("--sx 2.5", "--sx takes integer"),
        ("0.5", "options are written --name value"),
    ],
)
def test_wrong_options_say_what_is_allowed(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        config_from("tome", words.split())
    assert "\n" not in str(error.value)


def test_methods_of_others_have_options_too(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Theirs(MethodConfig):
        name = "theirs"
        strength: float = option(0.1, "how much", low=0.0)
        mood: str = option("calm", "which", choices=("calm", "wild"))

    monkeypatch.setitem(CONFIGS, "theirs", Theirs)
    assert config_from("theirs", ["--strength", "2", "--mood", "wild"]) == Theirs(2.0, "wild")
    with pytest.raises(ConfigError, match="'calm', 'wild'"):
        config_from("theirs", ["--mood", "bad"])


def test_a_method_named_alone_stays_a_name() -> None:
    assert chosen("tome", [], None) == {"method": "tome"} and chosen("auto", [], None) == {"method": "auto"}
    assert chosen("tome", ["--ratio", "0.6"], None) == {"config": ToMeConfig(ratio=0.6), "policy": None}
    with pytest.raises(ConfigError, match=r"auto chooses everything .* leave out --policy --ratio 0\.6, or"):
        chosen("auto", ["--ratio", "0.6"], Policy.constant(0.5))


def test_the_table_of_options_is_whole() -> None:
    rows = option_rows("tome")
    assert ("tome", "--levels", "integers, as 0,1", "0") in [row[:4] for row in rows]
    assert all(row[4] for row in option_rows()), "an option without help"


def test_seeds() -> None:
    assert seeds("0") == (0,) and seeds("0,2") == (0, 2) and seeds("0-3") == (0, 1, 2, 3)
    assert seeds("5, 1-2,1") == (5, 1, 2)
    for wrong in ("", "a", "3-1", "1,,2", "0-"):
        with pytest.raises(ConfigError, match="0-3"):
            seeds(wrong)


def test_size() -> None:
    assert size("256") == (256, 256) and size("256x192") == (256, 192)
    for wrong in ("0", "x", "256x", "-8", "1x2x3", "12.5"):
        with pytest.raises(ConfigError, match="width x height"):
            size(wrong)


def test_policy(tmp_path: Path) -> None:
    rule = Policy(points=[(0.9, 0.5, "reduce"), (0.3, 0.0, "full")])
    rule.save(tmp_path / "rule.json")
    assert policy(str(tmp_path / "rule.json")) == rule
    assert policy("0.25") == Policy.constant(0.25)
    for wrong in ("1.5", "nan", str(tmp_path / "none.json")):
        with pytest.raises(ConfigError):
            policy(wrong)
