"""What a measured time depends on: the device, by its name, and what becomes of freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Callable
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


def keep_freed_memory() -> bool:
    """Have the C library keep what this process frees, from now on, as torch's allocator for CUDA does.

    By default glibc gives large blocks back to the system and faults them in again, page by page, or does not: that
    depends on what lies at the end of the heap. A step of a small model takes up to a fifth longer in one run
    than in another for that alone, patched or not. For a program, from its start: `MALLOC_TRIM_THRESHOLD_=-1
    MALLOC_MMAP_MAX_=0` in its environment.

    Returns:
        Whether it does; False where the C library is not glibc.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt = _glibc("mallopt")
    return mallopt is not None and bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def _glibc(name: str) -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
    return found


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
            if trim := _glibc("malloc_trim"):
                trim(0)  # what was freed before is not of this block
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
