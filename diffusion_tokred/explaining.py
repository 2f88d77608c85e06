"""`explain`: what a method would do to a pipeline, counted without running it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .backbones.base import Backbone, default_of
from .driver import Driver
from .errors import ConfigError, UnsupportedError
from .methods import MethodConfig, make_method
from .patching import denoisers, plan, resolve, rule_of
from .runtime.regions import Regions
from .runtime.site import Site
from .runtime.work import Work
from .schedule.noise import noise_levels
from .schedule.policy import Policy

MIN_CEILING = 1.05  # below it a method cannot pay
MIN_TOKENS = 1000  # of a level: below it launches and copies eat what is saved
_ATTENTION_CEILING = 1.25  # attention-only methods on UNets with less than this: say what flash attention leaves


@dataclass(frozen=True)
class SiteLine:
    """A site. `tokens`: of the image; `queries`, `keys`: rows left of them (text tokens, where only those are keys).

    `reason`: why the method leaves it alone, None where it acts. FLOPs are those of the step shown.
    """

    name: str
    kind: str
    level: int
    block: int
    reason: str | None
    tokens: int
    queries: int
    keys: int
    flops_dense: int
    flops: int


@dataclass(frozen=True)
class LevelLine:
    """A level: its grid (h, w), and `queries` and `keys` left of its `tokens` at the `used` of its `sites`."""

    level: int
    grid: tuple[int, int]
    tokens: int
    queries: int
    keys: int
    sites: int
    used: int


@dataclass(frozen=True)
class StepLine:
    """A step of the plan. `fresh`: a decision that is kept over steps (a matching, say) is made anew."""

    index: int
    u: float
    mode: str
    ratio: float
    fresh: bool
    flops: int


@dataclass(frozen=True)
class Explanation:
    """What a method would do; nothing was run, nothing was timed. FLOPs (2 a multiply-add) are of the whole batch.

    Attributes:
        method, config, model: as in `Report`.
        height, width: of the latents; batch: rows of a step, guidance included; text_tokens: of a prompt.
        calls: denoiser calls that `flops` adds up: 1, or the steps of the run.
        sites, levels: see their classes; with several steps, at the step with the largest ratio.
        flops: kind of site -> (dense, reduced), with "method" (what the method spends itself, on matching), "rest"
            (outside of sites) and "total".
        ceiling: the FLOP ratio if what the method touches cost nothing.
        cache_bytes: the most that it keeps from step to step.
        steps: the plan step by step, if `num_inference_steps` was given.
        warnings: sentences.
    """

    method: str
    config: dict[str, Any]
    model: str
    height: int
    width: int
    batch: int
    text_tokens: int
    calls: int
    sites: tuple[SiteLine, ...]
    levels: tuple[LevelLine, ...]
    flops: dict[str, tuple[int, int]]
    ceiling: float
    cache_bytes: int
    steps: tuple[StepLine, ...]
    warnings: tuple[str, ...]

    @property
    def flop_ratio(self) -> float:
        """Dense FLOPs / reduced FLOPs. Not a speed-up."""
        dense, reduced = self.flops["total"]
        return dense / reduced

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, with `flop_ratio`."""
        data = asdict(self) | {"flop_ratio": self.flop_ratio}
        for name in ("sites", "levels", "steps", "warnings"):
            data[name] = list(data[name])
        data["levels"] = [line | {"grid": list(line["grid"])} for line in data["levels"]]
        data["flops"] = {kind: list(pair) for kind, pair in self.flops.items()}
        data["steps"] = [s | {"u": None if math.isnan(s["u"]) else s["u"]} for s in data["steps"]]
        return data

    def table(self) -> str:
        """Plain text."""
        what = "one denoiser call" if self.calls == 1 else f"{self.calls} denoiser calls"
        lines = [
            f"{self.method} on {self.model}: latents {self.height}x{self.width}, batch {self.batch}, "
            f"{self.text_tokens} text tokens, {what}",
            "",
            f"{'level':>5} {'grid':>9} {'tokens':>8} {'queries':>8} {'keys':>8} {'sites used':>12}",
        ]
        for v in self.levels:
            grid, used = f"{v.grid[0]}x{v.grid[1]}", f"{v.used} of {v.sites}"
            lines.append(f"{v.level:>5} {grid:>9} {v.tokens:>8} {v.queries:>8} {v.keys:>8} {used:>12}")
        lines += ["", f"{'GFLOP':>16} {'dense':>12} {'reduced':>12} {'saved':>7}"]
        for kind, (dense, reduced) in self.flops.items():
            saved = f"{1 - reduced / dense:.1%}" if dense else "-"
            lines.append(f"{kind:>16} {dense / 1e9:>12.3f} {reduced / 1e9:>12.3f} {saved:>7}")
        lines += [
            "",
            f"FLOP ratio {self.flop_ratio:.3f}x, ceiling {self.ceiling:.3f}x (if what {self.method} touches cost "
            "nothing). FLOP ratios are not speed-ups.",
            f"Kept from step to step: {self.cache_bytes:,} bytes.",
        ]
        if reasons := Counter(site.reason for site in self.sites if site.reason):
            lines += ["", "Left alone:", *(f"{n:>5} x {reason}" for reason, n in reasons.items())]
        if self.steps:
            lines += ["", f"{'step':>5} {'u':>6} {'mode':>8} {'ratio':>6} {'GFLOP':>12}"]
            for s in self.steps:
                u = "-" if math.isnan(s.u) else f"{s.u:.3f}"
                lines.append(f"{s.index:>5} {u:>6} {s.mode:>8} {s.ratio:>6.3f} {s.flops / 1e9:>12.3f}")
        return "\n".join([*lines, *(["", *(f"! {text}" for text in self.warnings)] if self.warnings else [])])

    def __str__(self) -> str:
        return self.table()


