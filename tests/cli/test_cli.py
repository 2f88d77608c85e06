"""The command as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusion_tokred import MethodConfig, Policy, __version__
from diffusion_tokred.cli import app
from diffusion_tokred.measure import roofline
from diffusion_tokred.methods import CONFIGS, METHODS, Method, option, register_method
from tests.evaluation import toys
from tests.evaluation.test_compare import check_schema

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, on an idle machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def tokred(*words: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def compare(folder: Path, *words: Any, code: int = 0) -> Any:
    base = ("compare", "--model", folder, "--prompt", toys.PROMPT, "--steps", 2, "--repeat", 1, "--device", "cpu")
    return tokred(*base, *words, code=code)


# --- compare -----------------------------------------------------------------------------------------------------


def test_compare(folder: Path, tmp_path: Path) -> None:
    words = "--ratio 0.25 --levels 0,1 --merge-ff --seed 0-1 --size 32x48 --json deep/result.json"
    result = compare(folder, *words.split())
    for title in ("seconds a call", "speed-up, measured", "FLOPs", "tokens left out", "PSNR", "SSIM"):
        assert title in result.stdout
    assert "tokred-compare/compare.png" in result.stdout and not result.stderr
    data = json.loads((tmp_path / "deep" / "result.json").read_text())
    check_schema(data)
    assert data == json.loads((tmp_path / "tokred-compare" / "result.json").read_text()) | {"created": data["created"]}
    assert (
        data["reduction"]["config"] | {"ratio": 0.25, "levels": [0, 1], "merge_ff": True} == data["reduction"]["config"]
    )
    assert [row["seed"] for row in data["rows"]] == [0, 1] and data["pipeline"]["model"] == str(folder)
    for seed in (0, 1):
        by_hand = toys.sd()(
            toys.PROMPT, num_inference_steps=2, width=32, height=48, generator=torch.Generator().manual_seed(seed)
        ).images[0]
        saved = Image.open(tmp_path / "tokred-compare" / f"seed-{seed}-unpatched.png")
        assert saved.size == (32, 48) and saved.tobytes() == by_hand.tobytes()


def test_json_on_stdout_is_alone_there(folder: Path, tmp_path: Path) -> None:
    result = compare(folder, "--method", "todo", "--json", "-", "--out", "panel.png")
    data = json.loads(result.stdout)
    check_schema(data)
    assert data["reduction"]["method"] == "todo" and "speed-up" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["panel.png"]


def test_a_policy_from_a_file(folder: Path, tmp_path: Path) -> None:
    Policy(points=[(0.8, 0.5, "reduce"), (0.3, 0.0, "full")]).save(tmp_path / "rule.json")
    data = json.loads(compare(folder, "--policy", "rule.json", "--json", "-", "--steps", 4).stdout)
    assert data["reduction"]["policy"]["points"] == [[0.8, 0.5, "reduce"], [0.3, 0.0, "full"]]
    assert 0 < data["rows"][0]["tokens_saved"] < 0.5


def test_neutral_settings(folder: Path) -> None:
    result = compare(folder, "--ratio", 0, "--json", "result.json")
    assert "identical" in result.stdout
    row = json.loads(Path("result.json").read_text())["rows"][0]
    assert row["psnr"] is None and "infinite" in row["why_null"]["psnr"] and row["ssim"] == pytest.approx(1)


def test_a_busy_machine_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    result = compare(folder)
    assert result.stderr.startswith("tokred: the machine was busy (load 99.0 on ") and result.stderr.count("\n") == 1


def test_a_prompt_that_cannot_be_read_whole_is_told(folder: Path) -> None:
    result = compare(folder, "--prompt", "a purple star")
    assert result.stderr == "tokred: the model does not know 'purple': it reads <unk> there\n"
    result = compare(folder, "--prompt", "a red star a blue ring a red star")
    assert result.stderr == "tokred: the prompt has 9 tokens, the model reads the first 8\n"


def test_the_options_of_a_third_party_method(folder: Path) -> None:
    from dataclasses import dataclass

    from diffusion_tokred.methods import ToMe, ToMeConfig

    @dataclass(frozen=True)
    class Theirs(ToMeConfig):
        strength: float = option(0.1, "how strong they are", low=0.0, high=3.0)

    register_method("theirs", Theirs)(type("TheirMethod", (ToMe,), {}))
    try:
        assert issubclass(METHODS["theirs"], Method) and issubclass(Theirs, MethodConfig)
        data = json.loads(compare(folder, "--method", "theirs", "--strength", 2.5, "--json", "-").stdout)
        assert data["reduction"]["config"]["strength"] == 2.5
        assert "how strong they are" in tokred("methods", "--options").stdout
        assert "how strong they are" in tokred("compare", "--help").stdout
    finally:
        del METHODS["theirs"], CONFIGS["theirs"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--ratioo 0.5", "did you mean --ratio?"),
        ("--ratio 0.9", "[0, 0.75]"),
        ("--method tomee", "did you mean 'tome'?"),
        ("--levels 7", "It has level 0"),
        ("--seed x", "0-3"),
        ("--size 32y", "width x height"),
        ("--size 33", "divisible by 8"),
        ("--steps 0", "--steps"),
        ("--repeat none", "--repeat"),
        ("--device toaster", "there is cpu"),
        ("--dtype int8", "bfloat16"),
        ("--policy none.json", "cannot read the policy none.json"),
        ("--policy 2", "found 2"),
        ("--model nothing", "toy-sd, toy-dit"),
        ("--model ./nothing", "does not exist"),
        ("--out file", "name a folder"),
        ("stray", "options are written --name value"),
    ],
)
def test_errors_are_one_line(folder: Path, words: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = compare(folder, *words.split(), code=2)
    assert result.stderr.startswith("tokred: ") and result.stderr.count("\n") == 1 and says in result.stderr
    assert not result.stdout and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_ctrl_c_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """A real signal, in the middle of the fourth call of the pipeline."""
    script = f"""
        import os, signal, sys
        from diffusion_tokred.cli import main
        from diffusers import StableDiffusionPipeline
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        count, real = 0, StableDiffusionPipeline.prepare_latents

        def interrupted(*args, **kwargs):
            global count
            count += 1
            if count == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args, **kwargs)

        StableDiffusionPipeline.prepare_latents = interrupted
        sys.argv = ["tokred", "compare", "--model", {str(folder)!r}, "--prompt", "a red star", "--json", "result.json"]
        main()
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        timeout=120,
    )  # fmt: skip
    assert run.returncode == 130 and run.stderr == "tokred: interrupted\n" and not run.stdout
    assert not list(tmp_path.iterdir())


