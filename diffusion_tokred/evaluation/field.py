"""The rows of the comparison of the field: the unpatched model, every method of ours, and other libraries.

A row is put on a pipeline in two forms: as it is, and as a *probe*, a short run that has each kind of its steps. What
the steps of a whole run are is its schedule: known beforehand, but where data decide (first-block caches, MagCache),
which with random weights means nothing. Those are let reuse whenever they may, and are given a schedule that is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones import backbone_of
from ..errors import ConfigError, UnsupportedError
from ..methods import Method, MethodConfig, make_method
from ..methods.base import option
from ..patching import denoisers, patched
from ..ruling import rule_of
from ..runtime.store import Clock
from ..schedule.intervals import fixed_full_steps
from .peers import (
    CacheDiT,
    DiffusersFirstBlock,
    DiffusersMagCache,
    DiffusersTaylorSeer,
    PeerConfig,
    PeerDeepCache,
    PeerTGate,
    ToMeSD,
    applied,
)
from .variants import UNPATCHED, parse_variant

INTERVAL, WARMUP = 3, 3  # of the schedules that data would decide
KEPT = "kept"  # another library's step that is not full


@dataclass(frozen=True)
class ToDoDefinition(PeerConfig):
    """ToDo, written from its definition (arXiv 2402.13573) as the shortest code that does it: keys and values from the
    token grid, downsampled by nearest neighbours, in the self-attention of the largest level."""

    factor: int = option(2, "pooling factor a side", low=1, high=64)

    name: ClassVar[str] = "todo-definition"
    package: ClassVar[str] = "torch"
    module: ClassVar[str] = "torch"

    def attach(self, pipe: Any, model: nn.Module, seed: int) -> Any:
        found = [module for name, module in model.named_modules() if name.endswith(".attn1")]
        if not found:
            raise UnsupportedError(f"todo-definition is written for attn1 modules: {type(model).__name__} has none")
        layout = backbone_of(model).layout(model)
        largest = {id(site.module) for site in layout.sites if site.kind == "attention" and not site.level.index}
        for module in found:
            if id(module) in largest:
                module.forward = _pooled(module.forward, self.factor)
        return lambda step: contextlib.nullcontext()


def _pooled(inner: Any, factor: int) -> Any:
    def forward(hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        b, n, c = hidden_states.shape
        side = round(n**0.5)  # square pictures
        grid = hidden_states.transpose(1, 2).reshape(b, c, side, side)
        small = F.interpolate(grid, size=(side // factor, side // factor), mode="nearest")
        return inner(hidden_states, encoder_hidden_states=small.flatten(2).transpose(1, 2), **kwargs)

    return forward


@dataclass(frozen=True)
class Row:
    """A row: a method of ours or another library's; neither is the unpatched model.

    Attributes:
        name: in the table.
        text: as it is typed, see `parse_variant`.
    """

    name: str
    config: MethodConfig | None = None
    peer: PeerConfig | None = None
    text: str = ""

    @property
    def forced(self) -> bool:
        """Whether data would decide its schedule, and here it is a given one."""
        return isinstance(self.peer, (DiffusersFirstBlock, DiffusersMagCache, CacheDiT)) or (
            self.config is not None and self.config.name == "firstblock"
        )

    @contextlib.contextmanager
    def applied(self, pipe: Any) -> Any:
        """The pipeline with it."""
        if self.config is not None:
            with patched(pipe, self.config):
                yield pipe
        elif self.peer is not None:
            with applied(pipe, self.peer):
                yield pipe
        else:
            yield pipe

    def whole(self, steps: int) -> Row:
        """For a run of so many steps: caches of data are let reuse what the given schedule does."""
        if self.config is not None and self.forced:
            return replace(self, config=_with(self.config, threshold=100.0, interval=INTERVAL, warmup=WARMUP))
        if isinstance(self.peer, DiffusersMagCache):
            return replace(self, peer=replace(self.peer, threshold=100.0, max_skip_steps=INTERVAL - 1,
                                              retention=WARMUP / steps, steps=steps, ratios="ones"))  # fmt: skip
        if isinstance(self.peer, CacheDiT):
            return replace(self, peer=replace(self.peer, threshold=100.0, warmup=WARMUP, max_continuous=INTERVAL - 1))
        if isinstance(self.peer, DiffusersFirstBlock):
            return replace(self, peer=replace(self.peer, threshold=100.0))
        return self

    def probe(self, kinds: Collection[str], steps: int) -> tuple[Row, int, list[str] | None]:
        """A short run that has all its kinds of steps: the row with a shorter warm-up, how many steps, and what they
        are (None: to be told by their FLOPs). `kinds`: of the model's sites; `steps`: of the whole run."""
        row = self.whole(steps)
        if row.config is not None:
            wanted = set(self.schedule(kinds, steps))
            least = 1 + max(2, getattr(row.config, "order", 0) + 1)
            if "warmup" in {field.name for field in fields(row.config)}:
                row = replace(
                    row, config=_with(row.config, warmup=min(vars(row.config)["warmup"], least - 1), min_steps=0)
                )
            for count in range(1, steps + 1):
                found = planned(row.config, kinds, count)
                if wanted <= set(found):
                    return row, count, found
            raise ConfigError(
                f"{self.name}: a run of {steps} steps has no {wanted - set(found)} step with this warm-up"
            )
        if row.peer is None or isinstance(row.peer, (ToMeSD, ToDoDefinition)):
            return row, 1, ["full" if row.peer is None else "reduce"]
        if isinstance(row.peer, PeerTGate):
            wanted, short = set(row.peer.kinds(steps)), replace(row.peer, gate=min(3, row.peer.gate), warmup=0)
            count = next((n for n in range(1, steps + 1) if wanted <= set(short.kinds(n))), steps)
            return replace(row, peer=short), count, short.kinds(count)
        names = {field.name for field in fields(row.peer)}
        if "warmup" in names:
            row = replace(row, peer=_with(row.peer, warmup=2))
        if isinstance(row.peer, DiffusersMagCache):
            row = replace(row, peer=_with(row.peer, retention=0.34, steps=3))
        return row, 3 if names & {"warmup", "steps"} else 2, None

    def schedule(self, kinds: Collection[str], steps: int) -> list[str]:
        """What each step of a run is: "full", or a mode of ours, or `KEPT`. A step that makes the plan (a matching, a
        grid, clusters) of the steps after it is a kind of its own: "reduce, plan"."""
        if self.config is not None:
            return planned(self.whole(steps).config, kinds, steps)
        if self.peer is None:
            return ["full"] * steps
        if isinstance(self.peer, (ToMeSD, ToDoDefinition)):
            return ["reduce"] * steps
        if isinstance(self.peer, PeerTGate):
            return self.peer.kinds(steps)
        if isinstance(self.peer, PeerDeepCache):
            full = set(range(0, steps, self.peer.interval))
        elif isinstance(self.peer, DiffusersTaylorSeer):
            c = self.peer
            full = {i for i in range(steps) if i < c.warmup or (i - c.warmup - 1) % c.interval == 0}
        else:
            full = set(fixed_full_steps(steps, INTERVAL, WARMUP))
        return ["full" if i in full else KEPT for i in range(steps)]

    def kept(self) -> float | None:
        """Share of tokens that another library computes, where it is known."""
        if isinstance(self.peer, ToMeSD):
            return 1 - self.peer.ratio
        return 1 / self.peer.factor**2 if isinstance(self.peer, ToDoDefinition) else None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        chosen = self.config or self.peer
        return {"name": self.name, "config": None if chosen is None else chosen.to_dict()}


