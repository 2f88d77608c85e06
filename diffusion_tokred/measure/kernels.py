"""How many ATen operations a call makes: what a GPU must launch, and what Python pays for on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class KernelCounter(TorchDispatchMode):
    """Counts the ATen operations inside a `with` block; views, which launch nothing, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def kernels(call: Callable[[], Any]) -> int:
    """ATen operations of a call that are not views."""
    with KernelCounter() as counter:
        call()
    return counter.count
