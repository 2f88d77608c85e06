"""Result files: one schema, `tokred.result/1`, for whatever measures a reduction.

    schema      "tokred.result/1"
    kind        what made it: "compare", ...
    status      "complete"
    created     UTC, ISO 8601
    env         versions, device, threads
    pipeline    model, classes, scheduler, steps, guidance, width and height in pixels, dtype
    reduction   method, config, policy (null: the config's ratio), seed
    prompts     n, unique, sha256 of the texts joined by newlines
    rows        one object a picture (pair): what was measured, raw
    intervals   name -> {median, low, high, n}: what follows from the rows

A number that does not exist is null, and `why_null` in the same object says why. All times are in seconds.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..measure.machine import device_name
from ..version import __version__

SCHEMA = "tokred.result/1"


def result(kind: str, **parts: Any) -> dict[str, Any]:
    """A complete result: `parts` are env, pipeline, reduction, prompts, rows and intervals."""
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"schema": SCHEMA, "kind": kind, "status": "complete", "created": created} | plain(parts)


def plain(value: Any, why: str = "not a finite number") -> Any:
    """As JSON values. In an object a nan or an infinity becomes null, with the reason under `why_null`."""
    if isinstance(value, Mapping):
        reasons = dict(value.get("why_null", {}))
        data = {str(k): plain(v) for k, v in value.items() if k != "why_null"}
        for key, item in value.items():
            if isinstance(item, float) and not math.isfinite(item):
                reasons.setdefault(str(key), f"{why}: {item}")
        return data | ({"why_null": reasons} if reasons else {})
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a time depends on, beside the model."""
    device = torch.device(device)
    return {
        "diffusion_tokred": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        **({"load": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}),  # of the last minute, all processes
    }


def busy(env: dict[str, Any]) -> bool:
    """Whether the machine had so much to do already that times mean little."""
    return env.get("load", 0.0) > (env["cpus"] or 1)


def version(distribution: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def prompts_of(texts: Sequence[str]) -> dict[str, Any]:
    """The `prompts` part."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return {"n": len(texts), "unique": len(set(texts)), "sha256": digest}


def to_json(data: Any) -> str:
    """Indented JSON with a newline at the end; nan is an error, see `plain`."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all, also when interrupted. Missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