def explain(
    target: Any,
    config: MethodConfig | None = None,
    *,
    method: str | None = None,
    policy: Any = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    batch_size: int = 1,
    guidance: bool | None = None,
    dtype: torch.dtype | None = None,
    text_tokens: int | None = None,
    num_frames: int | None = None,
    protect: Any = None,
    **options: Any,
) -> Explanation:
    """Say what `patch` with these arguments would do, and what it would save. Runs nothing and changes nothing.

    Args:
        target, config, method, policy, protect, options: as in `patch`.
        height, width: in pixels for a pipeline, of the latents for a denoiser; default: the pipeline's own, or the
            denoiser's native size.
        num_inference_steps: count a run of so many steps, planned with a copy of the pipeline's scheduler; else one
            denoiser call, at the policy's largest ratio.
        batch_size: images at a time.
        guidance: whether each image has a conditional and an unconditional row; default: what the pipeline does when it
            is not told. FLUX and models that take the scale of the guidance as an input have one row.
        dtype: of what is kept from step to step; default: the denoiser's.
        text_tokens: of a prompt, without rows that the model adds; default: what the pipeline pads its prompts to.
        num_frames: of a video, of its latents for a denoiser; default: the pipeline's own.

    Raises:
        ConfigError, UnsupportedError: as `patch`; or a size, or a number, that cannot be.
    """
    config = resolve(config, method, options)
    rule = rule_of(config, policy)
    counts = {"batch_size": batch_size, "num_inference_steps": num_inference_steps, "num_frames": num_frames}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    denoiser: Any = denoisers(target)[0]
    regions = Regions(protect)
    driver = plan(denoiser, make_method(config), rule, 0, None, None, regions)
    backbone = driver.backbone
    h, w = _latent_size(target, denoiser, backbone, height, width)
    frames = backbone.frames(target, num_frames)
    h *= frames  # a video is its frames, one below another
    text = backbone.prompt(denoiser, target) if text_tokens is None else text_tokens
    if guidance is None:
        guidance = backbone.guided(denoiser, target)
    levels = driver.layout.levels
    grids = {v.index: g for v, g in zip(levels, backbone.grids(denoiser, h, w), strict=True)}
    for level in driver.levels:
        level.grid = grids[level.index]
        regions.arrive(level, batch_size, frames, torch.device("cpu"))
    count = _Count(driver, h, w, batch_size * (2 if guidance else 1), text, grids, dtype or denoiser.dtype)
    if num_inference_steps is None:
        noise = [_strongest(rule)]
    else:
        noise = _noise(target, backbone, rule, num_inference_steps, math.prod(grids[levels[0].index]))
    for index, u in enumerate(noise):
        count.step(index, u, len(noise) if num_inference_steps else None)
    return count.explanation(_warnings(count, rule, num_inference_steps), bool(num_inference_steps))


