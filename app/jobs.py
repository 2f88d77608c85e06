"""Work in a thread of its own, watched by the page: it reports, can be stopped, and never outlives who watches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from .runs import Stopped, Tick

PERIOD = 0.25  # seconds between two reports: more would disturb what is timed
T = TypeVar("T")


class Job(Generic[T]):
    """`work(tell, stop)` under a lock. Iterate to run it: what it tells comes as lists, ticks without those that are
    overtaken. `result` afterwards.

    If the watcher goes away (a closed page, a cancelled request), the iterator is closed: the work is stopped, and
    waited for.
    """

    def __init__(
        self, work: Callable[[Callable[[Any], None], threading.Event], T], lock: Any, stop: threading.Event
    ) -> None:
        self._work, self._lock, self._stop = work, lock, stop
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._found: list[T] = []
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[list[Any]]:
        thread = threading.Thread(target=self._run, name="tokred-run", daemon=True)
        thread.start()
        try:
            while thread.is_alive() or not self._told.empty():
                if told := self._drain():
                    yield told
                time.sleep(0 if self._stop.is_set() else PERIOD)
                thread.join(0.01)
        finally:
            self._stop.set()
            thread.join()

    def result(self) -> T:
        """What the work gave. Raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._found[0]

    def _run(self) -> None:
        try:
            while not self._lock.acquire(timeout=0.2):
                if self._stop.is_set():
                    raise Stopped
            try:
                if self._stop.is_set():
                    raise Stopped
                self._found.append(self._work(self._told.put, self._stop))
            finally:
                self._lock.release()
        except BaseException as error:
            self._error = error

    def _drain(self) -> list[Any]:
        """All that was told, in order; of ticks the last one, and of those with a picture the last of each side."""
        told = []
        while not self._told.empty():
            told.append(self._told.get())
        ticks = [i for i, message in enumerate(told) if isinstance(message, Tick)]
        wanted = {told[i].side: i for i in ticks if told[i].picture is not None}
        keep = {*wanted.values(), *ticks[-1:]}
        return [message for i, message in enumerate(told) if not isinstance(message, Tick) or i in keep]


class Stops:
    """Who can be stopped: by the session that started it."""

    def __init__(self) -> None:
        self._guard = threading.Condition()
        self._running: dict[str, set[threading.Event]] = {}

    def new(self, session: str) -> threading.Event:
        stop = threading.Event()
        with self._guard:
            self._running.setdefault(session, set()).add(stop)
        return stop

    def forget(self, session: str, stop: threading.Event) -> None:
        with self._guard:
            self._running.get(session, set()).discard(stop)
            if not self._running.get(session):
                self._running.pop(session, None)
            self._guard.notify_all()

    def ask(self, session: str) -> list[threading.Event]:
        """Ask all that a session runs to stop, without waiting."""
        with self._guard:
            found = list(self._running.get(session, ()))
            for stop in found:
                stop.set()
        return found

    def stop(self, session: str, patience: float = 60.0) -> int:
        """Stop all that a session runs, and wait until it has stopped. Returns how many that were."""
        found = self.ask(session)
        with self._guard:
            self._guard.wait_for(lambda: not self._running.get(session, set()) & set(found), patience)
        return len(found)
