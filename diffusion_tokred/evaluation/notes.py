"""What a reader of a result has to know beside its figures, in sentences: the `notes` of the result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .judges import Judges
from .statistics import FEW
from .weights import NEEDS


def few(prompts: int) -> list[str]:
    """Of a run with so many different prompts."""
    if prompts >= FEW:
        return []
    return [
        f"{prompts} different prompts, fewer than {FEW}: the intervals are too narrow, and no verdict is given (see"
        " docs/how-to-measure.md)"
    ]


def absent(judges: Judges) -> list[str]:
    """Judges that are not here, with the option that would add each."""
    missing = [f"{NEEDS[name].what} ({NEEDS[name].option})" for name in judges.missing]
    return [f"Not here, so without their figures: {'; '.join(missing)}"] if missing else []


def timed(timing: Mapping[str, Any] | None, threads: int) -> list[str]:
    """Where times come from. `threads`: of the drawing, which is no part of the timing."""
    if timing is None:
        return []
    env = timing["env"]
    on = str(env.get("device"))
    if on.startswith("cpu") and env.get("threads"):
        on += f" with {env.get('threads')} threads (pictures are drawn with {threads})"
    versions = [f"{name} {env[name]}" for name in ("torch", "diffusers") if env.get(name)]
    load = [f"load {env['load']:.1f} on {env.get('cpus')} CPUs before"] if "load" in env else []
    return [f"Timed on {', '.join([on, *versions, *load])}, {timing['created']}"]


def departing(protocol: str | None, departures: Sequence[str]) -> list[str]:
    """What of a protocol was chosen otherwise, as `protocols.apply` says it."""
    return [f"Not as in {protocol}: {text}" for text in departures] if protocol else []