class _Count:
    """Adds up the steps of a dry run."""

    def __init__(
        self, driver: Driver, height: int, width: int, batch: int, text: int, grids: dict[int, tuple[int, int]],
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.driver, self.grids, self.dtype = driver, grids, dtype
        self.text = text
        self.size = (height, width, batch, driver.backbone.beside(driver.denoiser, text, height, width), grids)
        self.dense = driver.flops.parts(*self.size)
        self.reduced = dict.fromkeys(self.dense, 0)
        self.touched = 0  # FLOPs of the dense steps at the sites that are reduced
        self.bytes = 0
        self.steps: list[StepLine] = []
        self.grown: list[str] = []  # what is done for protected tokens
        self.works: dict[str, Work] = {}  # at the step with the largest ratio

    def step(self, index: int, u: float, total: int | None) -> None:
        """Plan a step as `Driver.before` does, and count it. Without a `total`: one after the first ones."""
        driver, method = self.driver, self.driver.method
        if total is None:
            index = max(getattr(method.config, "warmup", 0), 1)
            for level in driver.levels:
                level.memory.clock.turn(index - 1, "full")
        driver.decide(index, total, u)
        if driver.spared and driver.growth() not in self.grown:
            self.grown.append(driver.growth())
        active = [site for site in driver.sites if site.plan.mode != "full"]
        fresh = [site for site in active if site.leader and site.plan.refresh]
        for site in fresh:
            site.level.memory.index, site.level.memory.text = index, site.plan.text
        try:
            works = method.works(driver.sites, self.grids)
        except (ConfigError, UnsupportedError):
            raise
        except ValueError as error:  # the tokens' floor says what a grid is too small for
            raise ConfigError(f"{method.name} at latents of {self.size[0]}x{self.size[1]}: {error}") from error
        parts = driver.flops.parts(*self.size, works)
        self.reduced = {kind: n + parts[kind] for kind, n in self.reduced.items()}
        self.touched += sum(self.flops(part) for site in active for part in (site, *site.inner))
        self.touched += self.dense["rest"] - parts["rest"]  # what lies between the sites and is left out with them
        batch, dtype = self.size[2], method.store or self.dtype
        stored = [
            method.stored(site, self.grids[site.level.index], site.plan.ratio, batch, dtype, self.size[3])
            for site in (driver.sites if driver.keeping(total) else active)
        ]
        self.bytes = max(self.bytes, sum(stored))
        mode, ratio = driver.decided
        if not self.steps or ratio > max(step.ratio for step in self.steps):
            self.works = works
        self.steps.append(StepLine(index, u, mode, ratio, bool(fresh), sum(parts.values())))

    def flops(self, site: Site, work: Work | None = None) -> int:
        """FLOPs of a site, dense or not."""
        _, _, batch, text, _ = self.size
        return self.driver.flops.site(site, work or Work(math.prod(self.grids[site.level.index])), batch, text)

    @property
    def ceiling(self) -> float:
        dense = sum(self.dense.values()) * len(self.steps)
        return dense / (dense - self.touched)

    def explanation(self, warnings: list[str], steps: bool) -> Explanation:
        driver, calls = self.driver, len(self.steps)
        pairs = [site for site in driver.layout.pairs if site in driver.sites]
        sites = tuple(self._site(site) for site in (*pairs, *driver.layout.sites))
        flops = {kind: (calls * n, self.reduced[kind]) for kind, n in self.dense.items()}
        flops["total"] = (calls * sum(self.dense.values()), sum(self.reduced.values()))
        height, width, batch, _, _ = self.size
        return Explanation(
            method=driver.method.name,
            config=driver.method.config.to_dict(),
            model=type(driver.denoiser).__name__,
            height=height,
            width=width,
            batch=batch,
            text_tokens=self.text,
            calls=calls,
            sites=sites,
            levels=tuple(self._level(level.index, sites) for level in driver.layout.levels),
            flops=flops,
            ceiling=self.ceiling,
            cache_bytes=self.bytes,
            steps=tuple(self.steps) if steps else (),
            warnings=tuple(warnings),
        )

    def _site(self, site: Site) -> SiteLine:
        tokens = math.prod(self.grids[site.level.index])
        work = self.works.get(site.name) or Work(tokens)
        used = any(site is part for other in self.driver.sites for part in (other, *other.inner))
        return SiteLine(
            name=site.name,
            kind=site.kind,
            level=site.level.index,
            block=site.block.index,
            reason=None if used else self.driver.method.leaves(site),
            tokens=tokens,
            queries=work.queries,
            keys=self.size[3] if site.kind == "cross_attention" else work.keys,
            flops_dense=self.flops(site),
            flops=self.flops(site, work),
        )

    def _level(self, index: int, sites: tuple[SiteLine, ...]) -> LevelLine:
        here = [site for site in sites if site.level == index]
        used = [site for site in here if site.reason is None]
        tokens = here[0].tokens
        keys = min([site.keys for site in used if site.kind != "cross_attention"], default=tokens)
        queries = min([site.queries for site in used], default=tokens)
        return LevelLine(index, self.grids[index], tokens, queries, keys, len(here), len(used))


def _warnings(count: _Count, rule: Policy, num_inference_steps: int | None) -> list[str]:
    """What somebody should know before paying for a run."""
    driver, name, found = count.driver, count.driver.method.name, []
    if not count.works:
        if num_inference_steps and not rule.is_dense and driver.method.keeps:
            return [driver.method.rests(len(count.steps)) or f"nothing is reduced: {name} computes all steps in full"]
        return [f"nothing is reduced: the ratio is 0 at {'every step' if num_inference_steps else 'every noise level'}"]
    if driver.method.unforeseen:
        found.append(driver.method.unforeseen)
    for level in driver.levels:
        if level.guard is not None:
            tokens = math.prod(count.grids[level.index])
            found.append(f"protect: up to {level.guard.most()} of {tokens} tokens of a picture at level {level.index}")
    found += count.grown
    if not rule.is_constant and num_inference_steps is None:
        found.append(
            "the policy changes with the noise level: this is one call at its largest ratio; for the whole run give "
            "num_inference_steps"
        )
    if count.ceiling < MIN_CEILING:
        found.append(
            f"this cannot pay here: if what {name} touches cost nothing, the FLOP ratio would be {count.ceiling:.3f}x"
        )
    if sum(count.reduced.values()) >= sum(count.dense.values()) * len(count.steps):
        found.append(f"this costs more FLOPs than it saves: {name} spends {count.reduced['method'] / 1e9:.3f} GFLOP")
    for index in sorted({site.level.index for site in driver.sites}):
        if (tokens := math.prod(count.grids[index])) < MIN_TOKENS:
            found.append(
                f"level {index} has {tokens} tokens: below about {MIN_TOKENS:,}, overheads eat what reduction saves"
            )
    only_attention = {site.kind for site in driver.sites} == {"attention"}
    if only_attention and driver.backbone.name == "unet" and MIN_CEILING <= count.ceiling < _ATTENTION_CEILING:
        found.append(
            "only self-attention is reduced, which is little of a UNet at this size: with flash attention such methods "
            "gain at most 1.15x on SD1.5 at 512x512 and 1.11x on SDXL at 1024x1024; larger pictures gain more"
        )
    return found


def _latent_size(
    target: Any, denoiser: Any, backbone: Backbone, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width of the latents."""
    is_pipe = not isinstance(target, nn.Module)
    scale = _scale(target) if is_pipe else 1
    native = denoiser.config.get("sample_size") or getattr(target, "default_sample_size", None)
    sides: list[Any] = list(native) if isinstance(native, (tuple, list)) else [native, native]
    for place, (name, value) in enumerate((("height", height), ("width", width))):
        own = default_of(target, name)
        if own and not (sides[place] and default_of(target, "use_resolution_binning")):  # that ends at the native size
            sides[place] = own // scale
        if sides[place] is None and backbone.native and is_pipe:
            sides[place] = backbone.native // scale
        if value is not None:
            if value < scale or value % scale:
                raise ConfigError(f"{name} must be a multiple of {scale} pixels here, got {value}")
            if backbone.only_native and is_pipe and value != sides[place] * scale:
                raise ConfigError(
                    f"{type(target).__name__} makes pictures of {sides[0] * scale}x{sides[1] * scale} pixels only, "
                    f"got {name}={value}"
                )
            sides[place] = value // scale
        if sides[place] is None:
            raise ConfigError(f"this {type(denoiser).__name__} has no native size: give height and width")
    return int(sides[0]), int(sides[1])


def _scale(pipe: Any) -> int:
    """Pixels of a latent's side."""
    for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
        if known := getattr(pipe, name, None):
            return int(known)
    halvings = getattr(getattr(pipe, "vae", None), "config", {}).get("block_out_channels", (0,) * 4)
    return int(2 ** (len(halvings) - 1))


def _strongest(rule: Policy) -> float:
    """The noise level at which a policy leaves out most."""
    levels = [i / 100 for i in range(101)] if rule.function else [u for u, _, _ in rule.points] or [1.0]
    return max(levels, key=lambda u: rule.at(u)[1])


def _noise(target: Any, backbone: Backbone, rule: Policy, steps: int, tokens: int) -> list[float]:
    """The noise level at each step of a run, nan where unknown, from a copy of the pipeline's scheduler.

    `tokens`: of the picture.
    """
    scheduler = copy.deepcopy(getattr(target, "scheduler", None))
    if scheduler is None:
        if not rule.is_constant:
            raise ConfigError("the policy depends on the noise level, and only a pipeline's scheduler knows it: "
                              "explain the pipeline, not its denoiser")  # fmt: skip
        return [math.nan] * steps
    backbone.timesteps(target, scheduler, steps, tokens)
    try:
        return noise_levels(scheduler)
    except UnsupportedError:  # as in a run: a policy that needs to know will say so
        return [math.nan] * len(scheduler.timesteps)
