"""All that decides a picture beside its variant, prompt and seed: recorded by a run, compared when it goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError
from ..patching import denoisers
from .prompts import PromptSet
from .results import device_name, environment, version


def settings_of(
    pipe: Any, prompts: PromptSet, call: dict[str, Any], base_seed: int, batch: int, threads: int
) -> dict[str, Any]:
    """As plain data. `call`: the pipeline's arguments."""
    device, denoiser = pipe._execution_device, denoisers(pipe)[0]
    env = environment(device)
    scheduler = getattr(pipe, "scheduler", None)
    processors = {type(p).__name__ for p in getattr(denoiser, "attn_processors", {}).values()}
    return {
        "prompts": f"{prompts.n}, sha256 {prompts.sha256[:16]}",
        "base_seed": base_seed,
        "batch": batch,
        "threads": threads,
        "call": {name: plain_argument(name, value) for name, value in call.items()},
        "pipeline": {
            "class": type(pipe).__name__,
            "denoiser": type(getattr(denoiser, "_orig_mod", denoiser)).__name__,
            "dtype": str(denoiser.dtype).removeprefix("torch."),
            "weights": weights_hash(pipe),
            "scheduler": type(scheduler).__name__,
            "scheduler_config": _config(scheduler),
            "processors": sorted(processors),
            "compiled": hasattr(denoiser, "_orig_mod") or getattr(denoiser, "_compiled_call_impl", None) is not None,
        },
        "device": device_name(device),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "versions": {name: env[name] for name in ("diffusion_tokred", "torch", "diffusers", "transformers")}
        | {"pillow": version("pillow")},
    }


def weights_hash(pipe: Any) -> str:
    """16 hex digits that change when a weight of the pipeline does (a sum of the bits of each tensor is hashed)."""
    digest = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        for name, tensor in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
            digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
            if whole is not None and tensor.device.type != "meta" and not tensor.is_complex():
                with contextlib.suppress(RuntimeError, NotImplementedError):  # packed by a quantisation library
                    digest.update(str(tensor.contiguous().view(whole).sum(dtype=torch.int64).item()).encode())
    return digest.hexdigest()[:16]


def _config(scheduler: Any) -> dict[str, Any]:
    config = dict(getattr(scheduler, "config", {}))
    return {key: plain_argument(key, value) for key, value in sorted(config.items()) if not key.startswith("_")}


def plain_argument(name: str, value: Any) -> Any:
    """As JSON; tensors and pictures as their sha256."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_argument(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_argument(name, item) for item in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    if isinstance(value, Image.Image):
        value = np.array(value)
    if isinstance(value, np.ndarray):
        return f"{value.shape} sha256 {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]}"
    raise ConfigError(f"{name} is a {type(value).__name__}: a run records numbers, text, tensors and pictures only")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words: "threads was 1, is 2"."""
    a, b = _flatten(before), _flatten(now)
    return [
        f"{key} was {_shown(a, key)}, is {_shown(b, key)}"
        for key in {**a, **b}
        if (key in a, a.get(key)) != (key in b, b.get(key))
    ]


def _flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, Mapping) or not data:
        return {prefix.rstrip("."): data}
    return {key: value for name, part in data.items() for key, value in _flatten(part, f"{prefix}{name}.").items()}


def _shown(data: Mapping[str, Any], key: str) -> str:
    return json.dumps(data[key]) if key in data else "absent"
