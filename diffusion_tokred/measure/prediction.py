"""Times from a device's calibration and a plan's operations: what a step should take, dense and reduced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .operations import Operation
from .roofline import Calibration

PAYS = 1.05  # a smaller predicted gain is within the model's error


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds; nothing was run but the calibration. A model's figures, not a measurement.

    Attributes:
        device, dtype: that it holds for.
        parts: kind of site -> (dense, reduced) seconds, with "method" (what the method does itself) and "rest".
    """

    device: str
    dtype: str
    parts: dict[str, tuple[float, float]]

    @property
    def dense(self) -> float:
        return sum(dense for dense, _ in self.parts.values())

    @property
    def reduced(self) -> float:
        return sum(reduced for _, reduced in self.parts.values())

    @property
    def speedup(self) -> float:
        """Predicted time of the dense calls / of the reduced ones."""
        return self.dense / self.reduced

    @property
    def verdict(self) -> str | None:
        """A sentence, if the method cannot pay here."""
        if self.speedup >= PAYS:
            return None
        return (
            f"this cannot pay on {self.device} in {self.dtype}: predicted {self.speedup:.3f}x "
            f"({self.dense * 1e3:.3g} ms dense, {self.reduced * 1e3:.3g} ms reduced)"
        )

    def table(self) -> str:
        """Plain text."""
        lines = [f"{'predicted ms':>16} {'dense':>12} {'reduced':>12} {'saved':>7}"]
        for kind, (dense, reduced) in (self.parts | {"total": (self.dense, self.reduced)}).items():
            saved = f"{1 - reduced / dense:.1%}" if dense else "-"
            lines.append(f"{kind:>16} {dense * 1e3:>12.3f} {reduced * 1e3:>12.3f} {saved:>7}")
        lines.append(
            f"Predicted {self.speedup:.3f}x on {self.device}, {self.dtype}, in eager mode: a model, not a measurement."
        )
        return "\n".join(lines)


def seconds(calibration: Calibration, operations: Mapping[str, list[Operation]]) -> dict[str, float]:
    """Seconds by kind of site."""
    return {kind: sum(map(calibration.seconds, listed)) for kind, listed in operations.items()}
