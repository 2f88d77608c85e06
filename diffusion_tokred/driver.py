"""The root driver: one a patched denoiser. It decides eagerly, before each call, what the leaves will do.

It stands in two native hooks on the denoiser (never in its `forward`: accelerate replaces that after every call), and
shadows two methods of it: `_reset_stateful_cache`, which pipelines call at the end of a run, and `cache_context`, which
names the passes of a step.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .backbones import Backbone, Layout
from .errors import ConfigError
from .measure.flops import Flops
from .measure.timing import synchronize
from .methods import Method
from .runtime.ledger import Ledger
from .runtime.record import TokenRecord
from .runtime.regions import Regions, growth
from .runtime.site import BlockKeeper, GridKeeper, Level, Site
from .runtime.stats import Report, StepRecord
from .runtime.store import Memory
from .runtime.tracker import StepInfo, Tracker
from .schedule.policy import Policy
from .tokens import mix

RECORDS = (None, "time", "tokens")
_WORDS = ("encoder_hidden_states", "encoder_hidden_states_image", "class_labels")  # arguments that say what is drawn
# The last finished run of each denoiser, kept here and not on the model: unpatching leaves nothing on the model, and
# the report is still wanted then.
REPORTS: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


class Driver:
    """A method at work on one denoiser."""

    def __init__(
        self,
        denoiser: nn.Module,
        backbone: Backbone,
        layout: Layout,
        sites: list[Site],
        method: Method,
        policy: Policy,
        seed: int,
        record: str | None,
        budget: int | None = None,
        regions: Regions | None = None,
    ) -> None:
        self.budget = budget  # bytes that may be kept from step to step
        self.regions = regions or Regions()
        self.denoiser, self.backbone, self.layout, self.sites = denoiser, backbone, layout, sites
        self.method, self.policy, self.seed, self.record = method, policy, seed, record
        self.levels = [level for level in layout.levels if any(site.level is level for site in sites)]
        self.needs = {site.kind: method.needs(site.kind) for site in sites}
        for site in sites:
            for inner in site.inner:  # what lies inside of a site goes by its plan
                inner.plan = site.plan
        method.begin(backbone.name, sites)
        self.tracker = Tracker(denoiser)
        self._names = [*inspect.signature(type(denoiser).forward).parameters][1:]  # of the denoiser's arguments
        self.ledger = Ledger()
        self.flops = Flops(backbone, denoiser, layout.sites, layout.pairs)
        self.report: Report | None = None
        self.info: StepInfo | None = None
        self._allowed: set[tuple[str, float]] = set()
        self._memories: dict[tuple[Any, ...], Memory] = {}
        self.decided, self.decider = ("full", 0.0), 0  # mode and ratio of the step, and the level that they are of
        self.spared: dict[int, tuple[float, float]] = {}  # level -> ratio asked for, and at most done: of this step
        self._tokens = TokenRecord()
        self._counts: dict[tuple[Any, ...], tuple[str, float, int, int, int, int]] = {}
        self._started, self._told = 0.0, False
        self._thread: int | None = None  # the one whose step is on

    # --- installing and removing ---------------------------------------------------------------------------------

    def install(self) -> None:
        """Change the denoiser. Everything goes through the ledger."""
        for module, level in self.layout.images:
            if level in self.levels:
                self.ledger.wrap(GridKeeper(module, level))
        for site in self.sites:
            self.act(site)
        if self.method.watches_input:  # outermost, for the sites that are whole blocks
            for block in {id(site.block): site.block for site in self.sites}.values():
                self.ledger.wrap(BlockKeeper(block))
        self.ledger.hook(self.denoiser.register_forward_pre_hook(self.before, with_kwargs=True))
        self.ledger.hook(self.denoiser.register_forward_hook(self.after, with_kwargs=True, always_call=True))
        self._end_run: Any = getattr(self.denoiser, "_reset_stateful_cache", None)
        self.ledger.shadow(self.denoiser, "_reset_stateful_cache", self.end_run)
        if hasattr(self.denoiser, "cache_context"):
            self._context: Any = self.denoiser.cache_context
            self.ledger.shadow(self.denoiser, "cache_context", self.cache_context)
        self.ledger.shadow(self.denoiser, "_tokred", self)

    def act(self, site: Site) -> None:
        """Make the method act at a site."""
        for wrapper in site.wrappers(self.method):
            self.ledger.wrap(wrapper)

    def remove(self) -> list[str]:
        """Undo it. Returns what had to stay, inert, because another tool lies over it."""
        self._leave()
        self._close()
        return self.ledger.revert()

    # --- a step --------------------------------------------------------------------------------------------------

    # Dynamo leaves root hooks out of the model's graph, but would compile them as frames of their own.
    @torch.compiler.disable
    def before(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the denoiser: where are we, and what shall each site do."""
        info = self.tracker.step(args, kwargs)
        self._thread = threading.get_ident()
        if info.new_run:
            self._close()
            self.report = Report(self.method.name, self.method.config.to_dict(), type(denoiser).__name__)
            self.regions.begin()
            self._counts.clear()  # projections may have been fused
            if not getattr(self.policy, "is_dense", False) and (reason := self.method.rests(info.total)):
                warnings.warn(reason, stacklevel=2)
            self._told = False
        self.info = info
        inputs = self._inputs(args, kwargs)
        sample = self.backbone.latent(inputs)
        self.backbone.observe(self.layout, denoiser, inputs)
        frames = self.backbone.stacked(self.layout, inputs)
        for level in self.levels:
            self.regions.arrive(level, info.batch // info.halves, frames, sample.device, info)
        self._remember(info, inputs, sample.device)
        self.decide(info.index, info.total, info.u)
        if self.spared and not self._told:
            self._told = True
            warnings.warn(growth(self.spared), stacklevel=2)
        for site in self.sites:
            if not site.plan.idle:
                site.check(inputs)
            site.enter(self.needs[site.kind])
        self._prepare(info)
        if self.record == "time":
            synchronize(sample.device)
            self._started = time.perf_counter()

    @torch.compiler.disable
    def after(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the denoiser, also after an exception: close the step."""
        if self._thread != threading.get_ident():
            return  # refused in `before`: another thread's step is on, and not to be touched
        self._leave()
        if output is None:  # broken off: what was kept is new in part
            self._memories.clear()
        if output is None or self.report is None or self.info is None:
            return
        if self.decided[0] != "full" and all(site.plan.mode == "full" for site in self.sites):
            self.decided = ("full", 0.0)  # as a site found out inside of the call
            for level in self.levels:
                level.memory.clock.amend(self.info.index)
        inputs = self._inputs(args, kwargs)
        seconds = None
        if self.record == "time":
            synchronize(self.backbone.latent(inputs).device)
            seconds = time.perf_counter() - self._started
        if self.method.watches_output and self.keeping(self.info.total):
            tokens = self.backbone.tokens(self.layout, inputs, output)
            self.method.observe(self.levels[0], tokens, self.info.index)
        self.report.steps.append(self._record(self.info, inputs, seconds))
        if self.record == "tokens":
            self._tokens.add(self.info, self.levels)

    def finish(self, whole: bool = True) -> None:
        """The run, if one is on, is over, or was broken off: the next call begins another."""
        if self.tracker.finish():
            self._close(finished=whole)

    def end_run(self, *args: Any, **kwargs: Any) -> None:
        """In the place of `_reset_stateful_cache`: the pipeline says that the run is over."""
        self.finish()
        if self._end_run is not None:
            self._end_run(*args, **kwargs)

    @contextlib.contextmanager
    def cache_context(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """In the place of the denoiser's: remember the name of the pass."""
        before, self.tracker.context = self.tracker.context, str(args[0] if args else kwargs.get("name"))
        try:
            with self._context(*args, **kwargs) as value:
                yield value
        except KeyboardInterrupt:  # it passes no hook of torch's
            self._leave()
            self.finish(False)
            raise
        finally:
            self.tracker.context = before

    def _leave(self) -> None:
        """Out of the denoiser's call. (A KeyboardInterrupt does not pass `after`: it comes here from `cache_context`,
        where the pipeline has one, else from the next call or from `remove`.)"""
        self._thread = None
        for site in self.sites:
            site.leave()
            site.level.running = False
            site.block.input = site.block.scratch = None

    # --- what is decided, and kept --------------------------------------------------------------------------------

    def _remember(self, info: StepInfo, inputs: dict[str, Any], device: torch.device) -> None:
        """Give each level the memory of this pass. What is kept is kept for these tokens: a call of another size, or
        with another prompt, has one of its own."""
        keeps = self.keeping(info.total)
        text = int(self.backbone.text(self.denoiser, inputs))
        words = tuple(inputs.get(name) for name in _WORDS) if keeps else ()
        for level in self.levels:
            level.halves, level.status, level.recording = info.halves, None, self.record == "tokens"
            level.scratch, level.running, level.at = {}, True, None
            level.key = torch.full((), mix(self.seed, info.index, level.index), dtype=torch.int64, device=device)
            passes = "" if self.method.shares_passes else info.pass_key
            key = (level.index, passes, info.batch, level.grid, text if keeps else 0, device)
            if key not in self._memories or not self._memories[key].serves(words):
                if keeps:  # of no use any more
                    self._memories = {k: memory for k, memory in self._memories.items() if k[:2] != key[:2]}
                self._memories[key] = memory = self._memory(level, info.batch, text) if keeps else Memory()
                memory.words = words
            level.memory = self._memories[key]
            if keeps:
                clock, noise = level.memory.clock, self.method.coordinate == "noise"
                clock.arrive(info.index, info.u)
                earlier = [step for step in clock.kinds if step < info.index]
                gaps = (
                    clock.since(info.index, clock.full, noise),
                    clock.since(info.index, max(earlier, default=None), noise),
                )
                level.gap, level.pace = torch.tensor(gaps, dtype=torch.float32, device=device).unbind()

    def _memory(self, level: Level, batch: int, text: int) -> Memory:
        """A new pass's, with slots for its sites. Refused if there is no room for it.

        Raises:
            ConfigError: what would be kept is more than `cache_budget`.
        """
        memory = Memory()
        sites = [site for site in self.sites if site.level is level]
        for site in sites:
            memory.slots |= site.slots()
        if self.budget is not None and level.grid is not None:
            ratio, dtype = self.method.config.share, self.method.store or dtype_of(self.denoiser)
            memory.need = sum(self.method.stored(site, level.grid, ratio, batch, dtype, text) for site in sites)
            need = memory.need + sum(other.need for other in self._memories.values())
            if need > self.budget:
                raise ConfigError(
                    f"{self.method.name} would keep {need:,} bytes from step to step here, more than cache_budget="
                    f"{self.budget:,}: raise it, or keep less ({self.method.lighter()})"
                )
        return memory

    def keeping(self, total: int | None) -> bool:
        """Whether what full steps compute is kept in a run of so many steps."""
        return self.method.keeps and not getattr(self.policy, "is_dense", False) and self.method.rests(total) is None

    def decide(self, index: int, total: int | None, u: float) -> None:
        """Set the plan of each site: what the policy asks for, and what the method makes of it."""
        led: set[int] = set()
        planned: dict[tuple[int, tuple[str, float]], tuple[str, float]] = {}
        steps = dict(planned)  # with room for protected tokens
        self.spared = {}
        keeps = self.keeping(total)
        for site in self.sites:
            asked = self.policy.at(u, site.level.index, site.kind, site.block.index)
            if asked not in self._allowed:  # a policy may be any function
                self.method.allow(*asked)
                self._allowed.add(asked)
            memory, place = site.level.memory, (site.level.index, asked)
            if place not in steps:
                planned[place] = self.method.step(memory.clock, index, total, *asked)
                steps[place] = self.method.spare(site, *planned[place])
                if planned[place][0] == "reduce" and steps[place] != planned[place]:
                    self.spared[site.level.index] = planned[place][1], steps[place][1]
            whole = steps[place][0] == "full"
            part = self.method.part(site, index, total, *(steps if whole else planned)[place])
            mode, ratio = self.method.spare(site, *part)
            site.leader = mode != "full" and site.level.index not in led
            site.plan.set(mode, ratio, keep=keeps)
            site.plan.refresh = (
                memory.text != site.plan.text  # as it is when there is nothing yet
                or not 0 <= index - memory.index < max(self.method.every, 1)
            )
            if site.leader:
                led.add(site.level.index)
        for level in self.levels:
            for (where, _), (mode, _) in steps.items():
                if where == level.index:
                    level.memory.clock.turn(index, mode)
        reduced = [(place, step) for (place, _), step in steps.items() if step[0] != "full"]
        # Where rules ask for different ones, the step is named after the largest ratio.
        self.decider, self.decided = max(reduced, key=lambda found: found[1][1], default=(0, ("full", 0.0)))

    def shown(self, grids: Mapping[int, tuple[int, int]]) -> tuple[str, float]:
        """Mode and ratio of the step, as it comes to on these grids."""
        return self.realised(*self.decided, grids[self.decider]) if self.decider in grids else self.decided

    def realised(self, mode: str, ratio: float, grid: tuple[int, int]) -> tuple[str, float]:
        """A plan, with the ratio that is left where the method snaps counts of tokens."""
        return mode, self.method.snapped(grid, ratio) if mode == "reduce" else ratio

    def _prepare(self, info: StepInfo) -> None:
        """Let the method make what the plans need."""
        for site in self.sites:
            memory, text = site.level.memory, site.plan.text
            if site.leader and site.plan.refresh:
                memory.value, memory.prepared, memory.scratch = None, {}, {}
                memory.index, memory.text = info.index, text
            if site.plan.mode != "full" and text not in memory.prepared:
                try:
                    memory.prepared[text] = self.method.prepare(site)
                except ConfigError:
                    raise
                except ValueError as error:  # the tokens' floor says what a grid is too small for
                    raise ConfigError(f"{self.method.name} at {site.name}: {error}") from error

    # --- bookkeeping ---------------------------------------------------------------------------------------------

    def publish(self, finished: bool = False) -> None:
        """Make the run's report the denoiser's last one, if the run is finished.

        The pipeline says so; in a hand-written loop nobody does, and the last step counts, or no known end.
        """
        steps = self.report.steps if self.report is not None else []
        if self.report is not None and steps and (finished or steps[-1].total in (None, steps[-1].index + 1)):
            self.report.token_map = self._tokens.result(self.levels)
            REPORTS[self.denoiser] = self.report

    def _close(self, finished: bool = False) -> None:
        """A run is over, or was broken off: publish its report, keep nothing."""
        self.publish(finished)
        self.report = self.info = None
        self._memories.clear()
        self._tokens = TokenRecord()
        for level in self.levels:
            level.memory, level.scratch, level.status, level.key = Memory(), {}, None, None

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's arguments by name."""
        return dict(zip(self._names, args, strict=False)) | kwargs

    def _record(self, info: StepInfo, inputs: dict[str, Any], seconds: float | None) -> StepRecord:
        plans = tuple((s.plan.mode, s.plan.text, s.leader and s.plan.refresh) for s in self.sites)
        size = (*self.backbone.size(self.layout, inputs), info.batch, self.backbone.text(self.denoiser, inputs))
        seen = tuple(level.grid for level in self.levels)
        key = (size, seen, plans, self.decider, self.decided)
        if key not in self._counts:
            grids = self._grids(*size[:2])
            self._counts[key] = (*self.shown(grids), *self._count(*size, grids))
        where = info.run, info.index, info.total, info.pass_key, info.u, info.log_snr, info.sigma
        return StepRecord(*where, *self._counts[key], seconds)

    def _count(
        self, height: int, width: int, batch: int, text: int, grids: dict[int, tuple[int, int]]
    ) -> tuple[int, int, int, int]:
        """Tokens and FLOPs of the step: total and computed, reduced and dense."""
        work = self.method.works(self.sites, grids)
        total = sum(grids[site.level.index][0] * grids[site.level.index][1] for site in self.sites)
        computed = total
        for site in self.sites:
            if site.name in work:
                n = grids[site.level.index][0] * grids[site.level.index][1]
                computed -= n - min(work[site.name].queries, work[site.name].keys)
        dense = self.flops.call(height, width, batch, text, grids)
        reduced = self.flops.call(height, width, batch, text, grids, work)
        return total, computed, reduced, dense

    def _grids(self, height: int, width: int) -> dict[int, tuple[int, int]]:
        """Of each level, for latents of this size."""
        levels = self.layout.levels
        grids = {v.index: g for v, g in zip(levels, self.backbone.grids(self.denoiser, height, width), strict=True)}
        return grids | {level.index: level.grid for level in self.levels if level.grid is not None}


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type that a model computes in, as diffusers' models say it."""
    found = getattr(module, "dtype", torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32
