"""Floor 1: the noise coordinate `u`, policies as functions of it, and their files. Knows nothing but numbers."""

from .noise import is_flow, log_snr, noise_levels, noise_ratio
from .policy import MODES, Policy, as_policy

__all__ = ["MODES", "Policy", "as_policy", "is_flow", "log_snr", "noise_levels", "noise_ratio"]
