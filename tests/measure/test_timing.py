"""Timing and shares on a clock that the test moves: nothing here depends on how fast this machine is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_tokred.errors import ConfigError, UnsupportedError
from diffusion_tokred.measure import shares, timing
from diffusion_tokred.measure.kernels import kernels
from diffusion_tokred.measure.shares import Share, kept, profile, realised
from diffusion_tokred.measure.timing import Timing, Variant, median_interval, paired
from diffusion_tokred.runtime.site import Block, Level, Site
from diffusion_tokred.runtime.work import Weights, Work
from diffusion_tokred.testing import tiny


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    monkeypatch.setattr(shares, "time", found)
    return found


def test_order_is_abba_and_the_baseline_is_timed_twice(clock: Clock) -> None:
    log: list[str] = []

    def run(name: str, seconds: float) -> Callable[[], None]:
        return lambda: (log.append(name), clock.wait(seconds))[1]

    found = paired({"a": run("a", 2), "b": run("b", 1), "c": run("c", 4)}, rounds=3, warmup=1)
    assert "".join(log) == "abc" + "abca" + "acba" + "abca"
    assert found.seconds == {"a": (2.0,) * 3, "b": (1.0,) * 3, "c": (4.0,) * 3} and found.again == (2.0,) * 3
    assert found.speedup("b").median == 2.0 and found.speedup("c").median == 0.5
    assert found.ratio("c", "b").median == 4.0
    assert (found.noise.low, found.noise.median, found.noise.high) == (1.0, 1.0, 1.0)


def test_drift_cancels(clock: Clock) -> None:
    """A machine that slows down steadily, by 10 % a call: each round's own ratio is off, the median is not."""
    calls = iter(range(1000))

    def run() -> None:
        clock.wait(1 + 0.1 * next(calls))

    found = paired({"a": run, "b": run}, rounds=10, warmup=0)
    assert found.speedup("b").median == pytest.approx(1)
    assert found.noise.median == pytest.approx(1, abs=0.02)
    assert found.noise.low < 0.95 and found.noise.high > 1.05


def test_state_is_not_timed(clock: Clock) -> None:
    @contextlib.contextmanager
    def state() -> Any:
        clock.wait(50)
        yield
        clock.wait(50)

    told: list[tuple[int, int]] = []
    found = paired(
        {"a": lambda: clock.wait(1), "b": Variant(lambda: clock.wait(2), state)},
        rounds=2,
        warmup=0,
        progress=lambda done, total: told.append((done, total)),
    )
    assert found.seconds["b"] == (2.0, 2.0)
    assert told == [(i, 6) for i in range(1, 7)]


def test_bootstrap() -> None:
    values = [1.0, 1.1, 1.2, 1.3, 5.0]
    found = median_interval(values)
    assert found.median == 1.2 and found.low == 1.0 and found.high == 5.0 and found.n == 5
    assert median_interval(values) == found
    many = median_interval(torch.linspace(0, 1, 401).tolist())
    assert many.median == 0.5
    # The median of n uniform values has a standard error near 1 / (2 sqrt(n)) = 0.025.
    assert 0.43 < many.low < 0.47 and 0.53 < many.high < 0.57


def test_quartiles_and_errors() -> None:
    found = Timing({"a": (1.0, 2.0, 3.0, 4.0, 5.0)}, (1.0, 2.0, 3.0, 4.0, 5.0))
    assert found.quartiles("a") == (2.0, 4.0) and found.median("a") == 3.0
    with pytest.raises(ConfigError):
        paired({}, rounds=2)
    with pytest.raises(ConfigError):
        paired({"a": lambda: None}, rounds=0)


class Slow(Tensor):
    """A tensor whose attention takes 5 seconds."""

    clock: Clock

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            cls.clock.wait(5)
        return super().__torch_function__(func, types, args, kwargs or {})


class Attention(nn.Module):
    def __init__(self, clock: Clock, attend: bool = True) -> None:
        super().__init__()
        self.clock, self.attend = clock, attend

    def forward(self, x: Tensor) -> Tensor:
        self.clock.wait(2)
        if self.attend:
            x = F.scaled_dot_product_attention(x, x, x)
        self.clock.wait(1)
        return x


