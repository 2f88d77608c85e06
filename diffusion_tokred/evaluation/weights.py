"""Pretrained weights that an evaluation can use: where they are looked for, and what to do if they are not there.

Nothing is ever downloaded. A file is taken from the option, else from the environment variable, else from where torch
keeps its downloads (`$TORCH_HOME/hub/checkpoints`); a CLIPModel from a folder, or by its hub id from Hugging Face's
cache (`$HF_HOME`). Finding costs milliseconds, so that an evaluation stops before it has generated anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError


@dataclass(frozen=True)
class Need:
    """Weights by name.

    Attributes:
        name: what `find` takes.
        what: a few words for people.
        files: names under which torch's download folder may have it. Eight hex digits at the end are the beginning of
            the file's sha256, as torch hub names its files.
        size: of the download.
        source: where to get it: an address, or a command.
        option, variable: of the command line and of the environment.
    """

    name: str
    what: str
    files: tuple[str, ...]
    size: str
    source: str
    option: str
    variable: str


NEEDS = {
    need.name: need
    for need in (
        Need(
            "inception",
            "FID's Inception-v3",
            ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
            "96 MB",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
            "--inception-weights",
            "TOKRED_INCEPTION",
        ),
        Need(
            "alexnet",
            "torchvision's AlexNet, for LPIPS",
            ("alexnet-owt-7be5be79.pth",),
            "233 MB",
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            "--alexnet-weights",
            "TOKRED_ALEXNET",
        ),
        Need(
            "vgg16",
            "torchvision's VGG16, for LPIPS",
            ("vgg16-397923af.pth",),
            "528 MB",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "--vgg-weights",
            "TOKRED_VGG",
        ),
        Need(
            "clip",
            "a CLIPModel with its processor",
            (),
            "1.7 GB",
            "hf download openai/clip-vit-large-patch14",
            "--clip-model",
            "TOKRED_CLIP",
        ),
        Need(
            "pickscore",
            "PickScore, a CLIPModel with its processor",
            (),
            "4 GB",
            "hf download yuvalkirstain/PickScore_v1, with the processor of its CLIP-ViT-H-14 in the same folder",
            "--pickscore-model",
            "TOKRED_PICKSCORE",
        ),
        Need(
            "hps",
            "HPSv2 as a CLIPModel with its processor",
            (),
            "4 GB",
            "hf download adams-story/HPSv2-hf",
            "--hps-model",
            "TOKRED_HPS",
        ),
    )
}
CLIPS = ("clip", "pickscore", "hps")  # CLIPModels: folders or hub ids


@dataclass(frozen=True)
class Found:
    """Weights on this machine: a file, or a CLIPModel's folder. `label` is how figures made with them are named."""

    name: str
    path: Path
    label: str

    @cached_property
    def sha256(self) -> str:
        return sha256(self.path)

    def to_dict(self) -> dict[str, Any]:
        """As plain data; reads the whole file for its hash."""
        return {"name": self.name, "label": self.label, "path": str(self.path), "sha256": self.sha256}


def find(name: str, given: str | Path | None = None) -> Found:
    """Where the weights called `name` are: `given` (the option), else the variable, else the download folder.

    What was named and is not there is an error, not a reason to look further.

    Raises:
        ConfigError: nothing there, or something else; one line with what is missing, where to get it, how to name it.
    """
    need = _need(name)
    named, by = given, need.option
    if named is None and os.environ.get(need.variable):
        named, by = os.environ[need.variable], need.variable
    if name in CLIPS:
        return _find_clip(need, named, by)
    if named is not None:
        path = Path(named).expanduser()
        if not path.is_file():
            raise ConfigError(f"{by}: there is no file {path}; {_advice(need)}")
        return Found(name, _torch_file(path, by, need), path.name)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for file in need.files:
        if (folder / file).is_file():
            return Found(name, _torch_file(folder / file, str(folder), need), file)
    raise ConfigError(f"{need.what}: no {' or '.join(need.files)} in {folder}; {_advice(need)}")


