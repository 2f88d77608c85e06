"""`explain`: what a method would do to a pipeline, counted without running it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .auto import AUTO, file_of
from .backbones.base import Backbone, default_of
from .defaults import measured_default, origin
from .driver import Driver
from .errors import ConfigError, UnsupportedError
from .explanation import Explanation, LevelLine, SiteLine, StepLine
from .measure.operations import operations
from .measure.prediction import Prediction, seconds
from .measure.roofline import Calibration, calibration
from .methods import MethodConfig, make_method
from .patching import denoisers, plan
from .ruling import settle
from .runtime.regions import Regions, growth
from .runtime.site import Site
from .runtime.work import Work
from .schedule.noise import noise_levels
from .schedule.policy import Policy
from .schedule.rules import Rule

MIN_CEILING = 1.05  # below it a method cannot pay
MIN_TOKENS = 1000  # of a level: below it launches and copies eat what is saved
_ATTENTION_CEILING = 1.25  # attention-only methods on UNets with less than this: say what flash attention leaves


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
    time: bool | Calibration = False,
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
        time: predict the time too, on the denoiser's device: by a calibration of it, which takes up to a minute the
            first time and is kept in the user's cache folder; or by the one given.

    Raises:
        ConfigError, UnsupportedError: as `patch`; or a size, or a number, that cannot be.
    """
    bare = config is None and policy is None and not options
    config, rule = settle(config, method, options, policy, denoisers(target)[0], target)
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
    if time is True:
        time = calibration(denoiser.device, dtype or denoiser.dtype)
    for level in driver.levels:
        level.grid = grids[level.index]
        regions.arrive(level, batch_size, frames, torch.device("cpu"))
    count = _Count(
        driver, h, w, batch_size * (2 if guidance else 1), text, grids, dtype or denoiser.dtype, time or None
    )
    if num_inference_steps is None:
        noise = [_strongest(rule)]
    else:
        noise = _noise(target, backbone, rule, num_inference_steps, math.prod(grids[levels[0].index]))
    for index, u in enumerate(noise):
        count.step(index, u, len(noise) if num_inference_steps else None)
    found = count.explanation(_warnings(count, rule, num_inference_steps), bool(num_inference_steps))
    if method == AUTO and (file := file_of(denoiser)).exists():
        return replace(found, default=f"tuned: {file}")
    if not bare:
        return found
    chosen = measured_default(config.name, backbone.name)
    none = f"no measured default for {config.name} on {backbone.name}: the method's own, {driver.method.paper}"
    if method == AUTO:
        none = f"nothing tuned for this model: the default for its kind, {driver.method.paper}"
    return replace(found, default=none if chosen is None else origin(chosen))


class _Count:
    """Adds up the steps of a dry run."""

    def __init__(
        self, driver: Driver, height: int, width: int, batch: int, text: int, grids: dict[int, tuple[int, int]],
        dtype: torch.dtype, calibration: Calibration | None = None,
    ) -> None:  # fmt: skip
        self.driver, self.grids, self.dtype, self.calibration = driver, grids, dtype, calibration
        self.text = text
        self.size = (height, width, batch, driver.backbone.beside(driver.denoiser, text, height, width), grids)
        self.dense = driver.flops.parts(*self.size)
        self.reduced = dict.fromkeys(self.dense, 0)
        self.touched = 0  # FLOPs of the dense steps at the sites that are reduced
        self.bytes = 0
        self.steps: list[StepLine] = []
        self.seconds = dict.fromkeys(self.dense, 0.0)
        self.grown: list[str] = []  # what is done for protected tokens
        self.works: dict[str, Work] = {}  # at the step with the largest ratio
        self.groups = _groups(driver)

    def step(self, index: int, u: float, total: int | None) -> None:
        """Plan a step as `Driver.before` does, and count it. Without a `total`: one after the first ones."""
        driver, method = self.driver, self.driver.method
        if total is None:
            index = max(getattr(method.config, "warmup", 0), 1)
            for level in driver.levels:
                level.memory.clock.turn(index - 1, "full")
        driver.decide(index, total, u)
        if driver.spared and growth(driver.spared) not in self.grown:
            self.grown.append(growth(driver.spared))
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
        counted = driver.flops.parts(*self.size, works)
        self.reduced = {kind: n + counted[kind] for kind, n in self.reduced.items()}
        for kind, part in self.predicted(works).items():
            self.seconds[kind] += part
        self.touched += sum(self.flops(part) for site in active for part in (site, *site.inner))
        self.touched += self.dense["rest"] - counted["rest"]  # what lies between the sites and is left out with them
        batch, dtype = self.size[2], method.store or self.dtype
        stored = [
            method.stored(site, self.grids[site.level.index], site.plan.ratio, batch, dtype, self.size[3])
            for site in (driver.sites if driver.keeping(total) else active)
        ]
        self.bytes = max(self.bytes, sum(stored))
        mode, ratio = driver.shown(self.grids)
        parts = tuple(
            driver.realised(site.plan.mode, site.plan.ratio, self.grids[site.level.index])
            for site in self.groups.values()
        )
        if not self.steps or ratio > max(step.ratio for step in self.steps):
            self.works = works
        self.steps.append(StepLine(index, u, mode, ratio, bool(fresh), sum(counted.values()), parts))

    def predicted(self, works: dict[str, Work]) -> dict[str, float]:
        """Seconds of a call by kind of site, if they are to be predicted."""
        if self.calibration is None:
            return {}
        return seconds(self.calibration, operations(self.driver.flops, *self.size, self.dtype.itemsize, works))

    @property
    def time(self) -> Prediction | None:
        c, calls = self.calibration, len(self.steps)
        if c is None:
            return None
        parts = {kind: (calls * part, self.seconds[kind]) for kind, part in self.predicted({}).items()}
        return Prediction(c.device, c.dtype, parts)

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
            time=self.time,
            groups=tuple(self.groups),
            asked=tuple(
                driver.policy.asked(site.level.index, site.kind, site.block.index)
                for site in self.groups.values() or driver.sites[:1]
            ),
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


def _groups(driver: Driver) -> dict[str, Site]:
    """Where the policy has rules: the first site of those that go by the same points."""
    policy = driver.policy
    first: dict[Rule | None, Site] = {}
    for site in driver.sites if policy.rules else ():
        first.setdefault(policy.rule(site.level.index, site.kind, site.block.index), site)
    return {str(rule or "other sites"): first[rule] for rule in (*policy.rules, None) if rule in first}


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
    if count.time is not None and count.time.verdict:
        found.append(count.time.verdict)
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
    lists = (rule.points, *(r.points for r in rule.rules))
    levels = [i / 100 for i in range(101)] if rule.function else [u for points in lists for u, _, _ in points] or [1.0]
    return max(levels, key=lambda u: max(ratio for _, ratio in rule.everywhere(u)))


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
