"""The checks of the contract: what every method must keep on every backbone.

A check is a function of a `Case` (one method on one pipeline). It returns a sentence with what it measured, raises
`Broken` with what it found and what is allowed, or returns None where it does not apply.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..patching import patch, report, unpatch
from .cases import (
    Broken,
    Case,
    Snapshot,
    count_rows,
    driver_of,
    expect_equal,
    expect_near,
    model_of,
    rows_of,
    sample_of,
)
from .passes import Passes, pass_count

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.96, 0.999)  # tried on every method: each is done as asked, or refused
CHECKS: dict[str, Callable[[Case], str | None]] = {}
SLOW = frozenset({"compiled"})  # left out unless named


def _check(function: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    CHECKS[function.__name__] = function
    return function


@_check
def neutral(case: Case) -> str | None:
    """Ratio 0 is the unpatched pipeline, bit for bit."""
    pipe = case.patched(policy=0)
    expect_equal(case.run(pipe), case.dense, "ratio 0 against the unpatched pipeline")
    return "ratio 0 is bit-equal to the unpatched pipeline"


@_check
def acts(case: Case) -> str | None:
    """The picture changes, the report says that less was computed, and all the denoiser returns is finite."""
    if not case.config.share:
        return None
    pipe, outputs = case.patched(), []
    model_of(pipe).register_forward_hook(lambda module, args, output: outputs.append(rows_of(output[0])))
    change = float((case.run(pipe) - case.dense).abs().max())
    if bad := sum(not bool(torch.isfinite(x).all()) for x in outputs):
        raise Broken(f"{bad} of {len(outputs)} denoiser calls returned values that are not finite")
    if change == 0 and driver_of(pipe).method.unforeseen:
        return "the data decide whether it does anything, and here it does nothing"
    if change == 0:
        raise Broken(
            f"ratio {case.config.share:g} changes nothing: the output is bit-equal to the unpatched pipeline's"
        )
    found = report(pipe)
    if found is None or not found.steps:
        raise Broken("no report after a finished run")
    total, computed = (sum(getattr(s, f"tokens_{name}") for s in found.steps) for name in ("total", "computed"))
    if computed >= total:
        raise Broken(f"ratio {case.config.share:g}, but the report counts {computed} of {total} tokens as computed")
    return f"the output changes by up to {change:.1e}, {computed} of {total} tokens are computed"


class _AllTokens:
    """A policy that forces the machinery on, with nothing left out."""

    is_dense = False

    def at(self, *args: Any, **kwargs: Any) -> tuple[str, float]:
        return "reduce", 0.0


@_check
def machinery(case: Case) -> str | None:
    """With nothing left out, but not by the dense path, the output is the dense one."""
    if "reduce" not in case.method.modes:
        return None
    worst = 0.0
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        want = case.run(case.cast(dtype))
        pipe = case.patched(dtype)
        driver_of(pipe).policy = _AllTokens()
        what = f"forced on with all tokens kept, {str(dtype).removeprefix('torch.')}"
        found, told = case.run(pipe), report(pipe)
        if case.method.keeps and told is not None and told.tokens_saved:
            return None  # whatever the ratio, it reuses something
        worst = max(worst, expect_near(found, want, allowed, what))
    return f"forced on with all tokens kept it differs by {worst:.1e}"


@_check
def ratio(case: Case) -> str | None:
    """A ratio is done as asked or refused, counted at the modules themselves; and reported as done."""
    if "reduce" not in case.method.modes:
        return None
    done, refused = [], []
    for share in RATIOS:
        pipe = case.build()
        before = Snapshot(model_of(pipe))
        try:
            patch(pipe, case.config, policy=share)
        except ConfigError as error:
            refused.append(share)
            if f"{share:g}" not in str(error):
                raise Broken(f"ratio {share:g} is refused without naming it: {error}") from error
            before.assert_same(model_of(pipe), f"after ratio {share:g} was refused")
            continue
        rows = count_rows(pipe)
        try:
            case.run(pipe, **({} if case.method.keeps else {"steps": 1}))
        except ValueError as error:  # more than this size has: known only when it runs
            if not any(f"{h} x {w}" in str(error) for h, w in (site.level.grid for site in driver_of(pipe).sites)):
                raise
            refused.append(share)
            continue
        done.append(share)
        if not rows:
            raise Broken(f"ratio {share:g} is accepted, but nothing is reduced")
        for site, found, asked, said in rows:
            n = site.level.grid[0] * site.level.grid[1]
            if found != said:
                raise Broken(f"at ratio {share:g} {site.name} computes {found} of {n} tokens where work() says {said}")
            # Rounding may keep one token more; and pooling to a whole grid may leave out some more.
            if not (1 - asked) * n / 2 - 1 <= found <= (1 - asked) * n + 1:
                raise Broken(
                    f"ratio {share:g} is accepted, but {site.name} computes {found} of {n} tokens "
                    f"({1 - found / n:.3f} left out)"
                )
    if not done:
        return None
    return "done as asked: " + _numbers(done) + (f"; refused: {_numbers(refused)}" if refused else "")


@_check
def flops(case: Case) -> str | None:
    """The report counts no more FLOPs than dense, but for what the method says that it spends itself."""
    pipe, rows = case.patched(), []
    model_of(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(sample_of(args, kwargs))), with_kwargs=True
    )
    case.run(pipe)
    found, driver = report(pipe), driver_of(pipe)
    assert found is not None
    for step, batch in zip(found.steps, rows, strict=True):
        own = sum(driver.method.overhead(site, site.level.grid, step.ratio) for site in driver.sites)
        if step.flops > step.flops_dense + 2 * batch * own:
            raise Broken(
                f"step {step.index} counts {step.flops} FLOPs, dense {step.flops_dense}, and the method's own "
                f"work is at most {2 * batch * own}"
            )
    return f"{found.flops / max(found.flops_dense, 1):.3f} of the dense FLOPs"


@_check
def unpatched(case: Case) -> str | None:
    """`unpatch` leaves nothing on model, pipeline and scheduler, before a run and after; and is bit-exact."""
    pipe = case.build()
    case.run(pipe)  # attributes that a run itself sets
    model, scheduler = model_of(pipe), getattr(pipe, "scheduler", None)
    before, owners = Snapshot(model), [(owner, set(vars(owner))) for owner in (pipe, scheduler) if owner is not None]
    unpatch(patch(pipe, case.config))
    before.assert_same(model, "after patch and unpatch")
    case.run(patch(pipe, case.config))
    unpatch(pipe)
    before.assert_same(model, "after patch, a run and unpatch")
    for owner, names in owners:
        if left := sorted(set(vars(owner)) ^ names):
            raise Broken(f"after unpatch the {type(owner).__name__} has or lacks attributes: {', '.join(left)}")
    expect_equal(case.run(pipe), case.dense, "after unpatch")
    return "nothing is left, and the output is bit-equal to the unpatched pipeline's"


@_check
def repeat(case: Case) -> str | None:
    """The same call gives the same output, in the same pipeline and in a fresh one."""
    pipe = case.patched()
    expect_equal(case.run(pipe), case.reduced, "two fresh pipelines")
    expect_equal(case.run(pipe), case.reduced, "the second run of a pipeline")
    return "three runs are bit-equal"


@_check
def history(case: Case) -> str | None:
    """What ran before does not matter: another size, number of steps, batch, seed."""
    longer = case.steps + 1
    before: dict[str, dict[str, Any]] = {
        f"{longer} steps": dict(steps=longer), "1 step": dict(steps=1), "a batch of 2": dict(batch=2),
        "another seed": dict(seed=7),
    }  # fmt: skip
    if case.run(case.build(), **case.other).shape != case.dense.shape:
        before["another size"] = case.other
    pipe = case.patched()
    for name, arguments in before.items():
        case.run(pipe, **arguments)
        expect_equal(case.run(pipe), case.reduced, f"after a run with {name}")
    return f"bit-equal after runs with {', '.join(before)}"


@_check
def batch(case: Case) -> str | None:
    """A row does not depend on the others of its batch."""
    pipe = case.patched(torch.float64)
    together = case.run(pipe, batch=3)
    worst = max(
        expect_near(case.run(pipe, seed=i), together[i : i + 1], 1e-8, f"row {i} of a batch of 3 against it alone")
        for i in range(3)
    )
    return f"rows of a batch of 3 differ by {worst:.1e} from those alone, in float64"


@_check
def generators(case: Case) -> str | None:
    """torch's global random state is neither read nor changed."""
    saved = torch.get_rng_state()
    try:
        for seed in (0, 123):
            pipe = case.patched()
            state = torch.manual_seed(seed).get_state()
            out = case.run(pipe)
            if not torch.equal(torch.get_rng_state(), state):
                raise Broken("torch's global random state changed in a run: draw from level.key, with tokens.draw")
            expect_equal(out, case.reduced, f"after torch.manual_seed({seed})")
    finally:
        torch.set_rng_state(saved)
    return "the global random state is neither read nor changed"


