"""Where kernels run, and how they become operators."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WANTED = os.environ.get("TOKRED_KERNELS", "1") != "0" and importlib.util.find_spec("triton") is not None


def on(x: Tensor) -> bool:
    """Whether work on `x` is a kernel's: it is on a CUDA device, Triton is there, and `TOKRED_KERNELS` is not 0."""
    return _WANTED and x.is_cuda


def operator(plain: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """Make the operator `torch.ops.tokred.NAME` of a plain function `NAME`, which it runs on the CPU.

    On CUDA it runs the function of the same name in the module of the same name with `_triton` after it, which is
    imported then. `fake` says what comes out, without computing it.
    """
    name = plain.__name__
    module = f"{plain.__module__}_triton"
    found = torch.library.custom_op(f"tokred::{name}", plain, mutates_args=mutates, device_types="cpu")

    def launch(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    found.register_kernel("cuda", launch)
    found.register_fake(fake)
    return found
