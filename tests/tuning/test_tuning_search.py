"""The search on a pipeline that is a formula, where all schedules can be tried."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_tokred import ConfigError, Policy, UnsupportedError
from diffusion_tokred.methods import MethodConfig
from diffusion_tokred.tuning.forms import Form
from diffusion_tokred.tuning.goal import Budget, Goal
from diffusion_tokred.tuning.journal import Journal
from diffusion_tokred.tuning.result import Tuned
from diffusion_tokred.tuning.running import run
from diffusion_tokred.tuning.steps import Steps, planned
from diffusion_tokred.tuning.writing import finished
from tests.tuning import toybench
from tests.tuning.toybench import ToyBench

pytest.importorskip("optuna")
PROMPTS = {"train": ["a", "b", "c"], "held out": ["d", "e"]}


def tuned(
    goal: Goal, budget: int = 150, out: Path | None = None, bench: Any = None, methods: Any = None, seed: int = 0
) -> Tuned:
    ticks = itertools.count()
    journal = Journal(out, {"what": "toy"}, clock=lambda: float(next(ticks)))
    bench = bench or ToyBench()
    try:
        said: list[float] = []
        tell = lambda what, share: said.append(share)  # noqa: E731
        found = run(bench, journal, goal, Budget(budget), (3, 2), seed, methods, (2, 3), tell)
    finally:
        journal.close()
    assert all(0 <= share <= 1 for share in said)
    return finished(found, bench, PROMPTS, "toy")


def full_steps(policy: Policy) -> list[int]:
    config = MethodConfig.from_dict(policy.method)
    rules = planned(config, policy, Steps(toybench.US), ToyBench.kinds)
    return [i for i, (mode, _) in enumerate(rules) if mode == "full"]


@pytest.mark.parametrize(("target", "seed"), [(1.3, 0), (1.5, 1), (2.0, 2)])
def test_the_best_of_all_schedules_is_found(target: float, seed: int) -> None:
    found = tuned(Goal("psnr", speed=target), seed=seed)
    full = full_steps(found.policy)
    damping = getattr(found.config, "damping", 1.0)
    reached = toybench.psnr(full, found.config.name, damping)
    assert toybench.speed(len(full), found.config.name) >= target * 0.99
    assert reached == pytest.approx(toybench.optimum(target * 0.99), abs=1e-9)
    assert found.reached and found.status == "complete"
    assert found.best["speedup"]["median"] == pytest.approx(toybench.speed(len(full), found.config.name))
    assert found.best["paired"]["psnr"]["mean"] == pytest.approx(reached + 0.05)  # the mean of two prompts
    constant, random = found.best_constant, found.random_search
    assert constant is not None and random is not None and found.fewer_steps is not None
    assert constant["train"] <= found.best["train"] and random["train"] <= found.best["train"]
    by_other = {one["against"]: one for one in found.data["verdicts"]}
    assert by_other["constant"]["mean"] == pytest.approx(
        found.best["paired"]["psnr"]["mean"] - constant["paired"]["psnr"]["mean"]
    )
    budget = found.data["budget"]
    assert abs(budget["pictures"] - budget["random_pictures"]) <= 3  # as many for both


def test_a_quality_is_kept_as_fast_as_can_be() -> None:
    found = tuned(Goal("psnr", score=36.0), budget=250)
    full = full_steps(found.policy)
    assert toybench.psnr(full, found.config.name, getattr(found.config, "damping", 1.0), 1) >= 36  # mean of three
    assert toybench.speed(len(full), found.config.name) == pytest.approx(toybench.fastest(36 - 0.1), rel=1e-6)
    assert found.reached


def test_the_front_and_the_cliff() -> None:
    found = tuned(Goal("psnr", speed=2.0))
    speeds = [one["speed"] for one in found.front]
    figures = [one["figure"] for one in found.front]
    assert speeds == sorted(speeds) and figures == sorted(figures, reverse=True) and len(speeds) > 3
    assert found.cliff is not None and found.cliff["before"] < found.cliff["after"] and found.cliff["lost"] > 0
    for row in found.data["rows"]:
        assert any(s >= row["speed"] and f >= row["figure"] for s, f in zip(speeds, figures, strict=True)) or (
            row["search"] == "random" or row["pictures"] < 3
        )


def test_a_speed_beyond_the_ceiling() -> None:
    found = tuned(Goal("psnr", speed=20.0), budget=30)
    ceiling = toybench.speed(1, "fora")
    assert found.data["ceiling"] == pytest.approx(ceiling)
    assert not found.reached
    assert any(f"20x is beyond the ceiling of {ceiling:.2f}x" in note for note in found.notes)
    assert found.best["composed"] == pytest.approx(ceiling) and full_steps(found.policy) == [0]


def test_where_nothing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toybench, "BETWEEN", {"taylorseer": 0.089, "fora": 0.089})
    with pytest.raises(UnsupportedError, match=r"nothing pays here: the fastest setting .* is 1\.01x"):
        tuned(Goal("psnr", speed=1.5))


def test_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: ToyBench, form: Any, steps: Any) -> dict[str, Any]:
        if form is not None:
            raise UnsupportedError("only a run shows it")
        return time_steps(self, form, steps)

    time_steps = ToyBench.time_steps
    monkeypatch.setattr(ToyBench, "time_steps", refuses)
    with pytest.raises(UnsupportedError, match=r"no method of those works .*fora what=stack: only a run shows it"):
        tuned(Goal("psnr", speed=1.5))


def test_a_policy_that_is_slower_than_its_costs_say() -> None:
    found = tuned(Goal("psnr", speed=2.0), bench=ToyBench(slow=1.2))
    assert found.best["composed"] >= 2.0 * 1.2 * 0.97
    assert found.best["speedup"]["median"] >= 2.0 * 0.97 and found.reached
    assert any("aimed at a composed" in note for note in found.notes)
    assert any("differ by -16.7%" in note for note in found.notes)


def test_a_first_timing_that_was_too_slow() -> None:
    """The second search aims higher for it; timed once more, the setting of the first is fast enough, and the best."""
    alone = tuned(Goal("psnr", speed=2.0))
    found = tuned(Goal("psnr", speed=2.0), bench=ToyBench(slow=[1.2, 1.0]))
    assert found.policy.points == alone.policy.points and found.config == alone.config
    assert found.best["name"] == "tuned-0" and found.best["speedup"]["median"] == alone.best["speedup"]["median"]
    assert sum("timed once more" in note for note in found.notes) == 1
    timed = {one["name"]: one for one in found.data["entries"] if one["speedup"] is not None}
    assert timed.keys() == {"tuned-0", "tuned-1", "constant", "random", "steps-3"}
    assert timed["constant"]["composed"] == alone.best_constant["composed"]
    assert timed["constant"]["paired"] == alone.best_constant["paired"]
    verdicts = {one["against"]: one["verdict"] for one in found.data["verdicts"]}
    assert verdicts["constant"] == "better" and verdicts["random"] == "the same"


def test_nothing_fast_enough_when_timed() -> None:
    """The fastest then, and it is said."""
    found = tuned(Goal("psnr", speed=2.0), bench=ToyBench(slow=1.8))
    speeds = [one["speedup"]["median"] for one in found.data["entries"] if one["setting"][0] not in "0123456789"
              and one["speedup"] is not None]  # fmt: skip
    assert found.best["speedup"]["median"] == max(speeds) < 2.0 * 0.97


def same(found: Tuned) -> dict[str, Any]:
    data = dict(found.to_dict())
    for key in ("created", "env"):
        data.pop(key)
    data["reduction"]["policy"]["measured"].pop("device")
    return json.loads(json.dumps(data))


@pytest.mark.parametrize("stop", [5, 60, 200])
def test_a_search_that_was_stopped_comes_to_the_same_end(tmp_path: Path, stop: int) -> None:
    goal = Goal("psnr", speed=2.0)
    whole = tuned(goal, 60, tmp_path / "whole")
    part = tuned(goal, 60, tmp_path / "part", ToyBench(stop=stop))
    assert part.status == "interrupted" and not part.data["verdicts"]
    assert any("interrupted" in note for note in part.notes)
    again = ToyBench()
    rest = tuned(goal, 60, tmp_path / "part", again)
    assert same(rest) == same(whole) and rest.policy == whole.policy
    lines = [json.loads(line)["key"] for line in (tmp_path / "part" / "journal.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == len(set(lines)) and again.drawn == sum(line.startswith("draw") for line in lines) - stop


def test_what_a_stopped_search_returns_is_the_best_so_far() -> None:
    part = tuned(Goal("psnr", speed=2.0), bench=ToyBench(stop=120))
    guided = [row for row in part.data["rows"] if row["search"] == "guided" and row["pictures"] == 3]
    fast = [row["figure"] for row in guided if row["speed"] >= 2 * 0.99]
    assert part.best["train"] == max(fast) and part.best["speedup"] is None
    assert "training prompts" in part.report()
    with pytest.raises(KeyboardInterrupt):
        tuned(Goal("psnr", speed=2.0), bench=ToyBench(stop=1))


def test_methods_can_be_chosen() -> None:
    found = tuned(Goal("psnr", speed=2.0), budget=40, methods=["fora"])
    assert found.config.name == "fora"
    with pytest.raises(ConfigError, match=r"unknown method 'foro'.*did you mean 'fora'"):
        tuned(Goal("psnr", speed=2.0), methods=["foro"])
    with pytest.raises(ConfigError, match="tune does not search 'toca': it searches taylorseer, fora"):
        tuned(Goal("psnr", speed=2.0), methods=["toca"])
    with pytest.raises(UnsupportedError, match=r"no method of those works .* deepcache: no UNet"):
        tuned(Goal("psnr", speed=2.0), bench=ToyBench(forms=()))


def test_forms_that_do_not_run_after_all_are_left_out() -> None:
    class Refusing(ToyBench):
        def time_steps(self, form: Form | None, steps: Steps) -> dict[str, Any]:
            if form is not None and form.method == "taylorseer":
                raise ConfigError("taylorseer: the grid is too small")
            return super().time_steps(form, steps)

    found = tuned(Goal("psnr", speed=2.0), budget=30, bench=Refusing())
    assert found.config.name == "fora" and found.data["refused"]["taylorseer"] == "taylorseer: the grid is too small"


def test_journals_of_something_else(tmp_path: Path) -> None:
    Journal(tmp_path, {"seed": 0}).close()
    with pytest.raises(ConfigError, match=r"measurements of something else \(seed was 0, is 1\).*resume=False"):
        Journal(tmp_path, {"seed": 1})
    Journal(tmp_path, {"seed": 1}, resume=False).close()
    journal = Journal(tmp_path, {"seed": 1})
    with pytest.raises(ConfigError, match="is being worked on"):
        Journal(tmp_path, {"seed": 1})
    assert journal.do("a", lambda: [1, None]) == [1, None]
    journal.close()
    file = tmp_path / "journal.jsonl"
    file.write_text(file.read_text() + '{"key": "b", "val')  # cut off while it was written
    journal = Journal(tmp_path, {"seed": 1})
    assert journal.do("a", lambda: pytest.fail("measured again")) == [1, None]
    assert journal.do("b", lambda: 2) == 2
    journal.close()
    journal = Journal(tmp_path, {"seed": 1})
    assert journal.known.keys() == {"a", "b"}
    journal.close()
    file.write_text(file.read_text() + "nonsense\n")
    with pytest.raises(ConfigError, match=r"journal\.jsonl is damaged"):
        Journal(tmp_path, {"seed": 1})
