"""What a user marks in the picture: regions that are never reduced, and how much others matter; on each level's grid.

Masks and weights stay on the host. What a level needs of them is made once for each size of run, in buffers that stay
when a mask changes: a compiled graph that reads them goes on as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..tokens.regions import touched, weighed
from .site import Level

_FORMS = "a PIL image, an array or a tensor (H, W) for all pictures, or (B, H, W), or a list, with one for each"


class Guard:
    """The protected tokens of one level.

    Attributes:
        tokens: (1 or pictures, N) bool, on the tokens' device: one row for all pictures, or one for each.
        shared: (1, N), those of any picture, for methods with one index set for all.
        host: `tokens`, on the host; key: of what it was made.
    """

    def __init__(self, host: Tensor, key: tuple[Any, ...], device: torch.device) -> None:
        self.host, self.key = host, key
        with torch.inference_mode(False):  # or it could not be written later
            self.tokens, self.shared = (torch.empty_like(part, device=device) for part in (host, _any(host)))
        self.fill(host)

    def fill(self, host: Tensor) -> None:
        """Other tokens, in the same buffers."""
        self.host, self._counts = host, dict[Any, int]()
        self.tokens.copy_(host)
        self.shared.copy_(_any(host))

    def most(self, shared: bool = False) -> int:
        """Protected tokens of a picture: of the one that has most, or of all together."""
        return self.once(shared, lambda host: int((_any(host) if shared else host).sum(1).max()))

    def once(self, key: Any, count: Callable[[Tensor], int]) -> int:
        """A number that follows from `host`, counted once."""
        if key not in self._counts:
            self._counts[key] = count(self.host)
        return self._counts[key]


class Regions:
    """The marks of one patch.

    Attributes:
        masks: (H, W) bool, one for all pictures or one for each; empty: nothing is protected.
    """

    def __init__(self, protect: Any = None, importance: Any = None) -> None:
        self.protects, self.weighs = protect is not None, importance is not None
        self.masks = as_masks(protect)
        self.importance = importance if callable(importance) else as_weights(importance)
        self.version = 0
        self._next: list[Tensor] | None = None

    def set(self, protect: Any) -> None:
        """Protect other tokens, from the next run on."""
        self._next = [] if protect is None else as_masks(protect)

    def begin(self) -> None:
        """A run begins: with the masks that were set since the last one did."""
        if self._next is not None:
            self.masks, self._next, self.version = self._next, None, self.version + 1

    def arrive(self, level: Level, pictures: int, frames: int, device: torch.device, info: Any = None) -> None:
        """Set what is marked of a level, whose grid is known.

        Raises:
            ConfigError: masks or weights for another number of pictures, or a callable's weights are none.
        """
        if level.grid is None or not (self.protects or self.weighs):
            return
        key = (level.grid, frames, pictures, device)
        if self.protects:
            guard = level.guard
            if guard is None or guard.key != (*key, self.version):
                masks = _each(self.masks or [torch.zeros(1, 1, dtype=torch.bool)], pictures, "protect")
                host = torch.stack([touched(mask, level.grid, frames) for mask in masks])
                if guard is not None and guard.key[:4] == key and guard.host.shape == host.shape:
                    guard.fill(host)
                    guard.key = (*key, self.version)
                else:
                    level.guard = Guard(host, (*key, self.version), device)
            assert level.guard is not None
            level.protected = level.guard.most() > 0
        if self.weighs and (callable(self.importance) or level.weighed != key):
            found = self.importance
            if callable(found):
                found = as_weights(found(info, (level.grid[0] // frames, level.grid[1])))
            rows = [weighed(w, level.grid, frames) for w in _each(found, pictures, "importance")]
            level.weights, level.weighed = torch.stack(rows).to(device), key


def growth(spared: Mapping[int, tuple[float, float]]) -> str:
    """What a step does for protected tokens that the method would not do by itself, for the user to read.

    Args:
        spared: level -> the ratio asked for, and the one that is done.
    """
    return "; ".join(
        f"protect: at level {level} the ratio is {done:.3g} instead of {asked:g}, for the protected tokens' sake"
        for level, (asked, done) in spared.items()
    )


def as_masks(value: Any) -> list[Tensor]:
    """Masks (H, W) bool on the host, from what a user passes; white, true and nonzero are marked.

    Raises:
        ConfigError: it is none, or marks nothing.
    """
    if value is None:
        return []
    masks = [picture != 0 for picture in _pictures(value, "protect")]
    if not any(bool(mask.any()) for mask in masks):
        raise ConfigError(
            "protect marks nothing: white, true or nonzero pixels are protected. Leave it out, or pass None"
        )
    return masks


def as_weights(value: Any) -> list[Tensor]:
    """Weights (H, W) float on the host; of 8-bit pictures as shares of white.

    Raises:
        ConfigError: they are none, or not finite.
    """
    if value is None:
        return []
    found = _pictures(value, "importance")
    return [w.float() / 255 if w.dtype == torch.uint8 else w.float() for w in found]


def _pictures(value: Any, name: str) -> list[Tensor]:
    """(H, W) tensors on the host."""
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float, list, tuple)):
        return [picture for part in value for picture in _pictures(part, name)]
    try:
        if callable(getattr(value, "convert", None)):  # PIL's
            value = _of_image(value)
        found = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(_plain(np.array(value)))
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {_FORMS}; got {type(value).__name__}") from None
    if found.ndim == 4 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim == 3 and found.shape[-1] in (1, 3, 4) and found.shape[0] > 4:
        raise ConfigError(
            f"{name} of shape {tuple(found.shape)} seems to have channels: pass (H, W), such as mask.any(-1)"
        )
    if found.ndim not in (2, 3) or not found.numel():
        raise ConfigError(f"{name} is {_FORMS}; got the shape {tuple(found.shape)}")
    if found.is_complex() or (found.is_floating_point() and not bool(found.isfinite().all())):
        raise ConfigError(f"{name} has values that are not finite numbers")
    return list(found) if found.ndim == 3 else [found]


def _of_image(image: Any) -> np.ndarray:
    """Luminance, uint8 (H, W), dark where it is transparent; never 0 where any channel is not."""
    pixels = np.asarray(image.convert("RGBA"))
    gray = np.maximum(np.asarray(image.convert("RGB").convert("L")), pixels[..., :3].any(-1))
    return np.where(pixels[..., 3] > 0, gray, 0).astype(np.uint8)


def _plain(array: np.ndarray) -> np.ndarray:
    """Without the types that torch knows in part."""
    return array.astype(np.int64) if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array


def _each(found: Sequence[Tensor], pictures: int, name: str) -> Sequence[Tensor]:
    if len(found) not in (1, pictures):
        raise ConfigError(
            f"{name} is for {len(found)} pictures, and this run makes {pictures}: pass one for all, or one for each"
        )
    return found


def _any(rows: Tensor) -> Tensor:
    return rows.any(0, keepdim=True)
