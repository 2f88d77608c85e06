"""Settings that were chosen by measuring: for a method and an architecture family a policy, and what was measured.

They are in `defaults.json`, and hold where a method is named without options and without a policy. Where there is none,
the method's own defaults hold, which are the paper's unless its documentation says otherwise.
"""

from __future__ import annotations

import functools
import json
from importlib import resources

from .schedule.policy import Policy


def measured_default(method: str, family: str) -> Policy | None:
    """The policy for a method on an architecture family, such as "sd3"; its `measured` says what chose it."""
    return _read().get((family, method))


def measured_families(method: str) -> tuple[str, ...]:
    """The families for which a method has one."""
    return tuple(sorted(family for family, name in _read() if name == method))


def origin(policy: Policy) -> str:
    """What chose a default, in a sentence."""
    found = policy.measured
    return (
        f"measured: {found['speedup'][0]:.2f}x on {found['model']} ({found['steps']} steps, {found['device']}), "
        f"{found['psnr'][0]:.1f} dB to the unpatched pictures; {found['report']}, {found['variant']}"
    )


@functools.cache
def _read() -> dict[tuple[str, str], Policy]:
    text = resources.files(__package__).joinpath("defaults.json").read_text(encoding="utf-8")
    return {
        (family, method): Policy.from_dict(data)
        for family, methods in json.loads(text).items()
        for method, data in methods.items()
    }
