"""Floor 1: the noise coordinate `u`, policies as functions of it, and their files; and the published schedules of
caching, by step. Knows nothing but numbers.
"""

from .intervals import (
    CatCounts,
    cat_counts,
    cat_is_full,
    duca_kind,
    fixed_full_steps,
    is_full,
    ras_active,
    toca_full_steps,
    toca_share,
)
from .noise import is_flow, log_snr, noise_levels, noise_ratio
from .points import MODES
from .policy import Policy, Rule, as_policy
from .stamp import check_model, config_hash, model_of, scheduler_of

__all__ = [
    "MODES",
    "CatCounts",
    "Policy",
    "Rule",
    "as_policy",
    "cat_counts",
    "cat_is_full",
    "check_model",
    "config_hash",
    "duca_kind",
    "fixed_full_steps",
    "is_flow",
    "is_full",
    "log_snr",
    "model_of",
    "noise_levels",
    "noise_ratio",
    "ras_active",
    "scheduler_of",
    "toca_full_steps",
    "toca_share",
]
