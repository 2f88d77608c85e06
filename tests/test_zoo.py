"""The embedded pipelines load, run and fit; the training script resumes to the step."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from diffusion_tokred import zoo
from diffusion_tokred.zoo import scenes

ROOT = Path(__file__).resolve().parents[1]
NATIVE = {"toy-sd": 128, "toy-dit": 128}


@pytest.fixture(scope="module", params=zoo.NAMES)
def loaded(request):
    pipe = zoo.load(request.param)
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe


def draw(pipe, **options):
    return pipe("a red star", generator=torch.Generator().manual_seed(0), output_type="np", **options).images


def test_loads_float32_from_float16_files(loaded):
    name, pipe = loaded
    modules = {key: m for key, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    assert len(modules) >= 3
    assert all(p.dtype == torch.float32 for m in modules.values() for p in m.parameters())
    denoiser = pipe.unet if name == "toy-sd" else pipe.transformer
    weight = next(denoiser.parameters())
    assert torch.equal(weight, weight.half().float())
    half = zoo.load(name, dtype=torch.bfloat16)
    assert all(m.dtype == torch.bfloat16 for m in half.components.values() if isinstance(m, torch.nn.Module))


def test_native_size_and_small_size(loaded):
    name, pipe = loaded
    native = draw(pipe, num_inference_steps=1)
    assert native.shape == (1, NATIVE[name], NATIVE[name], 3)
    small = draw(pipe, num_inference_steps=2, height=64, width=64)
    assert small.shape == (1, 64, 64, 3) and small.std() > 0.01
    assert (small == draw(pipe, num_inference_steps=2, height=64, width=64)).all()


def test_round_trip(loaded, tmp_path):
    _, pipe = loaded
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, torch_dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=2, height=64, width=64)
    assert abs(draw(again, **options) - draw(pipe, **options)).max() < 1e-4


def test_tokenizers_know_the_world(loaded):
    _, pipe = loaded
    for key in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        words = getattr(pipe, key, None)
        if words is None:
            continue
        for text in scenes.evaluation_prompts(100):
            ids = words(text).input_ids
            assert words.unk_token_id not in ids and ids[-1] == words.eos_token_id
            assert len(set(ids)) == len(set(text.split())) + 1
            assert len(ids) <= words.model_max_length
        assert words("A red, STAR!").input_ids == words("a red star").input_ids
        assert words("the large star to the left of a ring").input_ids == words("a big star left of a ring").input_ids
        assert words("a zebra").input_ids[1] == words.unk_token_id


def test_the_words_reach_the_picture(loaded):
    _, pipe = loaded
    options = dict(num_inference_steps=2, height=64, width=64, output_type="np")
    a, b = (
        pipe(text, generator=torch.Generator().manual_seed(0), **options).images
        for text in ("a big red star on a plain white background", "a big red star on a plain black background")
    )
    assert abs(a.mean() - b.mean()) > 0.05


def test_unknown_name():
    with pytest.raises(ValueError, match="toy-sd, toy-dit"):
        zoo.path("toy-xl")
    with pytest.raises(ValueError, match="'toy'"):
        zoo.load("toy")
    with pytest.raises(ValueError, match="is a CLIPModel, no pipeline"):
        zoo.load("toy-clip")


def test_files_fit_into_a_wheel():
    files = {
        file: file.stat().st_size
        for name in (*zoo.NAMES, zoo.JUDGE)
        for file in zoo.path(name).rglob("*")
        if file.is_file()
    }
    assert max(files.values()) <= 16 * 2**20
    assert sum(files.values()) < 45e6
    assert all(size <= 1.5e6 for file, size in files.items() if file.parent.name == "vae")
    assert all((zoo.path(name) / "README.md").exists() for name in (*zoo.NAMES, zoo.JUDGE))


def script():
    sys.path.insert(0, str(ROOT / "scripts"))  # as `python scripts/train_zoo.py` has it
    spec = importlib.util.spec_from_file_location("train_zoo", ROOT / "scripts" / "train_zoo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_zoo"] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "scripts"))
    return module


def test_training_resumes_to_the_step(tmp_path):
    """Stopped by SIGTERM and continued is the same as never stopped: weights, EMA and all."""
    train_zoo = script()

    class Tiny(train_zoo.VAE):
        def __init__(self):
            super().__init__()
            self.stages = [(0.5, {16: 2}), (0.5, {32: 2, 16: 2})]

    def trained(folder, stop_at=None):
        run = train_zoo.start(Tiny, folder, steps=6)
        if stop_at is not None:
            advance = run.advance

            def interrupted():
                if run.step == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                return advance()

            run.advance = interrupted
        run.train()
        return torch.load(folder / "state.pt", weights_only=True)

    whole = trained(tmp_path / "whole")
    assert trained(tmp_path / "parts", stop_at=2)["step"] == 3
    parts = trained(tmp_path / "parts")
    assert whole["step"] == parts["step"] == 6
    for part in ("modules", "ema"):
        assert all(torch.equal(value, parts[part][key]) for key, value in whole[part].items())


def test_training_options_are_checked(tmp_path):
    app = typer.Typer()
    app.command()(script().main)
    usage = CliRunner().invoke(app, ["--help"])
    assert usage.exit_code == 0 and "--init-from" in usage.output
    here, nowhere, dit = str(tmp_path), str(tmp_path / "nowhere"), ["toy-dit", "--steps", "1"]
    for wrong, said in (
        (["vae"], "--minutes or --steps"),
        (["toy-sd", "--steps", "1"], "need --vae and --text"),
        (["vae", "--minutes", "-1"], "--minutes"),
        (["vae", "--export", nowhere], "no state.pt"),
        ([*dit, "--init-from", nowhere], "nowhere"),
        ([*dit, "--init-from", here], "no folder vae"),
        ([*dit, "--init-from", str(ROOT / "diffusion_tokred" / "zoo" / "toy-dit"), "--stage", "3"], "3 stages"),
    ):
        found = CliRunner().invoke(app, [*wrong, "--out", str(tmp_path / "out")], env={"COLUMNS": "400"})
        assert found.exit_code == 2 and said in found.output, found.output
    assert not (tmp_path / "out").exists()
