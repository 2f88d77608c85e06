"""What this machine has and lacks, for `tokred doctor`."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch.backends import cuda

from .. import zoo
from ..version import __version__
from .models import DTYPES
from .results import device_name, version

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "torchmetrics", "pillow")
OPTIONAL = {  # distribution -> (what for, how to get it)
    "peft": ("LoRA", "pip install peft"),
    "matplotlib": ("plots", 'pip install "diffusion-tokred[eval]"'),
    "gradio": ("the app", 'pip install "diffusion-tokred[app]"'),
    "xformers": ("xFormers attention", 'pip install "diffusion-tokred[xformers]"'),
}


class Fact(NamedTuple):
    """A line of the examination; `advice` is empty where nothing is missing."""

    name: str
    value: str
    advice: str = ""


def examine() -> list[Fact]:
    """All facts, in the order to show them. Never raises for something that is missing."""
    facts = [Fact("diffusion-tokred", __version__), Fact("python", platform.python_version())]
    for name in NEEDED:
        found = version(name)
        facts.append(Fact(name, found or "missing", "" if found else f"pip install {name}"))
    for name, (use, command) in OPTIONAL.items():
        found = version(name)
        facts.append(Fact(name, found or "not installed", "" if found else f"for {use}: {command}"))
    facts += [Fact("device", device_name(device)) for device in _devices()]
    facts += [Fact(f"dtypes on {device.type}", _dtypes(device)) for device in _devices()]
    facts.append(Fact("attention", _attention()))
    facts.append(Fact("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"))
    facts.append(_compiler())
    for name in zoo.NAMES:
        there = (zoo.path(name) / "model_index.json").is_file()
        advice = "" if there else "reinstall diffusion-tokred, or train it: scripts/train_zoo.py"
        facts.append(Fact(name, str(zoo.path(name)) if there else "no weights", advice))
    return facts


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.accelerator.is_available() and (best := torch.accelerator.current_accelerator()):
        found = [torch.device(best.type, i) for i in range(torch.accelerator.device_count())] + found
    return found


def _dtypes(device: torch.device) -> str:
    """The dtypes in which a matrix product works there."""
    able = []
    for name in DTYPES:
        try:
            x = torch.ones(2, 2, dtype=getattr(torch, name), device=device)
            able.append(name) if torch.isfinite((x @ x).float()).all() else None
        except RuntimeError:
            continue
    return ", ".join(able)


def _compiler() -> Fact:
    """What torch.compile needs: triton on an accelerator, a C++ compiler on the CPU."""
    need = "triton" if torch.accelerator.is_available() else "a C++ compiler"
    if need == "triton":
        there = find_spec("triton") is not None
    else:
        there = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    return Fact("torch.compile", f"has {need}" if there else f"lacks {need}", "" if there else f"install {need}")


def _attention() -> str:
    """Backends of scaled_dot_product_attention that are switched on; those for CUDA only where there is one."""
    on = {"math": cuda.math_sdp_enabled(), "flash": cuda.flash_sdp_enabled()}
    if torch.cuda.is_available():
        on |= {"efficient": cuda.mem_efficient_sdp_enabled(), "cudnn": cuda.cudnn_sdp_enabled()}
    return "SDPA: " + ", ".join(name for name, enabled in on.items() if enabled)
