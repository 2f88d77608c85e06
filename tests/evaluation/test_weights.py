"""Weights are found where they were said to be, or one line says what to do."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from diffusion_tokred import zoo
from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation.weights import NEEDS, find, sha256

FILES = ("inception", "alexnet", "vgg16")


@pytest.fixture(autouse=True)
def nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No variable set, empty caches. Returns torch's download folder."""
    for need in NEEDS.values():
        monkeypatch.delenv(need.variable, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def file_at(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"a": torch.zeros(2)}, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_option_then_variable_then_downloads(
    name: str, nothing_there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = NEEDS[name]
    cached = [file_at(nothing_there / file) for file in need.files]
    assert find(name).path == cached[0]
    monkeypatch.setenv(need.variable, str(file_at(tmp_path / "variable.pth")))
    assert find(name).path == tmp_path / "variable.pth"
    assert find(name, file_at(tmp_path / "option.pth")).path == tmp_path / "option.pth"
    # What was named and is missing is not replaced by what is there.
    with pytest.raises(ConfigError, match=f"^{need.option}: there is no file .*none.pth"):
        find(name, tmp_path / "none.pth")
    monkeypatch.setenv(need.variable, str(tmp_path / "gone.pth"))
    with pytest.raises(ConfigError, match=f"^{need.variable}: there is no file .*gone.pth"):
        find(name)


@pytest.mark.parametrize("name", FILES)
def test_what_is_missing_is_said_in_one_line(name: str, nothing_there: Path) -> None:
    need = NEEDS[name]
    with pytest.raises(ConfigError) as caught:
        find(name)
    text = str(caught.value)
    assert "\n" not in text
    for part in (need.what, need.files[0], str(nothing_there), need.source, need.size, need.option, need.variable):
        assert part in text


def test_fidelitys_name_of_the_inception_file(nothing_there: Path) -> None:
    path = file_at(nothing_there / "weights-inception-2015-12-05-6726825d.pth")
    assert find("inception").path == path


def test_a_page_saved_as_weights(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(ConfigError, match=r"no torch file \(it begins with b'<htm'\)"):
        find("vgg16", tmp_path / "page.pth")


def test_hash_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(b"x" * (3 << 20) + b"end")
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    found = find("alexnet", file_at(tmp_path / "a.pth"))
    assert found.to_dict() == {
        "name": "alexnet",
        "label": "a.pth",
        "path": str(tmp_path / "a.pth"),
        "sha256": hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest(),
    }


def test_clip_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zoo.path(zoo.JUDGE)
    found = find("clip", folder)
    assert (found.path, found.label) == (folder, "toy-clip")
    assert found.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setenv("TOKRED_CLIP", str(folder))
    assert find("clip").path == folder

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name, text in (("tokenizer.json", "tokenizer.json or vocab.json"), ("model.safetensors", "model.safetensors")):
        (copy / name).unlink()
        with pytest.raises(ConfigError, match=f"no complete CLIPModel in .*{text}.* missing"):
            find("clip", copy)
        shutil.copy(folder / name, copy / name)
    assert find("clip", copy).path == copy
    (copy / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ConfigError, match="of type 'siglip', not a CLIPModel"):
        find("clip", copy)


def test_clip_by_its_hub_id_comes_from_the_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not in Hugging Face's cache; get it .*hf download some/clip$"):
        find("clip", "some/clip")
    place = tmp_path / "hub" / "models--some--clip"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(zoo.path(zoo.JUDGE), place / "snapshots" / ("0" * 40))
    found = find("clip", "some/clip")
    assert found.label == "some/clip" and found.path == place / "snapshots" / ("0" * 40)


def test_clip_that_nobody_named() -> None:
    with pytest.raises(ConfigError, match=r"hf download openai/clip-vit-large-patch14.*--clip-model or TOKRED_CLIP"):
        find("clip")
    with pytest.raises(ConfigError, match="is no folder, and not in"):
        find("clip", "/nowhere/at/all")


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="no weights are called 'dino'; there are: inception, alexnet, vgg16, clip"):
        find("dino")


def test_finding_reads_no_weights(tmp_path: Path) -> None:
    """A file of 4 GB (sparse) is found at once: before an evaluation nothing is hashed or loaded."""
    path = file_at(tmp_path / "huge.pth")
    with path.open("r+b") as file:
        file.truncate(4 << 30)
    begun = time.process_time()
    find("vgg16", path)
    assert time.process_time() - begun < 1
