"""`tune`: the policy for a pipeline and a target, found by measuring on the pipeline itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..auto import remember
from ..errors import ConfigError
from ..evaluation.judges import Judges
from ..evaluation.models import needs_prompt
from ..evaluation.prompts import PromptSet
from .bench import HELD, TRAIN, Bench
from .goal import budget_of, goal_of
from .journal import Journal
from .optimiser import library
from .progress import Tell, telling
from .result import Tuned
from .running import run
from .writing import finished

EVALUATIONS = 120  # the usual budget
ROUNDS = (3, 8)  # of measuring steps, and of timing the settings that are reported


def tune(
    pipe: Any,
    prompts: Sequence[str] | PromptSet,
    *,
    target_speedup: float | None = None,
    max_lpips: float | None = None,
    min_psnr: float | None = None,
    methods: Sequence[str] | None = None,
    budget: int | str | None = None,
    holdout: int | Sequence[str] | PromptSet | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool | Tell = True,
    call: Mapping[str, Any] | None = None,
    rounds: tuple[int, int] = ROUNDS,
    keep: bool = True,
    model: str | None = None,
) -> Tuned:
    """Find the policy with which a pipeline is so many times as fast and its pictures stay closest to its own; or as
    fast as can be with pictures so close.

    What full, reduced and reused steps cost is measured here, in the same process as the unpatched pipeline, and the
    speed of a candidate composed from it; so is what each step matters to the picture. Candidates of all methods are
    judged by their pictures of the training prompts. Held-out prompts decide among the best; these, the best constant
    setting, the best of as many random ones and the run with fewer steps are then timed against each other.

    Args:
        pipe: a text-to-image pipeline without a patch, on its device; left without one.
        prompts: of what the pipeline is used for. Six to train and twenty to decide are a good number.
        target_speedup: how many times as fast as unpatched. 2 if no target is given; or
        max_lpips, min_psnr: how far from the unpatched pictures, in the mean.
        methods: names to search, all that work by default.
        budget: evaluations (one is as many pictures as there are training prompts; the random search may draw as many
            again), or the time for everything, as "10min". By default `EVALUATIONS` evaluations.
        holdout: how many of the prompts, from the end, decide; or others that do. By default two in three of them.
        seed: of the search, and of the first prompt's noise.
        out: a folder for all measurements and the result. The same call goes on there, and comes to the same end as
            one that was never stopped.
        resume: False to begin anew in that folder.
        progress: a bar with the time left; False for none; or a function of what is done and the share that is.
        call: keyword arguments of the pipeline, as {"num_inference_steps": 20}.
        rounds: of measuring steps, and of timing at the end.
        keep: write a policy that reaches its target to this user's folder, where `method="auto"` finds it.
        model: a name for reports.

    Returns:
        The policy with its measurements. After Ctrl-C: the best so far, with status "interrupted".

    Raises:
        ConfigError: a wrong argument; LPIPS without the weights of its network; optuna is missing; `out` holds
            measurements of something else.
        UnsupportedError: the pipeline takes no prompts, no method works on it, or none makes it faster.
        StateError: it is patched already.
    """
    judges = Judges.find()
    goal = goal_of(target_speedup, max_lpips, min_psnr, judges)
    limit = budget_of(budget, EVALUATIONS)
    library()
    needs_prompt(pipe)
    if min(rounds) < 1:
        raise ConfigError(f"rounds are at least 1, found {rounds}")
    train, held = split(prompts, holdout)
    bench = Bench(pipe, {TRAIN: train, HELD: held}, call or {}, seed, judges)
    folder = None if out is None else Path(out)
    with telling(progress) as tell:
        journal = Journal(folder, bench.settings(), resume)
        try:
            found = run(bench, journal, goal, limit, (len(train), len(held)), seed, methods, rounds, tell)
        finally:
            journal.close()
    tuned = finished(found, bench, {TRAIN: train, HELD: held}, model)
    if folder is not None:
        tuned.save(folder)
    if keep and tuned.reached and tuned.status == "complete":
        remember(tuned.policy, bench.denoiser)
    return tuned


def split(
    prompts: Sequence[str] | PromptSet, holdout: int | Sequence[str] | PromptSet | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training prompts and held-out ones.

    Raises:
        ConfigError: none for one of them, or one prompt in both.
    """
    texts = _texts(prompts)
    if holdout is None:
        holdout = max(len(texts) * 2 // 3, 1)
    if isinstance(holdout, bool) or not isinstance(holdout, (int, Sequence, PromptSet)) or isinstance(holdout, str):
        raise ConfigError(f"holdout is a number of prompts, or a list of them, found {holdout!r}")
    if isinstance(holdout, int):
        if not 1 <= holdout < len(texts):
            raise ConfigError(
                f"holdout={holdout} of {len(texts)} prompts: at least one prompt must be left to decide, and one to "
                "train with; give more prompts"
            )
        train, held = texts[:-holdout], texts[-holdout:]
    else:
        train, held = texts, _texts(holdout)
    if both := sorted(set(train) & set(held)):
        raise ConfigError(f"held-out prompts must be others than those of the search, {both[0]!r} is in both")
    return train, held


def _texts(prompts: Sequence[str] | PromptSet) -> tuple[str, ...]:
    if isinstance(prompts, str):
        raise ConfigError("prompts is a list of texts, found one text")
    return (prompts if isinstance(prompts, PromptSet) else PromptSet("prompts", tuple(prompts))).texts
