"""What a run did, step by step."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..extras import need

TOKEN_STATES = ("computed", "merged", "reused", "forecast", "pruned", "protected")


@dataclass(frozen=True)
class StepRecord:
    """One call of the denoiser.

    `mode` and `ratio` are those of the step's plan (by a policy with rules, those of the largest ratio); the ratio is
    what it comes to where counts of tokens are snapped (`align`). Tokens are summed over the sites in use, for one
    sample: a token is computed where it is query and key. `flops` (2 a multiply-add, whole batch, whole denoiser) are
    counted, never timed; `seconds` is None unless the run was patched with `record="time"`. Unknown noise is nan (null
    in JSON).
    """

    run: int
    index: int
    total: int | None
    pass_key: str
    u: float
    log_snr: float
    sigma: float
    mode: str
    ratio: float
    tokens_total: int
    tokens_computed: int
    flops: int
    flops_dense: int
    seconds: float | None = None


@dataclass
class Report:
    """The last finished run. `token_map` is uint8 [step, pass, level, h, w], see `TOKEN_STATES`, on the grid of the
    largest level; None unless the run was patched with `record="tokens"`."""

    method: str
    config: dict[str, Any]
    model: str
    steps: list[StepRecord] = field(default_factory=list)
    token_map: np.ndarray | None = None

    @property
    def flops(self) -> int:
        """FLOPs of the run's denoiser calls."""
        return sum(step.flops for step in self.steps)

    @property
    def flops_dense(self) -> int:
        """FLOPs of the same calls without reduction."""
        return sum(step.flops_dense for step in self.steps)

    @property
    def tokens_saved(self) -> float:
        """Share of the tokens, at the sites in use and over the run, that were not computed."""
        total = sum(step.tokens_total for step in self.steps)
        return 1 - sum(step.tokens_computed for step in self.steps) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data: nan becomes None, the token map its shape and values."""
        data = asdict(self)
        for step in data["steps"]:
            step |= {k: None for k, v in step.items() if isinstance(v, float) and not math.isfinite(v)}
        data["token_map"] = None if self.token_map is None else self.token_map.tolist()
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_pandas(self) -> Any:
        """The steps as a pandas DataFrame, one row a denoiser call; unknown numbers are nan, seconds None.

        Raises:
            ImportError: pandas is not installed (it comes with the `eval` and `app` extras).
        """
        return need("pandas", "eval", "to_pandas()").DataFrame([asdict(step) for step in self.steps])

    def table(self) -> str:
        """A plain-text table, one line a denoiser call."""
        lines = [
            f"{self.method} on {self.model}, {len(self.steps)} denoiser calls",
            "step   pass      u     mode  ratio          tokens     GFLOP  saved       ms",
        ]
        for s in self.steps:
            u = "-" if math.isnan(s.u) else f"{s.u:.3f}"
            tokens = f"{s.tokens_computed}/{s.tokens_total}"
            saved = 1 - s.flops / s.flops_dense if s.flops_dense else 0.0
            ms = "-" if s.seconds is None else f"{1000 * s.seconds:.1f}"
            lines.append(
                f"{s.index:>4} {s.pass_key:>6} {u:>6} {s.mode:>8} {s.ratio:>6.3f} {tokens:>15} {s.flops / 1e9:>9.2f}"
                f" {saved:>6.1%} {ms:>8}"
            )
        return "\n".join(lines)

    def plot(self) -> Any:
        """A matplotlib figure: ratio and FLOPs of each step against the noise level.

        Raises:
            ImportError: matplotlib is not installed (it comes with the `eval` and `app` extras).
        """
        figure = need("matplotlib.figure", "eval", "a plot").Figure(figsize=(7, 4), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        known = not any(math.isnan(s.u) for s in self.steps)
        x = [s.u if known else s.index for s in self.steps]
        top.step(x, [s.ratio for s in self.steps], where="mid", marker="o")
        top.set(ylabel="ratio (share not computed)", ylim=(-0.05, 1.05), title=f"{self.method} on {self.model}")
        bottom.plot(x, [s.flops_dense / 1e9 for s in self.steps], "o--", color="0.6", label="dense")
        bottom.plot(x, [s.flops / 1e9 for s in self.steps], "o-", label=self.method)
        bottom.set(ylabel="GFLOP a call", xlabel="noise level u (1 = noise)" if known else "call")
        bottom.legend()
        if known:
            bottom.invert_xaxis()
        return figure
