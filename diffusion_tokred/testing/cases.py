"""What the checks of the contract share: a case (one method on one pipeline), a snapshot of a model, and verdicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import Method, MethodConfig, make_method
from ..patching import denoisers, patch
from ..runtime.rows import KV


class Broken(AssertionError):
    """What a check found, in a sentence."""


@dataclass(frozen=True)
class Finding:
    """The result of one check: `text` says what was measured, or what broke."""

    check: str
    pipe: str
    config: str
    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'BROKEN':<6} {self.check}, {self.config} on {self.pipe}: {self.text}"


def sample_of(args: Any, kwargs: Any) -> Any:
    """The noisy latents among a denoiser's arguments: a tensor, or a list of one for each sample."""
    return args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]


def rows_of(output: Any) -> Tensor:
    """A denoiser's output, (B, ...), also where it is a list of one tensor for each sample."""
    return torch.stack(output) if isinstance(output, list) else output


def short(config: MethodConfig) -> MethodConfig:
    """The config, acting as soon as it can: caches let whole steps pass first, and a check is quick."""
    known = {f.name: f.metadata.get("low") for f in fields(config)}
    wanted = {"warmup": known.get("warmup"), "interval": 2, "min_steps": 0}
    return replace(config, **{name: value for name, value in wanted.items() if name in known and "min_steps" in known})


class Case:
    """One method on one pipeline, and what its checks share.

    Args:
        pipe: its name in findings.
        build: makes a fresh pipeline, with the same weights each time.
        run: `run(pipe, steps=, seed=, batch=, **size)` -> its output, a tensor (batch, ...). Row i of a batch is what
            `seed + i` gives with `batch=1`.
        config: of the method.
        other: arguments of `run` for another size than its own.
    """

    def __init__(
        self,
        pipe: str,
        build: Callable[[], Any],
        run: Callable[..., Tensor],
        config: MethodConfig,
        other: dict[str, Any],
    ) -> None:
        self.pipe, self.build, self.config, self.other = pipe, build, config, other
        self._run = run

    @property
    def steps(self) -> int:
        """Steps of a run in which the method acts: the first are full where it keeps something."""
        return max(2, getattr(self.config, "warmup", 0) + 1, getattr(self.config, "min_steps", 0))

    def run(self, pipe: Any, **more: Any) -> Tensor:
        with torch.no_grad():
            return self._run(pipe, **{"steps": self.steps} | more)

    def patched(self, dtype: torch.dtype | None = None, **more: Any) -> Any:
        """A fresh pipeline, patched. `more` goes to `patch`."""
        return patch(self.build() if dtype is None else self.cast(dtype), self.config, **more)

    def cast(self, dtype: torch.dtype) -> Any:
        """A fresh pipeline in another precision. (Not by its own `to`, which would warn each time.)"""
        pipe = self.build()
        for part in getattr(pipe, "components", {"": pipe}).values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, dtype)
        return pipe

    @property
    def method(self) -> Method:
        return make_method(self.config)

    @cached_property
    def dense(self) -> Tensor:
        """What a fresh pipeline gives."""
        return self.run(self.build())

    @cached_property
    def reduced(self) -> Tensor:
        """What a fresh pipeline gives, patched and run once."""
        return self.run(self.patched())


class Snapshot:
    """Everything a module tree consists of, by identity. Holds on to it, so that no id is used twice."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: (m, type(m), self._contents(m)) for name, m in model.named_modules()}

    @staticmethod
    def _contents(module: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in vars(module).items():
            if isinstance(value, dict) and key.startswith("_"):  # parameters, buffers, submodules, hooks
                found |= {f"{key}[{name!r}]": entry for name, entry in value.items()}
            else:
                found[key] = value
        return found

    def differences(self, model: nn.Module) -> list[str]:
        """What is not as it was: empty if nothing changed."""
        now = Snapshot(model).modules
        found = [f"module {name}" for name in self.modules.keys() ^ now.keys()]
        for name in self.modules.keys() & now.keys():
            (old, old_type, before), (new, new_type, after) = self.modules[name], now[name]
            if old is not new or old_type is not new_type:
                found.append(f"{name}: {old_type} -> {new_type}")
            found += [f"{name}.{key} gone" for key in before.keys() - after.keys()]
            found += [f"{name}.{key} new: {after[key]!r:.80}" for key in after.keys() - before.keys()]
            found += [f"{name}.{k} replaced" for k in before.keys() & after.keys() if before[k] is not after[k]]
        return found

    def assert_same(self, model: nn.Module, when: str) -> None:
        if found := self.differences(model):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise Broken(f"{when} the model is not as it was: {found[0]}{more}")


def model_of(pipe: Any) -> Any:
    """The (first) denoiser of a pipeline."""
    return denoisers(pipe)[0]


def driver_of(pipe: Any) -> Any:
    """What `patch` has put on it."""
    return model_of(pipe).__dict__["_tokred"]


def expect_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    """Bit-equal and finite, or `Broken`."""
    expect_near(found, wanted, 0.0, what)


def expect_near(found: Tensor, wanted: Tensor, allowed: float, what: str) -> float:
    """Finite, and nowhere farther apart than `allowed` (times the largest value, if that is above 1), or `Broken`.

    Returns:
        The largest difference.
    """
    if found.shape != wanted.shape:
        raise Broken(f"{what}: shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    if bad := int((~torch.isfinite(found)).sum()):
        raise Broken(f"{what}: {bad} of {found.numel()} values are not finite")
    difference = (found - wanted).abs()
    worst = float(difference.max())
    allowed *= max(1.0, float(wanted.abs().max()))
    if worst > allowed:
        place = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        rule = f"allowed {allowed:.0e}" if allowed else "must be bit-equal"
        raise Broken(f"{what}: max difference {worst:.1e} at {place}; {rule}")
    return worst


def describe(config: MethodConfig) -> str:
    """A config in short: the method, and the options that are not at their defaults."""
    changed = [f"{f.name}={value!r}" for f in fields(config) if (value := getattr(config, f.name)) != f.default]
    return config.name + (f"({', '.join(changed)})" if changed else "")


def count_rows(pipe: Any) -> list[tuple[Any, int, float, int]]:
    """(site, tokens that are query and key, ratio, what `work` says of them) of each reduced call from now on."""
    method, rows = driver_of(pipe).method, list[tuple[Any, int, float, int]]()

    def count(site: Any) -> None:
        run = site.run

        def counted(call: Any, x: Tensor, at: Any, kv: Any, watch: Any) -> Any:
            keys = kv.reduce(call.x).shape[1] if isinstance(kv, KV) else x.shape[1]
            if site.plan.mode == "reduce":
                work = method.work(site, site.level.grid, site.plan.ratio)
                rows.append((site, min(x.shape[1], keys), site.plan.ratio, min(work.queries, work.keys)))
            return run(call, x, at, kv, watch)

        vars(site)["run"] = counted

    for site in driver_of(pipe).sites:
        for part in (site, *site.inner):
            count(part)
    return rows
