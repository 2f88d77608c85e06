"""What a device can do, measured once: products by size, attention, convolutions, memory, and what a call costs.

Peak figures of data sheets are of no use here: a product of few rows, or an attention of narrow heads, runs at a
fraction of them. So speeds are measured on a grid of sizes, in less than a minute, and read off between its points.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError
from ..home import home
from ..tokens import destinations, match, split
from .machine import device_name
from .operations import PASSES, Operation
from .timing import synchronize

VERSION = 1
# kind -> the two sizes of `Operation.size` that are measured.
GRIDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "linear": ((16, 128, 1024, 4096), (32, 320, 1280, 3072)),
    "conv": ((64, 256, 1024, 4096), (32, 320, 1280)),
    "attention": ((64, 256, 1024, 4096), (16, 64, 128)),
    "match": ((256, 1024, 4096), (64, 320, 1280)),
    "norm": ((64, 1024, 4096), (32, 320, 1280)),
    "gelu": ((64, 4096), (64, 1280)),
    "tanh": ((64, 4096), (64, 1280)),
}
HEADS = 8
LARGE = 2**24  # values to copy, more than caches hold


@dataclass(frozen=True)
class Table:
    """FLOPs (where there are none: bytes) a second on a grid: `rates[i][j]` at `first[i]`, `second[j]`.

    Between the points the logarithm is linear in those of the sizes; outside, it is as at the edge.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]
    rates: tuple[tuple[float, ...], ...]

    def at(self, first: float, second: float) -> float:
        x, y = np.log(self.first), np.log(self.second)
        columns = [np.interp(np.log(max(second, 1e-9)), y, np.log(row)) for row in self.rates]
        return float(np.exp(np.interp(np.log(max(first, 1e-9)), x, columns)))


@dataclass(frozen=True)
class Calibration:
    """A device's speeds, for one dtype.

    Attributes:
        device, torch, dtype, threads: what they hold for.
        tables: kind of `Operation` -> speed by size.
        bandwidth: bytes a second of a large copy, read and written.
        call: seconds that starting an operation takes.
        took: seconds of the measurement.
    """

    device: str
    torch: str
    dtype: str
    threads: int
    tables: Mapping[str, Table]
    bandwidth: float
    call: float
    took: float = 0.0

    def seconds(self, operation: Operation) -> float:
        """max(FLOPs / their rate, bytes / bandwidth), and the time that the calls take to start."""
        table = self.tables.get(operation.kind)
        rate = self.bandwidth if table is None else table.at(*operation.size)
        if operation.flops:
            work = max(operation.flops / rate, operation.bytes / self.bandwidth)
        else:
            work = operation.bytes / rate
        return work + operation.calls * self.call

    def to_dict(self) -> dict[str, Any]:
        return {"_version": VERSION} | asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Calibration:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: another version, or fields that are not those.
        """
        data = dict(data)
        if (version := data.pop("_version", None)) != VERSION:
            raise ConfigError(f"a calibration of version {version!r} cannot be read: this library reads {VERSION}")
        try:
            tables = {
                kind: Table(tuple(t["first"]), tuple(t["second"]), tuple(map(tuple, t["rates"])))
                for kind, t in data.pop("tables").items()
            }
            return Calibration(tables=tables, **data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"this is not a calibration: {error}") from None


def calibration(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, fresh: bool = False
) -> Calibration:
    """This device's `Calibration`, from the user's cache folder, or measured now and kept there.

    It is kept for this device, dtype, number of threads and torch's version. `TOKRED_HOME` names another folder.

    Args:
        fresh: measure anew.
    """
    path = cache_file(device, dtype)
    if not fresh and path.exists():
        try:
            return Calibration.from_dict(json.loads(path.read_text()))
        except (ConfigError, ValueError):
            pass  # of an older version, or half written: measured anew
    found = calibrate(device, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    part.replace(path)
    return found


def cache_file(device: torch.device | str, dtype: torch.dtype) -> Path:
    """Where a device's calibration is kept."""
    words = (device_name(torch.device(device)), str(dtype).removeprefix("torch."), torch.__version__,
             f"{torch.get_num_threads()}-threads")  # fmt: skip
    name = "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in word).strip("-") for word in words)
    return home() / f"roofline-{name}.json"


