"""Side by side on one UNet: unpatched, our methods, and tomesd. One model, one process, alternating rounds."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..backbones import backbone_of
from ..errors import ConfigError
from ..explaining import Explanation, explain
from ..measure.kernels import kernels
from ..measure.shares import MIN_IDEAL, profile, realised
from ..measure.timing import Interval, Timing, Variant, paired
from ..methods import MethodConfig, ToDoConfig, ToMeConfig
from ..patching import patched
from ..runtime.work import Work

Progress = Callable[[str, float], None]

# Real models' configurations; the weights are random, which times do not depend on.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),  # the rest are diffusers' defaults
    "tiny": dict(
        sample_size=64, cross_attention_dim=32, attention_head_dim=2, block_out_channels=(32, 32, 64, 64),
        norm_num_groups=8, layers_per_block=1,
    ),
}  # fmt: skip


def random_unet(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """A UNet of a real shape (860 million parameters for "sd15") with random weights, always the same.

    Raises:
        ConfigError: an unknown name.
    """
    from diffusers import UNet2DConditionModel

    if name not in UNETS:
        raise ConfigError(f"no UNet {name!r}; there is {', '.join(UNETS)}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(0)
            return UNet2DConditionModel(**UNETS[name]).eval()
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Line:
    """A variant's figures; `ideal` is S*, and what has no meaning for it is None."""

    name: str
    seconds: tuple[float, ...]
    kernels: int
    config: dict[str, Any] | None = None
    speedup: Interval | None = None
    flop_ratio: float | None = None
    ideal: float | None = None
    phi: float | None = None

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Seconds: 25 %, median, 75 %."""
        low, middle, high = np.quantile(self.seconds, (0.25, 0.5, 0.75))
        return float(low), float(middle), float(high)


@dataclass(frozen=True)
class Benchmark:
    """All variants at one size; the second line is the unpatched model again, and shows the noise."""

    height: int
    width: int
    lines: tuple[Line, ...]
    timing: Timing
    profiled: float  # seconds of a profiled call of the unpatched model

    @property
    def peer(self) -> Interval | None:
        """tomesd's time / ours at the same ratio, with the same destinations: above 1 we are faster."""
        return self.timing.ratio("tomesd", "tome") if "tomesd" in self.timing.seconds else None

    def rows(self) -> list[dict[str, Any]]:
        """For a result file."""
        rows = []
        for line in self.lines:
            row = {"height": self.height, "width": self.width, "variant": line.name, "seconds": list(line.seconds)}
            row |= dict(zip(("seconds_25", "seconds_median", "seconds_75"), line.quartiles, strict=True))
            row |= {"config": line.config, "kernels": line.kernels, "flop_ratio": line.flop_ratio}
            row |= {"ideal": line.ideal, "phi": line.phi}
            if line.ideal is None:
                row["why_null"] = dict.fromkeys(("config", "flop_ratio", "ideal", "phi"), "nothing is reduced")
            elif line.phi is None:
                row["why_null"] = {"phi": f"S* is below {MIN_IDEAL}"}
            rows.append(row)
        return rows

    def intervals(self) -> dict[str, dict[str, float]]:
        """95 % bootstrap intervals of median ratios within a round, by name."""
        at = f"{self.height}x{self.width}"
        found = {f"{at} unpatched / {line.name}": line.speedup for line in self.lines if line.speedup is not None}
        if self.peer is not None:
            found[f"{at} tomesd / tome"] = self.peer
        return {name: vars(interval) for name, interval in found.items()}


def duel(
    unet: Any,
    height: int,
    width: int,
    *,
    batch: int = 1,
    ratio: float = 0.5,
    rounds: int = 20,
    text_tokens: int = 77,
    progress: Progress | None = None,
) -> Timing:
    """Time ToMe as published, ours ("tome") against tomesd, and nothing else: more rounds in the same time.

    Args: as in `benchmark`. A round is ours, tomesd, ours.
    """
    call = _call(unet, height, width, batch, text_tokens)
    ours = Variant(call, _patched(unet, ToMeConfig(ratio=ratio, randomize=False)))
    variants = {"tome": ours, "tomesd": Variant(call, lambda: _tomesd(unet, ratio))}
    tell = progress or (lambda what, share: None)
    total = 3 * rounds + 2
    return paired(variants, rounds, warmup=1, device=unet.device, progress=lambda n, _: tell("duel", n / total))


