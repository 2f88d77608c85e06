"""What a tuning has found, as plain data and as a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.results import environment, plain, prompts_of, result
from ..schedule.policy import Policy
from . import deciding
from .result import Tuned, cliff, front
from .running import Found


def finished(found: Found, bench: Any, prompts: Mapping[str, Sequence[str]], model: str | None) -> Tuned:
    """The result, as plain data and as a policy."""
    search, trials, best = found.search, found.search.trials, found.winner
    assert best is not None and best.candidate is not None
    goal, steps = trials.goal, trials.steps
    config, rule = best.candidate.config(len(steps.us)), best.candidate.policy(steps)
    whole = [one for one in trials.found.values() if one.whole]
    points = [(one.speed, one.score) for one in whole]
    order = front(points)
    edge = cliff([points[i] for i in order])
    others = {name: next((one for one in found.entries if one.name == name), None) for name in ("constant", "random")}
    fewer = next((one for one in found.entries if one.candidate is None), None)
    verdicts = [
        deciding.against(goal, best, other)
        for other in (others["constant"], others["random"], fewer)
        if other is not None and other.scores and best.scores and other is not best
    ]
    speed = best.speed["median"] if best.speed is not None else best.composed
    beyond = goal.speed is not None and found.ceiling < goal.speed * 0.99
    reached = not beyond and (speed >= 0.9 * goal.speed if goal.speed is not None else best.held >= (goal.score or 0))
    env = environment(getattr(getattr(bench, "pipe", None), "_execution_device", "cpu"))
    measured_of = {
        "speedup": best.speed, "composed": best.composed, "metric": goal.metric,
        goal.metric: best.to_dict(goal)["paired"].get(goal.metric), "prompts": len(best.scores),
        "steps": len(steps.us), "device": env["device"], "library": f"diffusion_tokred {env['diffusion_tokred']}",
    }  # fmt: skip
    made_for = bench.made_for() if hasattr(bench, "made_for") else {}
    policy = Policy(points=rule.points, method=config.to_dict(), measured=plain(measured_of), **made_for)
    data: dict[str, Any] = result(
        "tune",
        env=env,
        pipeline=(bench.describe() if hasattr(bench, "describe") else {}) | {"model": model},
        reduction={"method": config.name, "config": config.to_dict(), "policy": policy.to_dict(), "seed": 0},
        prompts={name: prompts_of(list(texts)) for name, texts in prompts.items()},
        rows=[
            {
                "setting": one.candidate.words(len(steps.units)), "source": one.candidate.source, "speed": one.speed,
                "figure": goal.figure(one.score), "pictures": len(one.scores), "search": which,
            }
            for which, some in (("guided", trials), ("random", search.random))
            for one in some.found.values()
        ],
        intervals={"unpatched_again": found.noise} if found.noise is not None else {},
    )  # fmt: skip
    data |= plain(
        {
            "status": found.status,
            "goal": {"target": goal.words, "metric": goal.metric, "speed": goal.speed,
                     "figure": None if goal.score is None else goal.figure(goal.score)},
            "reached": bool(reached),
            "ceiling": found.ceiling,
            "budget": {"asked": found.budget.words, "evaluations": search.evaluations,
                       "random_evaluations": search.random_evaluations, "pictures": trials.pictures,
                       "random_pictures": search.random.pictures, "seconds": found.seconds},
            "steps": {"u": list(steps.us), "full": list(trials.full(best.candidate))},
            "costs": trials.costs.to_dict(),
            "sensitivity": {
                "forms": {
                    name: [None if loss != loss else goal.figure(-loss) for loss in losses]
                    for name, losses in search.harm.items()
                },
                "blocks": {f"{a}-{b}": goal.figure(score) for (a, b), score in search.blocks.items()},
                "levels": {str(level): goal.figure(score) for level, score in search.levels.items()},
            },
            "entries": [one.to_dict(goal) for one in found.entries],
            "best": best.name,
            "best_constant": "constant" if others["constant"] is not None else None,
            "random_search": "random" if others["random"] is not None else None,
            "fewer_steps": fewer.name if fewer is not None else None,
            "verdicts": verdicts,
            "front": [
                {"setting": whole[i].candidate.words(len(steps.units)), "speed": points[i][0],
                 "figure": goal.figure(points[i][1])}
                for i in order
            ],
            "steps_curve": [{"steps": n, "speed": s, "figure": goal.figure(score)} for n, s, score in found.curve],
            "cliff": None if edge is None else edge | {"metric": goal.metric},
            "refused": found.refused,
            "notes": _notes(found, bool(reached), beyond),
        }
    )  # fmt: skip
    return Tuned(policy, config, data)


def _notes(found: Found, reached: bool, beyond: bool) -> list[str]:
    goal, best = found.search.trials.goal, found.winner
    assert best is not None
    said = []
    if beyond:
        said.append(
            f"{goal.words} is beyond the ceiling of {found.ceiling:.2f}x, the speed with all steps but the first left "
            "out; this is the best near it"
        )
    elif not reached:
        said.append(f"{goal.words} was not reached: this is the nearest found")
    if found.status != "complete":
        said.append("interrupted: chosen by the training prompts, not timed; the same call goes on where it stopped")
    if best.speed is not None:
        off = best.speed["median"] / best.composed - 1
        said.append(f"measured speed and the one composed from the costs of steps differ by {off:+.1%}")
    for composed in found.aimed:
        said.append(f"the first policy was slower than its costs said: the search aimed at a composed {composed:.2f}x")
    if found.aimed and not goal.fast(best.composed):
        said.append("timed once more beside those of the second search, a setting of the first was the best")
    held = len(best.scores)
    if 0 < held < 20:
        said.append(f"{held} held-out prompts: intervals from fewer than 20 are too narrow")
    return said
