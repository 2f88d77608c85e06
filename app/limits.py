"""What the app accepts. Whatever comes from outside passes here: it becomes a setting, or an error that says why not.

No name of a file from outside is ever opened: a policy is text, a mask is a picture that gradio has stored.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError, MethodConfig, Policy
from diffusion_tokred.evaluation import options

UNPATCHED = "unpatched"
MOST_STEPS = 100
MOST_PAIRS = 10
MOST_LETTERS = 2000  # of a prompt
MOST_BYTES = 64 * 1024  # of a policy
MOST_POINTS = 1000
MASK_SIDE = 4096  # pixels of a mask's side
LAST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Setup:
    """What both sides share. Sizes in pixels; `repeat` is the number of timed pairs, 0 for none."""

    model: str
    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    guidance: float
    repeat: int = 0

    @property
    def picture(self) -> tuple[Any, ...]:
        """What decides a picture, beside its side."""
        return self.model, self.prompt, self.seed, self.steps, self.width, self.height, self.guidance


@dataclass(frozen=True)
class Side:
    """A method with its options and its policy, or the unpatched pipeline (`config` is None).

    `mask`, `size`: `protect` as packed bits, so that sides can be compared; bool `(H, W)`, where tokens are computed in
    any case.
    """

    config: MethodConfig | None = None
    policy: Policy | None = None
    mask: bytes | None = None
    size: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Such as "tome ratio 0.6"."""
        if self.config is None:
            return UNPATCHED
        parts = [self.config.name, *(f"{name} {_shown(value)}" for name, value in changed(self.config).items())]
        return " ".join(parts) + (" by policy" if self.policy else "") + (" protected" if self.mask else "")

    @property
    def protect(self) -> np.ndarray | None:
        if self.mask is None:
            return None
        bits = np.unpackbits(np.frombuffer(self.mask, dtype=np.uint8), count=self.size[0] * self.size[1])
        return bits.reshape(self.size).astype(bool)

    def arguments(self) -> dict[str, Any]:
        """Of `tokred.patch`."""
        found: dict[str, Any] = {"config": self.config}
        if self.policy is not None:
            found["policy"] = self.policy
        if self.mask is not None:
            found["protect"] = self.protect
        return found

    def to_dict(self) -> dict[str, Any]:
        """As plain data, in the form that `side_of` takes; the mask as its share of the picture."""
        if self.config is None:
            return {"method": UNPATCHED}
        data = {key: value for key, value in self.config.to_dict().items() if not key.startswith("_")}
        protect = self.protect
        return {
            "method": self.config.name,
            "options": data,
            "policy": None if self.policy is None else self.policy.to_dict(),
            **({} if protect is None else {"protected": float(protect.mean())}),
        }


def config_of(method: str, **values: Any) -> MethodConfig:
    """A method's config by name. Raises ConfigError: no such method or option, or a wrong value."""
    return MethodConfig.from_dict({"_type": method, "_version": 1} | values)