@_check
def exception(case: Case) -> str | None:
    """A run that breaks off in the middle of a block leaves nothing that the next run, or `unpatch`, could see."""
    pipe = case.build()
    case.run(pipe)
    before = Snapshot(model_of(pipe))
    for kind in (RuntimeError, KeyboardInterrupt):
        patch(pipe, case.config)
        sites = driver_of(pipe).sites
        calls: list[int] = []

        def fail(module: nn.Module, args: Any, kind: Any = kind, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise kind("broken off by the check")

        handle = sites[len(sites) // 2].module.register_forward_pre_hook(fail)
        with contextlib.suppress(kind):
            case.run(pipe, steps=case.steps + 1)
        handle.remove()
        if len(calls) < 2:
            return None
        expect_equal(case.run(pipe), case.reduced, f"the run after a {kind.__name__} in a block")
        unpatch(pipe)
        before.assert_same(model_of(pipe), f"after a {kind.__name__} in a block and unpatch")
    return "the run after a broken one is bit-equal, and unpatch leaves nothing"


@_check
def deepcopy(case: Case) -> str | None:
    """`copy.deepcopy` of a patched pipeline is an independent patched one."""
    pipe = case.patched()
    case.run(pipe)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in model_of(pipe).parameters():
            parameter.mul_(1.5)
    expect_equal(case.run(twin), case.reduced, "a copy, after the original's weights changed")
    unpatch(pipe)
    expect_equal(case.run(twin), case.reduced, "a copy, after the original was unpatched")
    expect_equal(case.run(unpatch(twin)), case.dense, "an unpatched copy")
    return "a copy is patched, and independent of the original"


@_check
def saved(case: Case) -> str | None:
    """`save_pretrained` of a patched model writes the unpatched one."""
    pipe = case.build()
    model = model_of(pipe)
    if not hasattr(model, "save_pretrained"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        plain, other = Path(folder, "plain"), Path(folder, "patched")
        model.save_pretrained(plain)
        case.run(patch(pipe, case.config))
        model.save_pretrained(other)
        files = [{p.name: p.read_bytes() for p in place.iterdir()} for place in (plain, other)]
    if wrong := sorted(n for n in files[0].keys() | files[1].keys() if files[0].get(n) != files[1].get(n)):
        raise Broken(f"save_pretrained of the patched model differs from the unpatched one's in {', '.join(wrong)}")
    return f"{len(files[0])} files are the same, byte by byte"


@_check
def two(case: Case) -> str | None:
    """Two patched pipelines whose denoiser calls alternate do not know of each other."""
    one, other, inner = case.patched(), case.patched(), []
    handle = model_of(one).register_forward_hook(lambda module, args, output: inner.append(case.run(other)))
    expect_equal(case.run(one), case.reduced, "a pipeline with another's runs between its steps")
    handle.remove()
    for out in inner:
        expect_equal(out, case.reduced, "a pipeline run between another's steps")
    return f"{len(inner)} runs inside another pipeline's run are bit-equal"


@_check
def passes(case: Case) -> str | None:
    """Conditional and unconditional pass do not see each other, batched or apart, in any order."""
    parts = pass_count(case.build(), case.run)
    if parts == (1, 1):
        return None
    rows, _ = parts
    orders = [tuple(range(rows)), tuple(range(rows))[::-1]] if rows > 1 else [(0,)]
    outputs = []
    for order in orders:
        pipe = case.patched(torch.float64)
        proxy = Passes(pipe, model_of(pipe), order)
        outputs.append(case.run(pipe, steps=case.steps + 1))
        proxy.disturb()
        case.run(pipe, steps=case.steps + 1)
        for step, (now, before) in enumerate(proxy.firsts()):
            what = f"the first pass of step {step} after other inputs in the passes beside it (order {order})"
            expect_equal(now, before, what)
    text = "the first pass of each step does not depend on the others"
    if len(orders) == 1 or case.method.shares_passes:
        return text
    expect_equal(outputs[1], outputs[0], "passes in the other order")
    if case.method.ties or (case.method.keeps and "reduce" in case.method.modes):
        return f"{text}, nor on the order"  # batched, they share their rows
    batched = case.run(case.patched(torch.float64), steps=case.steps + 1)
    worst = expect_near(outputs[0], batched, 1e-8, "passes apart against batched")
    return f"{text}, nor on the order; batched it differs by {worst:.1e}, in float64"


@_check
def errors(case: Case) -> str | None:
    """What cannot work is refused with a `ConfigError` that names it, and nothing has changed."""
    pipe = case.build()
    before = Snapshot(model_of(pipe))
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("no_such_option", dict(method=case.config.name, no_such_option=1)),
        ("-0.1", dict(config=case.config, policy=-0.1)),
        ("no_such_mode", dict(config=case.config, policy=[(1.0, 0.5, "no_such_mode")])),
    ]
    for word, arguments in wrong:
        try:
            patch(pipe, **arguments)
        except ConfigError as error:
            if word not in str(error):
                raise Broken(f"{word} is refused without naming it: {error}") from error
        else:
            raise Broken(f"{word} is accepted")
        before.assert_same(model_of(pipe), f"after {word} was refused")
    return f"refused, by name: {', '.join(word for word, _ in wrong)}"


@_check
def compiled(case: Case) -> str | None:
    """One graph with `torch.compile(fullgraph=True)`, the eager output, and no new graph in a second run."""
    torch._dynamo.reset()
    stats: Any = torch._dynamo.utils.counters
    stats.clear()
    pipe = case.patched()
    model_of(pipe).compile(fullgraph=True, backend="eager")
    try:
        worst = expect_near(case.run(pipe), case.reduced, 1e-5, "compiled against eager")
        graphs = stats["stats"]["unique_graphs"]
        case.run(pipe, seed=1)
        if breaks := sum(stats["graph_break"].values()):
            raise Broken(f"{breaks} graph breaks: {next(iter(stats['graph_break']))}")
        if stats["stats"]["unique_graphs"] != graphs:
            raise Broken(f"the second run compiled anew: {stats['stats']['unique_graphs']} graphs after {graphs}")
    finally:
        torch._dynamo.reset()
        stats.clear()
    return f"{graphs} graph(s), no breaks, differs by {worst:.1e} from eager"


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)
