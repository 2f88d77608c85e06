"""The search's optimiser: optuna's TPE over the few numbers that a schedule is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .forms import Candidate, Form
from .steps import place

if TYPE_CHECKING:
    from .search import Search


class Optimiser:
    """optuna's TPE over the numbers that a schedule is made of."""

    def __init__(self, search: Search, forms: Sequence[Form]) -> None:
        optuna = library()
        self.search, self.forms = search, {form.name: form for form in forms}
        sampler = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=6)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        for form in forms[:2]:
            best = search.trials.best(lambda one, name=form.name: one.candidate.form.name == name)  # type: ignore[misc]
            chosen = dict(best.candidate.options) if best is not None else {}
            levers = {
                f"{form.name} {name}": values.index(chosen.get(name, form.usual(name)))
                for name, values in form.levers.items()
            }
            for harm, tilt in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
                guess = {"form": form.name, "harm": harm, "tilt": tilt, "bend": 0.0, "phase": 0.5, "first": 1}
                self.study.enqueue_trial(guess | levers)

    def step(self) -> None:
        """Ask, evaluate, tell."""
        search, trials = self.search, self.search.trials
        trial = self.study.ask()
        form = self.forms[trial.suggest_categorical("form", list(self.forms))]
        units = len(trials.steps.units)
        harm = trial.suggest_float("harm", 0.0, 2.0)
        tilt, bend = (trial.suggest_float(name, -2.0, 2.0) for name in ("tilt", "bend"))
        phase = trial.suggest_float("phase", 0.0, 1.0)
        first = trial.suggest_int("first", 1, max(units // 4, 1))
        ratio = 1.0
        if form.ratios:
            ratio = form.ratios[trial.suggest_int(f"{form.name} ratio", 0, len(form.ratios) - 1)]
        options = []
        for name, values in form.levers.items():
            options.append((name, values[trial.suggest_int(f"{form.name} {name}", 0, len(values) - 1)]))
        weights = search.weights(form, harm, tilt, bend)

        def arrange(count: int) -> tuple[int, ...]:
            return place(units, count, weights, first if form.caches else 0, phase) if count else ()

        blank = Candidate(form, (), ratio, tuple(sorted(options)), source="optimiser")
        if trials.goal.least is None:
            count = trial.suggest_int("count", int(form.caches), units - 1)
            candidate: Candidate | None = blank.moved(full=arrange(count))
        else:
            candidate = search.filled(blank, arrange)
        if candidate is None:
            self.study.tell(trial, -1e6)
            return
        try:
            one = search.evaluate(candidate, search.bar)
        except BaseException:
            self.study.tell(trial, state=library().trial.TrialState.FAIL)
            raise
        self.study.tell(trial, trials.goal.value(one.speed, one.score))


def library() -> Any:
    """optuna.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError('tune needs optuna: pip install "diffusion-tokred[tune]"') from None
    return optuna