def changed(config: MethodConfig) -> dict[str, Any]:
    """The options that are not the method's defaults; the ratio or the factor in any case."""
    plain = config_of(config.name)
    names = [name for name in config.to_dict() if not name.startswith("_")]
    return {
        name: getattr(config, name)
        for name in names
        if getattr(config, name) != getattr(plain, name) or name in ("ratio", "factor")
    }


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return (
        ",".join(map(str, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def setup_of(
    model: Any, prompt: Any, seed: Any, steps: Any, width: Any, height: Any, guidance: Any, repeat: Any,
    models: Sequence[str], largest: int,
) -> Setup:  # fmt: skip
    """Both sides' settings.

    Args:
        models: names that may be chosen.
        largest: pixels of a side.

    Raises:
        ConfigError: with what was found and what is allowed.
    """
    if model not in models:
        raise ConfigError(f"no model {str(model)[:80]!r} here: there is {', '.join(models)}")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError("the prompt is empty: write what the picture should show")
    if len(prompt) > MOST_LETTERS:
        raise ConfigError(f"the prompt has {len(prompt):,} letters: up to {MOST_LETTERS:,} are read")
    return Setup(
        model=model,
        prompt=" ".join(prompt.split()),
        seed=whole("seed", seed, 0, LAST_SEED),
        steps=whole("steps", steps, 1, MOST_STEPS),
        width=whole("width", width, 16, largest),
        height=whole("height", height, 16, largest),
        guidance=number("guidance", guidance, 0, 100),
        repeat=whole("timed pairs", repeat, 0, MOST_PAIRS),
    )


def side_of(data: Any, mask: Image.Image | str | None = None) -> Side:
    """A side from text ("unpatched", "tome:ratio=0.5,merge_ff") or from `{"method", "options", "policy"}`.

    Args:
        data: as above; a policy is a ratio, a list of points, a policy's dict, or its JSON as text.
        mask: see `mask_of`.

    Raises:
        ConfigError: an unknown method or option, a wrong value, a policy that is none.
    """
    if isinstance(data, str):
        head, _, rest = (part.strip() for part in data.partition(":"))
        if head == UNPATCHED and not rest:
            return Side()
        words = [word.strip() for word in re.split(r",(?=\s*[A-Za-z])", rest)] if rest else []
        config = options.config_from(head, [f"--{word}" for word in words])
        return _side(config, None, mask)
    if not isinstance(data, Mapping):
        raise ConfigError('a side is text such as "tome:ratio=0.5", or an object with method, options and policy')
    if unknown := sorted(map(str, set(data) - {"method", "options", "policy"})):
        raise ConfigError(f"a side has method, options and policy, not {', '.join(unknown)[:80]}")
    method, chosen, policy = data.get("method"), data.get("options") or {}, data.get("policy")
    if not isinstance(method, str):
        raise ConfigError(f"method is a name, one of {', '.join(i.name for i in tokred.methods())}, or {UNPATCHED!r}")
    if not isinstance(chosen, Mapping):
        raise ConfigError(f"options are an object with the method's options, got {type(chosen).__name__}")
    if method == UNPATCHED:
        if chosen or policy:
            raise ConfigError("the unpatched pipeline takes no options and no policy")
        return Side()
    values = {str(name): tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    return _side(config_of(method, **_fitted(method, values)), policy_of(policy), mask)


def _side(config: MethodConfig, policy: Policy | None, mask: Image.Image | str | None) -> Side:
    protect = mask_of(mask)
    if protect is None:
        return Side(config, policy)
    return Side(config, policy, np.packbits(protect).tobytes(), (protect.shape[0], protect.shape[1]))


def _fitted(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """Numbers as the config wants them: JSON and sliders write 2 as 2.0."""
    plain = config_of(method)
    for name, value in values.items():
        wanted = getattr(plain, name, None)
        if type(wanted) is int and isinstance(value, float) and math.isfinite(value) and value == int(value):
            values[name] = int(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{method}: {name} must be a finite number, got {value}")
    return values


def policy_of(data: Any) -> Policy | None:
    """A policy from a ratio, a list of points, a policy's dict, or the JSON of one of them, as text or bytes.

    Raises:
        ConfigError: it is none, or too large.
    """
    if isinstance(data, bytes):
        if len(data) > MOST_BYTES:
            raise ConfigError(f"a policy has at most {MOST_BYTES // 1024} kB, this has {len(data) // 1024:,}")
        try:
            data = data.decode()
        except UnicodeDecodeError:
            raise ConfigError("the policy is not text: a policy is JSON, as Policy.save writes it") from None
    if isinstance(data, str):
        if len(data) > MOST_BYTES:
            raise ConfigError(f"a policy has at most {MOST_BYTES // 1024} kB, this has {len(data) // 1024:,}")
        if not data.strip():
            return None
        try:
            data = json.loads(data, parse_constant=_no_constant)
        except (json.JSONDecodeError, RecursionError) as error:
            why = str(error) if isinstance(error, json.JSONDecodeError) else "nested too deep"
            raise ConfigError(
                f"the policy is not JSON ({why}): write [[1.0, 0.6], [0.3, 0.0]], or what Policy.save writes"
            ) from None
    if data is None or isinstance(data, Policy):
        return data
    if isinstance(data, Mapping):
        points = data.get("points")
        if isinstance(points, list) and len(points) > MOST_POINTS:
            raise ConfigError(f"a policy has at most {MOST_POINTS:,} points, this has {len(points):,}")
        return Policy.from_dict(data)
    if isinstance(data, (int, float)) and not isinstance(data, bool):
        return Policy.constant(number("a policy's ratio", data, 0, 1))
    if isinstance(data, list):
        if len(data) > MOST_POINTS:
            raise ConfigError(f"a policy has at most {MOST_POINTS:,} points, this has {len(data):,}")
        return Policy(points=tuple(tuple(point) if isinstance(point, list) else point for point in data))
    raise ConfigError(f"a policy is a ratio, a list of points (u, ratio, mode) or a policy's JSON, got {data!r:.80}")


def mask_of(mask: Image.Image | str | None) -> np.ndarray | None:
    """Bool `(H, W)` of a picture, what is painted or bright; None if nothing is.

    Args:
        mask: with an alpha channel what is opaque counts, else what is brighter than middle gray. A path is one that
            gradio has stored itself.

    Raises:
        ConfigError: no picture, or one with sides above `MASK_SIDE`, which is not decoded then.
    """
    if mask is None:
        return None
    picture = open_picture(mask) if isinstance(mask, str) else mask
    if "A" in picture.getbands():
        found = np.asarray(picture.getchannel("A")) > 127
    else:
        found = np.asarray(picture.convert("L")) > 127
    return found if found.any() else None


def painted_of(editor: Any) -> Image.Image | None:
    """What is painted in gradio's editor, as the alpha of one picture: all its layers over each other."""
    layers = [layer for layer in (editor or {}).get("layers") or () if layer is not None]
    if not layers:
        return None
    page = Image.new("RGBA", layers[0].size)
    for layer in layers:
        page.alpha_composite(layer.convert("RGBA"))
    return page


def open_picture(path: str) -> Image.Image:
    """A stored picture, its size checked before a pixel is decoded."""
    try:
        with open(path, "rb") as file:
            data = io.BytesIO(file.read())
        picture: Image.Image = Image.open(data)
        if max(picture.size) > MASK_SIDE:
            raise ConfigError(f"the mask has {picture.width}x{picture.height} pixels: up to {MASK_SIDE} a side")
        picture.load()
    except ConfigError:
        raise
    except Image.DecompressionBombError:
        raise ConfigError(f"the mask is too large: up to {MASK_SIDE} pixels a side") from None
    except (OSError, ValueError, SyntaxError):
        raise ConfigError("the mask is no picture that can be read: use PNG or JPEG") from None
    return picture


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number in [low, high]. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a number from {low:g} to {high:g}, got {value!r:.40}")
    if not low <= value <= high:
        raise ConfigError(f"{name} must be from {low:g} to {high:g}, got {value:g}")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in [low, high]. Raises ConfigError."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value != int(value)
    ):
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {value!r:.40}")
    if not low <= value <= high:
        raise ConfigError(f"{name} must be from {low} to {high}, got {int(value) if abs(value) < 1e15 else value}")
    return int(value)


def _no_constant(text: str) -> float:
    raise ConfigError(f"{text} in a policy: its numbers are finite")