@torch.no_grad()
def calibrate(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, budget: float = 45.0
) -> Calibration:
    """Measure a device. Let nothing else run meanwhile.

    Args:
        budget: seconds after which what is left of the grids is not measured: the larger sizes, which are taken to run
            as fast as the largest that was.

    Raises:
        ConfigError: the budget does not even allow the smallest sizes.
    """
    device, start = torch.device(device), time.perf_counter()

    def timed(call: Callable[[], Any], limit: float = 0.1) -> float:
        """Seconds of the fastest of at least 3 calls: what else a machine does only makes them slower."""
        call()
        times: list[float] = []
        while len(times) < 3 or (sum(times) < limit and len(times) < 50):
            synchronize(device)
            before = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - before)
        return min(times)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def linear(rows: int, width: int) -> tuple[Callable[[], Any], float]:
        x, weight = randn(rows, width), randn(width, width)
        return lambda: F.linear(x, weight), 2.0 * rows * width**2

    def conv(pixels: int, channels: int) -> tuple[Callable[[], Any], float]:
        side = round(pixels**0.5)
        x, weight = randn(1, channels, side, side), randn(channels, channels, 3, 3)
        return lambda: F.conv2d(x, weight, padding=1), 18.0 * side**2 * channels**2

    def attention(tokens: int, width: int) -> tuple[Callable[[], Any], float]:
        q, k, v = randn(3, 1, HEADS, tokens, width).unbind()
        return lambda: F.scaled_dot_product_attention(q, k, v), 4.0 * tokens**2 * HEADS * width

    def matching(tokens: int, width: int) -> tuple[Callable[[], Any], float]:
        x, side = randn(1, tokens, width), math.isqrt(tokens)
        dst = destinations(side, side, 2, 2, device=device)
        src = split(dst, tokens)
        return lambda: match(x, dst, src, tokens // 2), 2.0 * len(dst) * len(src) * width

    def norm(rows: int, width: int) -> tuple[Callable[[], Any], float]:
        x, scale = randn(1, rows, width), randn(1, 1, width)
        passes = float(PASSES * x.nbytes)
        return lambda: x + scale * (F.layer_norm(x, (width,)) * scale + scale), passes

    def activation(rows: int, width: int, approximate: str) -> tuple[Callable[[], Any], float]:
        x = randn(rows, width)
        return lambda: F.gelu(x, approximate=approximate), 2.0 * x.nbytes

    call = _overhead(device, dtype, timed)
    makers: dict[str, Callable[[int, int], tuple[Callable[[], Any], float]]] = {
        "linear": linear, "conv": conv, "attention": attention, "match": matching, "norm": norm,
        "gelu": partial(activation, approximate="none"), "tanh": partial(activation, approximate="tanh"),
    }  # fmt: skip
    points = [(a * b, kind, a, b) for kind, (rows, columns) in GRIDS.items() for a in rows for b in columns]
    rates: dict[tuple[str, int, int], float] = {}
    for _, kind, a, b in sorted(points):  # the small ones first
        if time.perf_counter() - start < budget:
            function, count = makers[kind](a, b)
            rates[kind, a, b] = count / timed(function)
        else:
            near = [(x * y, rate) for (k, x, y), rate in rates.items() if k == kind and x <= a and y <= b]
            if not near:
                raise ConfigError(f"a budget of {budget:g} seconds is too small to measure this device")
            rates[kind, a, b] = max(near)[1]
    tables = {
        kind: Table(first, second, tuple(tuple(rates[kind, a, b] for b in second) for a in first))
        for kind, (first, second) in GRIDS.items()
    }
    large = randn(LARGE)
    target = torch.empty_like(large)
    bandwidth = 2 * large.nbytes / timed(lambda: target.copy_(large))
    took = time.perf_counter() - start
    return Calibration(
        device_name(device), torch.__version__, str(dtype).removeprefix("torch."), torch.get_num_threads(), tables,
        bandwidth, call, took,
    )  # fmt: skip


def _overhead(device: torch.device, dtype: torch.dtype, timed: Callable[..., float]) -> float:
    """Seconds that a module's call takes which has next to nothing to do: Python's part of it, and the launch."""
    small = torch.zeros(64, device=device, dtype=dtype)
    modules = nn.Sequential(*(nn.SiLU() for _ in range(100)))
    return timed(lambda: modules(small)) / 100
