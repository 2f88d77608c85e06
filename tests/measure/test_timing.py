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

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.measure import shares, timing
from diffusion_tokred.measure.kernels import KernelCounter, kernels
from diffusion_tokred.measure.shares import Parts, Watch, ideal, profile, realised
from diffusion_tokred.measure.timing import Timing, Variant, median_interval, paired
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
    """An attention of 3 seconds beside its core, half of them in a module of its own."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.rows = clock, Pause(clock, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.wait(1.5)
        return self.rows(F.scaled_dot_product_attention(x, x, x))


class Pause(nn.Module):
    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock.wait(self.seconds)
        return x


class Whole(nn.Module):
    """20 seconds: an attention of 5 + 3, a module of 2, and 10 of its own, 5 of them in another attention core."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.attn, self.ff = clock, Attention(clock), Pause(clock, 2)

    def forward(self, x: Tensor, rows: int = 8) -> Tensor:
        F.scaled_dot_product_attention(x, x, x)
        self.clock.wait(5)
        few = x[:, :, :rows]
        return self.ff(self.attn(few)) if rows else x


@pytest.fixture
def whole(clock: Clock) -> tuple[Whole, Tensor]:
    Slow.clock = clock
    return Whole(clock), torch.zeros(1, 1, 8, 4).as_subclass(Slow)


def test_shares(whole: tuple[Whole, Tensor]) -> None:
    model, x = whole
    found = profile(model, lambda: model(x), rounds=2, warmup=1)
    assert found.seconds == {"": 5, " core": 5, "attn": 1.5, "attn core": 5, "attn.rows": 1.5, "ff": 2}
    assert found.total == 20
    assert found.work == {"": 32, " core": 32 * 8, "attn": 32, "attn core": 32 * 8, "attn.rows": 32, "ff": 32}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ConfigError, match="at least one round"):
        profile(model, lambda: None, rounds=0)
    with pytest.raises(ConfigError, match="Whole was not called"):
        profile(model, lambda: None)


def test_ideal(whole: tuple[Whole, Tensor]) -> None:
    """Half of the rows: a quarter of the core, half of what works on rows; none: nothing of what is left out."""
    model, x = whole
    dense = profile(model, lambda: model(x), rounds=1)
    with Watch(model) as watch:
        for rows in (8, 4, 0):
            model(x, rows)
    full, half, none = watch.calls
    assert ideal(dense, full) == 1
    assert ideal(dense, half) == pytest.approx(20 / (20 - 5 * 0.75 - 5 * 0.5))
    assert ideal(dense, none) == pytest.approx(20 / 10)


def test_what_is_called_and_does_nothing_has_no_work(whole: tuple[Whole, Tensor]) -> None:
    """A cache that stands in a module's `forward` and gives back what it kept: its hooks run, and nothing inside."""
    model, x = whole
    with Watch(model) as watch:
        model.attn.forward = lambda x: x  # type: ignore[method-assign]
        model(x)
    assert watch.calls[0].work.keys() == {"", " core", "ff"}


def test_a_layer_that_gives_back_what_it_made_before_has_no_work() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4))
    x, counter = torch.zeros(1, 8, 4), KernelCounter()
    with Watch(model, counter=counter) as watch, counter:
        model(x)
        model[0].forward = lambda _: x  # type: ignore[method-assign]
        model(x)
    assert [set(call.work) for call in watch.calls] == [{"", "0", "1", "2"}, {"", "1", "2"}]
    dense = Parts({"0": 3.0, "2": 1.0}, watch.calls[0].work)
    assert ideal(dense, watch.calls[1]) == 4


def test_a_broken_call_leaves_nothing(whole: tuple[Whole, Tensor]) -> None:
    model, x = whole
    with Watch(model) as watch:
        with pytest.raises(RuntimeError, match="2 dimensional"):
            model(x[0, 0, 0, 0])
        model(x)
    assert [call.work["ff"] for call in watch.calls] == [32]


def test_realised() -> None:
    assert realised(1.3, 1.6) == pytest.approx(0.5)
    assert realised(1.3, 1.19) is None
    assert realised(0.9, 1.5) == pytest.approx(-0.2)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_real_models_are_seen(name: str) -> None:
    """Every attention of a denoiser has a core, and the parts are the whole."""
    from diffusion_tokred.backbones import backbone_of

    pipe = tiny.BUILDERS[name]()
    model = tiny.denoiser(pipe)
    sites = backbone_of(model).layout(model).sites
    names = {id(module): name for name, module in model.named_modules()}
    found = profile(model, lambda: tiny.run(pipe, steps=1), rounds=1)
    assert all(found.seconds[names[id(s.module)]] > 0 for s in sites)
    assert all((f"{names[id(s.module)]} core" in found.seconds) == (s.kind != "feed_forward") for s in sites)
    assert math.isfinite(found.total) and ideal(found, found) == pytest.approx(1)
    assert ideal(found, Parts({}, {"": found.work[""]})) > 1  # all left out but the model's own


def test_kernels() -> None:
    x = torch.zeros(4, 4)
    assert kernels(lambda: (x.view(2, 8).t() + 1).relu()) == 2


def test_flops() -> None:
    """A product, a convolution, and attention, which torch's own counter leaves out on a CPU."""
    x, conv = torch.zeros(1, 2, 6, 8), nn.Conv2d(2, 5, 3, padding=1)
    with KernelCounter() as counter, torch.no_grad():
        F.scaled_dot_product_attention(x, x[:, :, :4], x[:, :, :4])
        assert counter.flops == 2 * 2 * (2 * 6 * 4 * 8)
        conv(x)
        assert counter.flops == 2 * 2 * (2 * 6 * 4 * 8) + 2 * 5 * 2 * 9 * 6 * 8
        x[0, 0] @ x[0, 1].t()
    assert counter.flops == 2 * 2 * (2 * 6 * 4 * 8) + 2 * 5 * 2 * 9 * 6 * 8 + 2 * 6 * 8 * 6
