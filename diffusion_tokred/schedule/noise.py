"""The noise coordinate `u = sigma / (alpha + sigma)`: 1 is pure noise, 0 a clean picture.

A noisy latent is `alpha * picture + sigma * noise`. Schedulers write that down in four ways; `u` means the same for
all of them, whatever the number of steps, the shift or the strength of img2img:

    flow matching    table `sigmas`           alpha = 1 - sigma                    u = sigma
    variance preserving, and EDM: `sigmas`    ratio sigma / alpha in the table     u = sigma / (1 + sigma)
    DDPM and DDIM    `alphas_cumprod[t]`      alpha^2 = abar, sigma^2 = 1 - abar   u = sigma / (alpha + sigma)
    trigflow (SCM)   the timesteps, angles    alpha = cos t, sigma = sin t         u = sin t / (cos t + sin t)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UnsupportedError

_EPS = 1e-6


def log_snr(u: float) -> float:
    """`ln(alpha^2 / sigma^2) = 2 ln((1 - u) / u)`; +27.6 is clean, -27.6 noise, nan stays nan.

    `u` is clamped to [1e-6, 1 - 1e-6] first, so that schedules that start at pure noise (flow matching, zero terminal
    SNR) stay finite.
    """
    u = min(max(u, _EPS), 1 - _EPS) if u == u else u
    return 2 * math.log((1 - u) / u)


def noise_ratio(u: float) -> float:
    """`sigma / alpha = u / (1 - u)`, k-diffusion's sigma, for flow matching too; clamped as in `log_snr` to [1e-6,
    1e6].
    """
    u = min(max(u, _EPS), 1 - _EPS) if u == u else u
    return u / (1 - u)


def noise_levels(scheduler: Any, timesteps: Sequence[float] | None = None) -> list[float]:
    """`u` for every entry of the scheduler's timesteps, as evaluated by the model; plain floats in [0, 1].

    Both evaluations of a second-order step (Heun, KDPM2: `scheduler.order == 2`, entries `2k` and `2k + 1`) get the
    first one's `u`, so that a policy decides once a step. Reads tables of the scheduler to the host: call it once a
    run.

    Args:
        scheduler: a diffusers scheduler, or anything with the same tables, after `set_timesteps`.
        timesteps: its `timesteps` if the caller has them on the host already.

    Raises:
        UnsupportedError: the scheduler has no table from which the noise level can be read, or has no timesteps.
    """
    name = type(scheduler).__name__
    if timesteps is None:
        timesteps = _floats(getattr(scheduler, "timesteps", None))
    if not timesteps:
        raise UnsupportedError(f"{name} has no timesteps: call its set_timesteps(num_inference_steps) first")

    sigmas = _floats(getattr(scheduler, "sigmas", None))
    abar = _floats(getattr(scheduler, "alphas_cumprod", None))
    # A table with another length (ScoreSdeVe: one row a training step) is not indexed by step. KDPM2's is the longest
    # that is: N + 3.
    if sigmas and len(timesteps) <= len(sigmas) <= len(timesteps) + 3:
        levels = _from_sigmas(scheduler, sigmas[: len(timesteps)])
    elif abar:
        levels = [_from_abar(abar, t) for t in timesteps]
    elif _config(scheduler, "prediction_type") == "trigflow":
        levels = [math.sin(t) / (math.cos(t) + math.sin(t)) for t in timesteps]
    else:
        raise UnsupportedError(
            f"the noise level of {name} cannot be read: it needs `sigmas` with an entry for each of its"
            f" {len(timesteps)} timesteps (found {len(sigmas) or 'none'}), or `alphas_cumprod` with one for each"
            " training step (found none)"
        )
    levels = [min(max(u, 0.0), 1.0) for u in levels]
    if getattr(scheduler, "order", 1) == 2:
        levels = [levels[i - i % 2] for i in range(len(levels))]
    return levels


def is_flow(scheduler: Any) -> bool:
    """Whether the `sigmas` table is that of flow matching: noise shares in [0, 1] rather than ratios of noise to
    signal.

    `prediction_type` does not tell: with "flow_prediction" but without `use_flow_sigmas`, DPM-Solver++ still has a
    ratio table.
    """
    flag = _config(scheduler, "use_flow_sigmas")
    if flag is not None:
        return bool(flag)
    if "FlowMatch" in type(scheduler).__name__:
        return True
    # Newer flow schedulers have other names. What sets them apart from EDM's: they scale neither the input nor the
    # first noise.
    sigmas = _floats(getattr(scheduler, "sigmas", None))
    scales = any(getattr(scheduler, table, None) is not None for table in ("alphas_cumprod", "init_noise_sigma"))
    return bool(sigmas) and not scales and min(sigmas) >= 0 and max(sigmas) <= 1 + _EPS


def _from_sigmas(scheduler: Any, sigmas: list[float]) -> list[float]:
    if not is_flow(scheduler):
        return [s / (1 + s) if s < math.inf else 1.0 for s in sigmas]
    if _config(scheduler, "invert_sigmas"):  # Mochi: the table holds the share of signal
        return [1 - s for s in sigmas]
    return sigmas


def _from_abar(abar: list[float], t: float) -> float:
    """Exact at the training timesteps; between them linear in `u`, which stays finite where the last ᾱ is 0."""

    def level(i: int) -> float:
        a = min(max(abar[min(max(i, 0), len(abar) - 1)], 0.0), 1.0)
        alpha, sigma = math.sqrt(a), math.sqrt(1 - a)
        return sigma / (alpha + sigma)

    low = math.floor(t)
    return level(low) if t == low else level(low) + (t - low) * (level(low + 1) - level(low))


def _floats(table: Any) -> list[float]:
    """A tensor, array or list as host floats; [] if there is none."""
    if table is None:
        return []
    table = table.tolist() if hasattr(table, "tolist") else list(table)
    return [float(x) for x in table] if isinstance(table, list) else [float(table)]


def _config(scheduler: Any, key: str) -> Any:
    config = getattr(scheduler, "config", None)
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
