"""Sets of pictures as their features' statistics: from folders, batches and the field's `.npz` files."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..errors import ConfigError
from . import inception

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is kept of a set of pictures.

    Attributes:
        mu, sigma: mean `(d,)` and unbiased covariance `(d, d)` of the features, float64.
        n: how many pictures; None if a file does not say.
        extractor, weights_sha256, resize: what made the features; None where it is not known.
        source: where the pictures came from.
        features: `(n, d)`, in the order of the pictures; None if a file holds none. KID and intervals need them.
    """

    mu: torch.Tensor
    sigma: torch.Tensor
    n: int | None
    extractor: str
    weights_sha256: str | None = None
    resize: str | None = None
    source: str = ""
    features: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, pictures: Iterable[torch.Tensor], extractor: nn.Module, source: str = "") -> Statistics:
        """Of 8-bit batches `(B, 3, H, W)`. Raises `ConfigError` for fewer than 2 pictures, or features that are nan."""
        parts = [extractor(batch).float().cpu() for batch in pictures]
        features = torch.cat(parts) if parts else torch.zeros(0, 1)
        return cls.from_features(features, *made_by(extractor), source=source)

    @classmethod
    def from_features(
        cls,
        features: torch.Tensor,
        extractor: str,
        weights_sha256: str | None = None,
        resize: str | None = None,
        source: str = "",
    ) -> Statistics:
        """Of features `(n, d)`. Raises `ConfigError` for fewer than 2, or if they are not finite."""
        whose = source or "a set of pictures"
        if features.ndim != 2:
            raise ConfigError(f"{whose}: features are (n, d), {extractor} gave {tuple(features.shape)}")
        if len(features) < 2:
            raise ConfigError(f"{whose}: 2 pictures or more are needed for statistics, found {len(features)}")
        if not features.isfinite().all():
            raise ConfigError(f"{whose}: {extractor} gave features that are not finite")
        return cls(*moments(features), len(features), extractor, weights_sha256, resize, source, features)

    def save(self, path: str | os.PathLike[str], features: bool = False) -> None:
        """Write `.npz`: what pytorch-fid reads (`mu`, `sigma`), and n, extractor, weights_sha256, resize, source.

        `features`: also those of every picture, for KID.
        """
        path = Path(path)
        data: dict[str, Any] = {"mu": self.mu.numpy(), "sigma": self.sigma.numpy(), "n": np.int64(self.n or 0)}
        data |= {name: np.str_(getattr(self, name) or "") for name in ("extractor", *_WORDS)}
        if features:
            if self.features is None:
                raise ConfigError(f"{self.source}: there are no features to save, only mean and covariance")
            data["features"] = self.features.numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], extractor: nn.Module | None = None, batch: int = 32) -> Statistics:
        """From a folder of pictures, or from `.npz`: ours, pytorch-fid's (`mu`, `sigma`), ADM's (these or `arr_0`).

        Pictures are read with the extractor. Files without an extractor's name are taken as Inception's, of 2048
        features. Nothing is unpickled.

        Raises:
            ConfigError: nothing there, another layout, or made with another extractor than the one given.
        """
        path = Path(path)
        names = _holds(path)
        if not _is_pictures(names, extractor):
            return _read(path, extractor)
        if extractor is None:
            raise ConfigError(f"{path} holds pictures: an extractor is needed to read them")
        pictures = folder_pictures(path, batch) if names is None else array_pictures(path, batch)
        return cls.of(pictures, extractor, str(path))


def check_reference(path: str | os.PathLike[str], extractor: nn.Module | None = None) -> str:
    """What a reference is, in words, without reading its pictures. Raises `ConfigError` as `Statistics.load` would."""
    path = Path(path)
    names = _holds(path)
    if not _is_pictures(names, extractor):
        n = _read(path, extractor).n
        return f"statistics of {n or 'an unknown number of'} pictures"
    if names is None:
        return f"a folder of {len(_picture_files(path))} pictures"
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        return f"an array of {_array_shape(path, stream)[0]} pictures"


def comparable(a: Statistics, b: Statistics) -> None:
    """Raises `ConfigError` if the two were made differently: extractor, number of features, and where both are known
    weights and resize."""
    _refuse_others(a, (b.extractor, b.weights_sha256, b.resize), len(b.mu))