class FakeSite(Site):
    def weights(self) -> Weights:
        return Weights(query=6, key=2, core=8)


class FakeRows(Site):
    kind = "feed_forward"

    def weights(self) -> Weights:
        return Weights(query=5)


class Pause(nn.Module):
    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock.wait(self.seconds)
        return x


def test_shares(clock: Clock) -> None:
    """20 seconds a call: an attention of 5 + 3, a feed-forward of 2, and 10 outside, 5 of them in another attention."""
    Slow.clock = clock
    model = nn.Sequential(Attention(clock), Pause(clock, 2), Pause(clock, 5))
    level = Level(0)
    level.grid = (2, 4)
    block = Block(0, "block", model)
    sites = [FakeSite("attn", model[0], block, level), FakeRows("ff", model[1], block, level)]
    x = torch.zeros(1, 1, 8, 4).as_subclass(Slow)

    def call() -> None:
        F.scaled_dot_product_attention(model(x), x, x)

    found = profile(sites, call, rounds=2, warmup=1)
    assert found.seconds == 20
    assert found.sites == {"attn": Share(5 / 20, 3 / 20), "ff": Share(0.0, 2 / 20)}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    grids = {0: (2, 4)}
    assert found.ideal(sites, {}, grids, 0) == 1
    # Half of the queries and keys: a quarter of the core, half of the rows.
    assert found.ideal(sites, {"attn": Work(4)}, grids, 0) == pytest.approx(20 / (20 - 5 * 0.75 - 3 * 0.5))
    # A quarter of the keys: a quarter of the core; of the rows, all 6 a query and a quarter of the 2 a key.
    assert found.ideal(sites, {"attn": Work(8, 2)}, grids, 0) == pytest.approx(20 / (20 - 5 * 0.75 - 3 * 2 * 0.75 / 8))
    both = {"attn": Work(4), "ff": Work(6, extra=10**9)}
    assert found.ideal(sites, both, grids, 0) == pytest.approx(20 / (20 - 5.25 - 2 / 4))


def test_a_core_that_cannot_be_seen(clock: Clock) -> None:
    site = FakeSite("attn", Attention(clock, attend=False), Block(0, "", nn.Identity()), Level(0))
    with pytest.raises(UnsupportedError, match="attn does not call PyTorch's attention"):
        profile([site], lambda: site.module(torch.zeros(1)))
    with pytest.raises(ConfigError):
        profile([site], lambda: None, rounds=0)


def test_joined_text_stays() -> None:
    weights = Weights(query=4, text=3, core=2, text_is="joined")
    core, rows = kept(weights, Work(8, 2), 8, text=4)
    assert core == pytest.approx((12 * 6) / (12 * 12)) and rows == 1.0
    core, rows = kept(weights, Work(4), 8, text=4)
    assert core == pytest.approx(64 / 144) and rows == pytest.approx((4 * 4 + 4 * 3) / (8 * 4 + 4 * 3))


def test_realised() -> None:
    assert realised(1.3, 1.6) == pytest.approx(0.5)
    assert realised(1.3, 1.19) is None
    assert realised(0.9, 1.5) == pytest.approx(-0.2)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_real_sites_are_seen(name: str) -> None:
    """Every site of a denoiser has a share, every attention a core, and together they are less than the call."""
    from diffusion_tokred.backbones import backbone_of

    pipe = tiny.BUILDERS[name]()
    model = tiny.denoiser(pipe)
    sites = backbone_of(model).layout(model).sites
    found = profile(sites, lambda: tiny.run(pipe, steps=1), rounds=1)
    assert set(found.sites) == {site.name for site in sites}
    assert all(share.rows > 0 for share in found.sites.values())
    assert all((found.sites[s.name].core > 0) == (s.kind != "feed_forward") for s in sites)
    assert sum(share.core + share.rows for share in found.sites.values()) < 1
    assert math.isfinite(found.seconds)


def test_kernels() -> None:
    x = torch.zeros(4, 4)
    assert kernels(lambda: (x.view(2, 8).t() + 1).relu()) == 2
