"""What the steps of caching methods cost, kind by kind, on transformers of real width with random weights.

Against the unpatched model of the same process, in alternating rounds: a full step that keeps what it computes, and a
step that computes some tokens or none. `phi` is the realised fraction (S - 1) / (S* - 1), see `measure.shares`: S*
takes selection, gathers and copies as free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..backbones import backbone_of
from ..driver import Driver
from ..errors import ConfigError
from ..measure.shares import Shares, profile, realised
from ..measure.timing import synchronize
from ..methods import MethodConfig, make_config
from ..patching import patched

Call = Callable[[], Any]


@dataclass(frozen=True)
class Kept:
    """A method's steps. Seconds are medians of the rounds; ratios are medians of ratios within a round.

    Attributes:
        method: its name, with what was set.
        tokens, computed: of the picture, and of them computed at a kept step.
        full: seconds of a full step that keeps; kept: of a step between.
        overhead: full / unpatched.
        speedup: unpatched / kept, with the quartiles of its ratios.
        flop_share: FLOPs of the kept step / dense, the method's own counted.
        ideal: S* of the kept step; phi: what is realised of it, None where S* is below 1.2.
        composed: speed-up of a run with a full step every three, from the medians; `composed_phi`: of its own S*.
    """

    method: str
    tokens: int
    computed: int
    full: float
    kept: float
    overhead: float
    speedup: tuple[float, float, float]
    flop_share: float
    ideal: float
    phi: float | None
    composed: float
    composed_phi: float | None


def model(
    shape: str,
    latent: int = 64,
    depth: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, Call, int]:
    """A transformer with random weights, a call of it with batch 1, and the number of text tokens in it.

    Args:
        shape: "sd3" (24 heads of 64, 154 text tokens), "pixart" (16 heads of 72, 120 text tokens).
        latent: side of the latents; a token is 2 x 2 of them.
        depth: blocks; fewer than the original's (24, 28), which changes no block's cost.

    Raises:
        ConfigError: an unknown shape.
    """
    import diffusers

    draws = torch.Generator().manual_seed(0)
    more: dict[str, Any]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if shape == "sd3":
            made: Any = diffusers.SD3Transformer2DModel(
                sample_size=latent, num_layers=depth, num_attention_heads=24, attention_head_dim=64,
                joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
                pos_embed_max_size=max(latent // 2, 96),
            )  # fmt: skip
            text, width, more = 154, 4096, {"pooled_projections": torch.randn(1, 2048, generator=draws)}
        elif shape == "pixart":
            made = diffusers.PixArtTransformer2DModel(
                sample_size=latent, num_layers=depth, num_attention_heads=16, attention_head_dim=72,
                cross_attention_dim=1152, caption_channels=4096, use_additional_conditions=False,
            )  # fmt: skip
            text, width, more = 120, 4096, {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        else:
            raise ConfigError(f"shape is sd3 or pixart, got {shape!r}")
    made = made.to(device, dtype).eval()
    sample = torch.randn(1, made.config.in_channels, latent, latent, generator=draws).to(device, dtype)
    prompt = torch.randn(1, text, width, generator=draws).to(device, dtype)
    more = {name: value.to(device, dtype) if isinstance(value, torch.Tensor) else value for name, value in more.items()}

    moment = torch.tensor([500.0], device=device)

    @torch.inference_mode()
    def call() -> Any:
        return made(hidden_states=sample, encoder_hidden_states=prompt, timestep=moment, return_dict=False, **more)

    return made, call, text


def configs(ratio: float) -> dict[str, MethodConfig]:
    """What is timed: the packed methods, ToCa as published, and reusing all."""
    common: dict[str, Any] = dict(interval=1000, min_steps=0)
    return {
        "toca, packed": make_config("toca", ratio=ratio, warmup=2, **common),
        "ras": make_config("ras", ratio=ratio, warmup=2, **common),
        "cat": make_config("cat", ratio=ratio, warmup=2, **common),
        "toca, faithful": make_config("toca", ratio=ratio, mode="faithful", schedule="default", warmup=2, **common),
        "fora, all blocks": make_config("fora", what="stack", warmup=2, **common),
    }


def kept_steps(
    denoiser: nn.Module,
    call: Call,
    text: int,
    chosen: Mapping[str, MethodConfig],
    rounds: int = 10,
    progress: Callable[[str, float], None] | None = None,
) -> list[Kept]:
    """Time the steps of several methods, each with two full steps before a kept one.

    Args:
        denoiser, call, text: as `model` makes them.
        chosen: name -> config, with `warmup=2` and an interval that is never reached.
        rounds: in each, every method once and the unpatched model before and after it; the order turns round.

    Raises:
        ConfigError: no rounds. As `patch`.
    """
    if rounds < 1:
        raise ConfigError(f"timing needs at least one round, got {rounds}")
    tell = progress or (lambda what, share: None)
    device = next(denoiser.parameters()).device
    backbone: Any = backbone_of(denoiser)
    tell("profiling the unpatched model", 0.0)
    shares = profile(backbone.layout(denoiser).sites, call, rounds=3, warmup=1, device=device)
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in chosen}  # unpatched, full, kept
    facts: dict[str, tuple[int, int, float, float]] = {}
    names = list(chosen)
    for turn in range(rounds):
        for place, name in enumerate(names if turn % 2 == 0 else names[::-1]):
            tell(name, (turn + place / len(names)) / rounds)
            before = _seconds(call, device)
            with patched(denoiser, chosen[name]):
                driver: Driver = denoiser.__dict__["_tokred"]
                call()  # the first has nothing to compare with
                full, kept = _seconds(call, device), _seconds(call, device)
                if name not in facts:
                    facts[name] = _facts(driver, shares, text)
            after = _seconds(call, device)
            times[name].append(((before + after) / 2, full, kept))
    return [_kept(name, np.array(times[name]), *facts[name]) for name in names]


def _seconds(call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _facts(driver: Driver, shares: Shares, text: int) -> tuple[int, int, float, float]:
    """Of the last step: tokens, those computed, share of the FLOPs, and S*."""
    report: Any = driver.report
    step, (h, w) = report.steps[-1], driver.levels[0].grid or (0, 0)
    grids = {level.index: level.grid or (0, 0) for level in driver.levels}
    works = driver.method.works(driver.sites, grids)
    queries = [works[site.name].queries for site in driver.layout.sites if site.name in works]
    ideal = shares.ideal(driver.layout.sites, works, grids, text)
    return h * w, max(queries, default=h * w), step.flops / step.flops_dense, ideal


def _kept(name: str, times: np.ndarray, tokens: int, computed: int, share: float, ideal: float) -> Kept:
    plain, full, kept = (float(np.median(times[:, i])) for i in range(3))
    low, middle, high = (float(x) for x in np.quantile(times[:, 0] / times[:, 2], (0.25, 0.5, 0.75)))
    composed, composed_ideal = 3 * plain / (full + 2 * kept), 3 / (1 + 2 / ideal)
    return Kept(
        name, tokens, computed, full, kept, float(np.median(times[:, 1] / times[:, 0])), (low, middle, high), share,
        ideal, realised(middle, ideal), composed, realised(composed, composed_ideal),
    )  # fmt: skip


def rows(found: list[Kept]) -> Iterator[tuple[str, ...]]:
    """For a table: what was measured, as text."""
    for k in found:
        low, middle, high = k.speedup
        yield (
            k.method, f"{k.computed} of {k.tokens}", f"{k.overhead:.2f}x", f"{1 / middle:.3f}", f"{k.flop_share:.3f}",
            f"{middle:.2f}x ({low:.2f}-{high:.2f})", f"{k.ideal:.2f}x", "-" if k.phi is None else f"{k.phi:.2f}",
            f"{k.composed:.2f}x", "-" if k.composed_phi is None else f"{k.composed_phi:.2f}",
        )  # fmt: skip
