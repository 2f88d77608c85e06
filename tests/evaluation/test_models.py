"""Models by name. No test touches a network."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_tokred import ConfigError, UnsupportedError, zoo
from diffusion_tokred.evaluation import models
from diffusion_tokred.testing import tiny


def test_a_folder(folder: Path) -> None:
    pipe = models.load_model(str(folder), dtype="bfloat16", device="cpu")
    assert pipe.unet.dtype == torch.bfloat16 and pipe.tokenizer is not None
    assert models.load_model(str(folder)).unet.dtype in (torch.float32, torch.bfloat16)


def test_what_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    wrong = {
        str(tmp_path): "no model_index.json",
        str(tmp_path / "nothing"): "does not exist",
        str(tmp_path / "model.safetensors"): "from_single_file",
        str(tmp_path / "broken"): "cannot be loaded as a diffusers pipeline",
        "toy-xyz": "toy-sd, toy-dit",
    }
    for name, says in wrong.items():
        with pytest.raises(ConfigError, match=says) as error:
            models.load_model(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [None, 404, 401])
def test_the_hub_is_asked_once(status: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Answer(Exception):
        response = type("Response", (), {"status_code": status})

    def ask(self: Any, name: str, timeout: float) -> None:
        assert name == "nobody/nothing" and timeout <= 5
        raise Answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="private or gated" if status else "hf download nobody/nothing"):
        models.load_model("nobody/nothing")
    assert time.perf_counter() - start < 3


def test_offline_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        models.load_model("nobody/nothing")


def test_missing_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zoo, "path", lambda name: tmp_path / name)
    with pytest.raises(ConfigError, match="weights of 'toy-sd' are not in this installation"):
        models.load_model("toy-sd")


def test_pipelines_without_a_prompt() -> None:
    with pytest.raises(UnsupportedError, match="DiTPipeline takes class labels, no prompt"):
        models.needs_prompt(tiny.dit())
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        models.needs_prompt(tiny.sd())


def test_devices_and_dtypes() -> None:
    assert models.pick_device("cpu").type == "cpu"
    for wrong in ("cuda:99", "toaster", "meta"):
        with pytest.raises(ConfigError, match="there is cpu"):
            models.pick_device(wrong)
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        models.pick_dtype("int8", torch.device("cpu"))


def test_prompts_that_are_not_read_whole_are_counted(pipe: Any) -> None:
    """The tiny tokenizer knows nine words, and six of a prompt."""
    assert models.unread_of(pipe, ["a red star", "a blue ring"]) is None
    said = models.unread_of(pipe, ["a red star", "a red zebra", "a red zebra", "a red star a blue ring a red ring"])
    assert said is not None and said.startswith("2 of 3 different prompts are not read whole, first 'a red zebra'")
    assert "does not know 'zebra'" in said
