"""How many ATen operations a call makes, what a GPU must launch and Python pays for on the way; and their FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


class KernelCounter(TorchDispatchMode):
    """Counts the ATen operations inside a `with` block; views, which launch nothing, are left out.

    Attributes:
        count: operations.
        flops: of products of matrices, convolutions and attention, 2 a multiply-add: PyTorch's formulas, and for the
            CPU's flash attention, which PyTorch's own counter leaves out, the same one as for all other attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.flops += sdpa_flop_count(*(part.shape for part in args[:3]))
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
        return found


def kernels(call: Callable[[], Any]) -> int:
    """ATen operations of a call that are not views."""
    with KernelCounter() as counter:
        call()
    return counter.count
