"""Floor 5: the search for a policy. It measures on the user's own pipeline and goes by nothing else."""

from .result import Tuned
from .tuner import tune

__all__ = ["Tuned", "tune"]