def named(need: Need) -> bool:
    """Whether the environment names it: what was asked for and is not there is an error."""
    return bool(os.environ.get(need.variable))


def sha256(path: str | Path) -> str:
    """Of a file; of a folder: of its weight files, one after the other by name."""
    path = Path(path)
    digest = hashlib.sha256()
    for file in _weight_files(path) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def load_into(module: nn.Module, path: str | Path, name: str, prefix: str = "") -> None:
    """Load the part of a torch file whose keys begin with `prefix`; further keys are let be.

    `name` is that of `NEEDS`, for the message. Batch counters (`num_batches_tracked`) may be missing.

    Raises:
        ConfigError: no torch file, keys missing, other shapes.
    """
    need = _need(name)
    path = _torch_file(Path(path), need.option, need)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling errors of all kinds, truncated archives
        raise ConfigError(f"{need.option}: {path} cannot be loaded ({_first_line(error)}); {_advice(need)}") from error
    wanted = {prefix + key: value for key, value in module.state_dict().items()}
    here = state if isinstance(state, dict) else {}
    missing = [key for key in wanted if key not in here and not key.endswith("num_batches_tracked")]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"{need.option}: {path} is not {need.what}: it has no {', '.join(missing[:3])}{more}; {_advice(need)}"
        )
    other = [key for key, value in wanted.items() if key in here and here[key].shape != value.shape]
    if other:
        shapes = f"{tuple(here[other[0]].shape)} instead of {tuple(wanted[other[0]].shape)}"
        raise ConfigError(f"{need.option}: {path} is not {need.what}: {other[0]} is {shapes}; {_advice(need)}")
    module.load_state_dict({key.removeprefix(prefix): here[key] for key in wanted if key in here}, strict=False)


def _need(name: str) -> Need:
    if name not in NEEDS:
        raise ConfigError(f"no weights are called {name!r}; there are: {', '.join(NEEDS)}")
    return NEEDS[name]


def _advice(need: Need) -> str:
    return f"get it ({need.size}): {need.source}, then {need.option} or {need.variable}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _torch_file(path: Path, by: str, need: Need) -> Path:
    """The file, if it begins as one written by torch does: an archive or a pickle. Saved web pages do not."""
    if not path.is_file():
        raise ConfigError(f"{by}: there is no file {path}; {_advice(need)}")
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise ConfigError(f"{by}: cannot read {path}: {error.strerror}") from error
    if not start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise ConfigError(f"{by}: {path} is no torch file (it begins with {start!r}); {_advice(need)}")
    return path


def _weight_files(folder: Path) -> list[Path]:
    """Of a saved model: safetensors, one or in parts; else torch's."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _find_clip(need: Need, named: str | Path | None, by: str) -> Found:
    if named is None:
        raise ConfigError(f"{need.what}: none named; {_advice(need)}: a folder or a hub id")
    folder, label = Path(named).expanduser(), Path(named).name
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder, label = Path(snapshot_download(str(named), local_files_only=True)), str(named)
        except (HFValidationError, LocalEntryNotFoundError):
            advice = f"get it ({need.size}): hf download {named}" if _is_hub_id(str(named)) else _advice(need)
            raise ConfigError(f"{by}: {named} is no folder, and not in Hugging Face's cache; {advice}") from None
    if missing := list(_missing_of_clip(folder)):
        raise ConfigError(f"{by}: no complete CLIPModel in {folder}: {', '.join(missing)} missing; {_advice(need)}")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise ConfigError(f"{by}: {folder / 'config.json'} is no JSON: {error}") from error
    if kind != "clip":
        raise ConfigError(f"{by}: {folder} holds a model of type {kind!r}, not a CLIPModel")
    return Found(need.name, folder, label)


def _missing_of_clip(folder: Path) -> Iterable[str]:
    for names in (
        ("config.json",),
        ("preprocessor_config.json", "processor_config.json"),
        ("tokenizer.json", "vocab.json"),
    ):
        if not any((folder / name).is_file() for name in names):
            yield " or ".join(names)
    if not _weight_files(folder):
        yield "model.safetensors"


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