def benchmark(
    unet: Any,
    height: int,
    width: int,
    *,
    batch: int = 1,
    ratio: float = 0.5,
    factor: int = 2,
    rounds: int = 10,
    text_tokens: int = 77,
    progress: Progress | None = None,
) -> Benchmark:
    """Time an unpatched UNet, ToMe (as published; and one matching for all blocks), ToDo, and tomesd if installed.

    All reduce level 0 only, and the destinations of ToMe and tomesd are the same: the top-left token of each cell.
    Patches are put on and taken off outside the timed calls.

    Args:
        unet: a `UNet2DConditionModel` without a patch; left without one.
        height, width: of the latents.
        batch: rows of a call.
        ratio: of ToMe and tomesd; factor: of ToDo.
        rounds: as in `measure.timing.paired`.
        progress: called with what is being done and the share that is done, in [0, 1].

    Raises:
        ConfigError, UnsupportedError: as `patch`.
    """
    configs: dict[str, MethodConfig] = {
        "tome": ToMeConfig(ratio=ratio, randomize=False),
        "tome, one matching": ToMeConfig(ratio=ratio, randomize=False, reuse_every=1),
        "todo": ToDoConfig(factor=factor),
    }
    size: dict[str, Any] = dict(height=height, width=width, batch_size=batch, guidance=False, text_tokens=text_tokens)
    plans = {name: explain(unet, config, **size) for name, config in configs.items()}
    call = _call(unet, height, width, batch, text_tokens)
    variants = {"unpatched": Variant(call)}
    variants |= {name: Variant(call, _patched(unet, config)) for name, config in configs.items()}
    if importlib.util.find_spec("tomesd") is not None:
        plans["tomesd"] = plans["tome"]  # the same matrices, so the same FLOPs
        variants["tomesd"] = Variant(call, lambda: _tomesd(unet, ratio))

    tell = progress or (lambda what, share: None)
    profiling, calls = 5, 6 + len(variants) + rounds * (len(variants) + 1)
    tell("profiling the unpatched model", 0.0)
    sites = backbone_of(unet).layout(unet).sites
    shares = profile(sites, call, rounds=profiling, warmup=1, device=unet.device)
    counts = {}
    for place, (name, variant) in enumerate(variants.items()):
        tell(f"counting kernels: {name}", (1 + profiling + place) / calls)
        with variant.state():
            counts[name] = kernels(variant.run)
    done = 1 + profiling + len(variants)
    timing = paired(
        variants, rounds, warmup=0, device=unet.device, progress=lambda n, _: tell("timing", (done + n) / calls)
    )

    lines = [
        Line("unpatched", timing.seconds["unpatched"], counts["unpatched"]),
        Line("unpatched again", timing.again, counts["unpatched"], speedup=timing.noise),
    ]
    for name, plan in plans.items():
        ideal, speedup = shares.ideal(sites, _works(plan), _grids(plan), text_tokens), timing.speedup(name)
        line = Line(
            name=name,
            seconds=timing.seconds[name],
            kernels=counts[name],
            config=configs[name].to_dict() if name in configs else None,
            speedup=speedup,
            flop_ratio=plan.flop_ratio,
            ideal=ideal,
            phi=realised(speedup.median, ideal),
        )
        lines.append(line)
    return Benchmark(height, width, tuple(lines), timing, shares.seconds)


def _call(unet: Any, height: int, width: int, batch: int, text: int) -> Callable[[], Any]:
    """A call of the UNet on fixed noise. Positional: tomesd reads the size from `args[0]`."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).to(unet.device, unet.dtype)

    sample, prompt = noise(unet.config.in_channels, height, width), noise(text, unet.config.cross_attention_dim)
    time = torch.tensor(500, device=unet.device)

    @torch.inference_mode()
    def call() -> Any:
        return unet(sample, time, prompt)

    return call


def _patched(unet: Any, config: MethodConfig) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    return lambda: patched(unet, config)


@contextlib.contextmanager
def _tomesd(unet: Any, ratio: float) -> Iterator[None]:
    import tomesd

    tomesd.apply_patch(unet, ratio=ratio, max_downsample=1, use_rand=False)
    try:
        yield
    finally:
        tomesd.remove_patch(unet)


def _works(plan: Explanation) -> dict[str, Work]:
    return {site.name: Work(site.queries, site.keys) for site in plan.sites if site.reason is None}


def _grids(plan: Explanation) -> dict[int, tuple[int, int]]:
    return {level.level: level.grid for level in plan.levels}