def made_by(extractor: nn.Module) -> tuple[str, str | None, str | None]:
    """Name, hash of the weights and resize."""
    name = getattr(extractor, "name", type(extractor).__name__)
    return name, getattr(extractor, "weights_sha256", None), getattr(extractor, "resize", None)


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased covariance, float64."""
    features = features.double()
    return features.mean(0), torch.atleast_2d(torch.cov(features.T))


def folder_pictures(folder: str | os.PathLike[str], batch: int = 32) -> Iterator[torch.Tensor]:
    """The pictures in a folder by name, as 8-bit RGB batches `(B, 3, H, W)`; a batch ends where the size changes."""
    waiting: list[torch.Tensor] = []
    for file in _picture_files(Path(folder)):
        try:
            with Image.open(file) as picture:
                values = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        except OSError as error:
            raise ConfigError(f"{file} is no picture: {error}") from error
        if waiting and (len(waiting) == batch or waiting[-1].shape != values.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(values)
    if waiting:
        yield torch.stack(waiting)


def array_pictures(path: str | os.PathLike[str], batch: int = 32) -> Iterator[torch.Tensor]:
    """The pictures `(N, H, W, 3)` under `arr_0` of an `.npz`, as 8-bit batches, without reading it whole."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        count, *sides = _array_shape(Path(path), stream)
        for start in range(0, count, batch):
            size = min(batch, count - start) * math.prod(sides)
            data = bytearray(stream.read(size))
            if len(data) < size:
                raise ConfigError(f"{path}: arr_0 is cut off, it should hold {count} pictures")
            values = torch.frombuffer(data, dtype=torch.uint8).view(-1, *sides)
            yield values.permute(0, 3, 1, 2).contiguous()


_WORDS = ("weights_sha256", "resize", "source")


def _array_shape(path: Path, stream: Any) -> tuple[int, ...]:
    """The shape in an `.npy` header; the stream is left at the first value."""
    version = np.lib.format.read_magic(stream)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise ConfigError(f"{path}: arr_0 is {dtype} {shape}; pictures are uint8 (N, H, W, 3)")
    if shape[0] < 2:
        raise ConfigError(f"{path}: 2 pictures or more are needed for statistics, found {shape[0]}")
    return shape


def _read(path: Path, extractor: nn.Module | None) -> Statistics:
    """Statistics from a file, checked against the extractor if there is one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files if name != "arr_0"}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is damaged, or cannot be read without unpickling: {error}") from error
    if not {"mu", "sigma"} <= data.keys():
        raise ConfigError(f"{path} holds {', '.join(sorted(data)) or 'nothing'}; statistics are mu and sigma")
    mu, sigma = (torch.from_numpy(np.asarray(data[name], dtype=np.float64)) for name in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ConfigError(f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} are not (d,) and (d, d)")
    if "extractor" in data:
        n = int(data["n"]) if "n" in data else 0
        sha, resize = (str(data[name]) if name in data else "" for name in _WORDS[:2])
        features = torch.from_numpy(data["features"]) if "features" in data else None
        found = Statistics(
            mu, sigma, n or None, str(data["extractor"]), sha or None, resize or None, str(path), features
        )
    elif len(mu) == inception.Inception.num_features:
        # ADM's evaluator runs the original graph, which resizes as TensorFlow 1 does. pytorch-fid's files do not say.
        resize_of = "tf1" if "mu_s" in data else None
        found = Statistics(mu, sigma, None, inception.NAME, None, resize_of, str(path))
    else:
        wanted = inception.Inception.num_features
        raise ConfigError(f"{path} names no extractor: then it must be Inception's {wanted} features, not {len(mu)}")
    if extractor is not None:
        _refuse_others(found, made_by(extractor), getattr(extractor, "num_features", len(found.mu)))
    return found


def _refuse_others(a: Statistics, other: tuple[str, str | None, str | None], num_features: int) -> None:
    mine = (a.extractor, a.weights_sha256, a.resize, len(a.mu))
    for what, one, two in zip(
        ("extractors", "weights (sha256)", "ways to resize", "numbers of features"),
        mine,
        (*other, num_features),
        strict=True,
    ):
        if one != two and one is not None and two is not None:
            raise ConfigError(f"{a.source or 'these statistics'}: different {what}, {one} and {two}: no comparison")


def _is_pictures(names: set[str] | None, extractor: nn.Module | None) -> bool:
    """Whether pictures are to be read. A file of ADM's with both serves Inception as it is, others by its pictures."""
    if names is None or "arr_0" not in names:
        return names is None
    original = extractor is None or made_by(extractor)[::2] == (inception.NAME, "tf1")
    return not (original and {"mu", "sigma"} <= names)


def _holds(path: Path) -> set[str] | None:
    """The names in an `.npz`; None for a folder of pictures."""
    if path.is_dir():
        if (count := len(_picture_files(path))) < 2:
            raise ConfigError(
                f"{path}: 2 pictures or more are needed for statistics ({', '.join(FORMATS)}), found {count}"
            )
        return None
    if not path.is_file():
        raise ConfigError(f"there is no {path}: a reference is a folder of pictures, or an .npz with mu and sigma")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile:
        raise ConfigError(f"{path} is no .npz; pickled statistics are not read: they can run code") from None


def _picture_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in FORMATS and not file.name.startswith("."))
