"""What a measured time depends on: the device, by its name."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Such as "cuda: NVIDIA H100" or "cpu: AMD EPYC 9654"."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{device.type}: {name}"


class PeakMemory:
    """A block whose peak of memory is taken: of the device's allocator on CUDA, else of the whole process (Linux).

    Attributes:
        bytes: after the block; None where it cannot be told.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
                self._set = True
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif getattr(self, "_set", False):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.bytes = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