def planned(config: MethodConfig | None, kinds: Collection[str], steps: int) -> list[str]:
    """What each step of a run does, as far as no data decide. `kinds`: of the sites that the model has."""
    assert config is not None
    method, policy = make_method(config).on(kinds), rule_of(config, None)
    clock, made, found = Clock(), None, list[str]()
    for index in range(steps):
        u = 1 - index / steps
        clock.arrive(index, u)
        mode, _ = method.step(clock, index, steps, *policy.at(u))
        clock.turn(index, mode)
        if mode != "full" and _plans(method, made, index, after_full=found[-1:] == ["full"]):
            made, mode = index, f"{mode}, plan"
        found.append(mode)
    return found


def default_rows(family: str) -> dict[str, Row]:
    """All rows for a family of shapes, by name."""
    unet = family in ("sd15", "sdxl")
    everything = {
        "sd15": "levels=0,1,2,merge_cross_attn,merge_ff",
        "sdxl": "levels=0,1,merge_cross_attn,merge_ff",
        "pixart": "merge_cross_attn,merge_ff",
    }.get(family, "merge_ff")
    texts = {
        "tome": "tome:ratio=0.5",
        "tome-reuse": "tome:ratio=0.5,reuse_every=10",
        "tome-all": f"tome:ratio=0.5,reuse_every=10,{everything}",
        "todo": "todo:factor=2",
        "todo-4": "todo:factor=4",
        "random-keep": "random-keep:ratio=0.5",
        "toca": "toca",
        "toca-faithful": "toca:mode=faithful,schedule=default",
        "duca": "duca",
        "ras": "ras",
        "cat": "cat",
        "fora": "fora",
        "fora-stack": "fora:what=stack",
        "taylorseer": "taylorseer",
        "clusca": "clusca",
        "deepcache": "deepcache",
        "firstblock": "firstblock",
        "tomesd": f"tomesd:ratio=0.5,max_downsample={2 if family == 'sdxl' else 1}",
        "peer-deepcache": "peer-deepcache",
        "peer-tgate": "peer-tgate",
        "diffusers-firstblock": "diffusers-firstblock",
        "diffusers-taylorseer": "diffusers-taylorseer:what=modules",
        "diffusers-taylorseer-lite": "diffusers-taylorseer:what=lite",
        "diffusers-magcache": "diffusers-magcache",
        "cache-dit": "cache-dit:fn=1",
    }
    if unet:
        del texts["fora-stack"], texts["toca-faithful"]  # what "auto" means there
    found = {UNPATCHED: Row(UNPATCHED)} | {name: _parsed(name, text) for name, text in texts.items()}
    found["todo-definition"] = Row("todo-definition", peer=ToDoDefinition(), text="todo-definition")
    return found


