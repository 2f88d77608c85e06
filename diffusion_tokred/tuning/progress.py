"""What a search is doing, and how much time is left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

EVERY = 30.0  # seconds between lines where there is no terminal

Tell = Callable[[str, float], None]  # what is done, and the share of all that is


@contextlib.contextmanager
def telling(progress: bool | Tell) -> Iterator[Tell]:
    """What to call with each bit of progress. `progress`: True, False, or what is called itself."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda what, share: None
        return
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (
        bars.TextColumn("{task.description:<34}"), bars.BarColumn(), bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(), "left", bars.TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    # Few refreshes: the bar runs beside what is timed.
    with bars.Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        start, task = time.monotonic(), bar.add_task("starting", total=1.0, left="-:--")

        def tell(what: str, share: float) -> None:
            bar.update(task, description=what[:34], completed=share, left=left(time.monotonic() - start, share))

        yield tell


def left(elapsed: float, share: float) -> str:
    """The time left, as minutes and seconds, if the rest goes on as before."""
    if not 0 < share <= 1:
        return "-:--"
    minutes, seconds = divmod(round(elapsed * (1 - share) / share), 60)
    return f"{minutes}:{seconds:02}"


def _lines() -> Tell:
    start = said = time.monotonic()

    def tell(what: str, share: float) -> None:
        nonlocal said
        if (now := time.monotonic()) - said > EVERY:
            said = now
            print(f"tune: {share:.0%}, {left(now - start, share)} left, {what}", file=sys.stderr, flush=True)

    return tell