# --- the other commands ------------------------------------------------------------------------------------------


def test_help_is_light_and_quick() -> None:
    script = """
        import sys
        from diffusion_tokred.cli import app
        code = app(["--help"], standalone_mode=False)
        assert not code and "torch" not in sys.modules and "diffusers" not in sys.modules, code
    """
    seconds = []
    for _ in range(2):  # the first may have to read from a cold disk
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert "compare" in run.stdout and min(seconds) < 1.5  # 0.3 s on an idle machine


def test_alone_it_shows_help() -> None:
    assert tokred().stdout == tokred("--help").stdout
    assert "compare" in tokred().stdout
    assert tokred("--version").stdout == f"tokred {__version__}\n"


@pytest.mark.parametrize("command", ["compare", "explain", "methods", "doctor"])
def test_every_command_has_help(command: str) -> None:
    text = tokred(command, "--help").stdout
    assert "Usage: tokred" in text or "Usage: root" in text
    if command in ("compare", "explain"):
        assert "Examples" in text and "--merge-cross-attn" in text and "--factor" in text


@pytest.mark.parametrize(
    ("words", "says"), [("nope", "compare, doctor"), ("--nope", "--version"), ("methods --nope", "--markdown")]
)
def test_unknown_commands_and_options(words: str, says: str) -> None:
    result = tokred(*words.split(), code=2)
    assert result.stderr.count("\n") == 1 and says in result.stderr


def test_explain(folder: Path, tmp_path: Path) -> None:
    base = ("explain", "--model", folder, "--device", "cpu", "--size", "64x32", "--ratio", 0.25)
    text = tokred(*base, "--json", "plan.json").stdout
    assert "FLOP ratio" in text and "tome on UNet2DConditionModel" in text and "16x32" in text
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data == json.loads(tokred(*base, "--json", "-").stdout)
    assert data["levels"][0]["queries"] == 384 and data["batch"] == 2
    assert json.loads(tokred(*base, "--steps", 4, "--guidance", 1, "--json", "-").stdout)["batch"] == 1
    assert "keeps one token in 4" in tokred(*base[:-1], 0.9, code=2).stderr


def test_explain_predicts_the_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKRED_HOME", str(tmp_path))
    even = roofline.Table((1, 2), (1, 2), ((1e9, 1e9), (1e9, 1e9)))
    tables = dict.fromkeys(("linear", "conv", "attention", "match"), even)
    tables |= dict.fromkeys(("norm", "gelu", "tanh"), roofline.Table((1, 2), (1, 2), ((1e30, 1e30), (1e30, 1e30))))
    known = roofline.Calibration("a device", torch.__version__, "float32", 1, tables, 1e30, 0.0)
    roofline.cache_file("cpu", torch.float32).write_text(json.dumps(known.to_dict()))
    base = ("explain", "--model", folder, "--device", "cpu", "--size", "64x32", "--method", "todo")
    assert "on a device, float32" in tokred(*base, "--time").stdout and "redicted" not in tokred(*base).stdout
    data = json.loads(tokred(*base, "--time", "--json", "-").stdout)
    assert data["time"]["dense"] == pytest.approx(data["flops"]["total"][0] / 1e9)
    assert data["time"]["speedup"] == pytest.approx(data["flop_ratio"])


def test_methods() -> None:
    text = tokred("methods", "--options").stdout
    assert "2303.17604" in text and "--merge-cross-attn" in text and "number in [0, " in text
    lines = tokred("methods", "--markdown").stdout.splitlines()
    assert lines[0].startswith("| Method |") and any(line.startswith("| `tome` |") for line in lines)
    tables = "\n".join(lines).split("\n\n")
    for table in tables:  # each has rows of one width
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1
    assert sum(table.startswith("|") for table in tables) == 2
    assert "convolves" in " ".join(tokred("methods", "--sites").stdout.split())


def test_doctor() -> None:
    text = tokred("doctor").stdout
    for word in ("torch", "diffusers", "device", "dtypes on cpu", "SDPA", "threads", "toy-sd", "toy-dit"):
        assert word in text