def chosen_rows(family: str, asked: Sequence[str]) -> list[Row]:
    """The rows that are asked for, by name or as variants are typed; all if none are. The unpatched model is first.

    Raises:
        ConfigError: neither a name nor a variant.
    """
    every = default_rows(family)
    names = [name for name in asked or every if name != UNPATCHED]
    return [every[UNPATCHED], *(every[name] if name in every else _parsed(name, name) for name in names)]


def _parsed(name: str, text: str) -> Row:
    variant = parse_variant(text)
    if (variant.config is None and variant.peer is None) or variant.policy is not None:
        raise ConfigError(f"{text!r}: a row is a method or another library, without a policy")
    return Row(name, variant.config, variant.peer, text)


def _with(config: Any, **values: Any) -> Any:
    return replace(config, **values)


def site_kinds(pipe: Any) -> set[str]:
    """Kinds of the sites that a pipeline's denoiser has."""
    model = denoisers(pipe)[0]
    layout = backbone_of(model).layout(model)
    return {site.kind for site in (*layout.pairs, *layout.sites)}


def _plans(method: Method, made: int | None, index: int, after_full: bool) -> bool:
    """Whether a step, not a full one, makes what the steps after it go by. `made`: the last one that did."""
    if made is None:
        return method.every > 1 or bool(method.plans_for)
    return (method.every > 1 and index - made >= method.every) or (method.plans_for == "interval" and after_full)
