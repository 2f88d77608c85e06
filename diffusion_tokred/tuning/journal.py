"""What a search has measured, in a file: a second call goes on where the first was stopped, and comes to the same end.

Everything that is measured goes through `Journal.do`. The search itself draws its random numbers from a seed and
decides by what was measured, so that going through it again, with the measurements read instead of made, leads to the
same place; the seconds a measurement took are read too, so that a budget of time is spent in the same way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.locks import Lock
from ..evaluation.results import to_json
from ..evaluation.settings import differences

FILE = "journal.jsonl"
VERSION = 1


class Journal:
    """Measurements by what they are of.

    Args:
        out: the folder of the file; None: nothing is kept beyond the call.
        asked: what the measurements depend on beside their names, as plain data.
        resume: take over what is there. Otherwise it is deleted.
        clock: seconds.

    Raises:
        ConfigError: the folder has a journal of something else, or a damaged one; another process works on it.
    """

    def __init__(
        self,
        out: Path | None,
        asked: Mapping[str, Any],
        resume: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.file = None if out is None else out / FILE
        self.known: dict[str, tuple[Any, float]] = {}
        self.used: set[str] = set()
        self.clock = clock
        self._lock: Lock | None = None
        if out is None or self.file is None:
            return
        self._lock = Lock(out)
        self._lock.alone()
        head = json.loads(to_json({"tokred_tune": VERSION, "asked": asked}))
        try:
            if resume and self.file.exists():
                self._read(head)
            else:
                self.file.write_text(json.dumps(head) + "\n", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise

    @property
    def spent(self) -> float:
        """Seconds of all that was used since this journal was opened, whenever it was measured."""
        return sum(self.known[key][1] for key in self.used)

    def do(self, key: str, work: Callable[[], Any]) -> Any:
        """What `work` returns (plain data), or returned before.

        Args:
            key: all that it depends on.
        """
        if key not in self.known:
            start = self.clock()
            value = json.loads(json.dumps(work(), allow_nan=False))
            self.known[key] = value, self.clock() - start
            if self.file is not None:
                line = json.dumps({"key": key, "value": value, "seconds": self.known[key][1]})
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
        self.used.add(key)
        return self.known[key][0]

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()

    def _read(self, head: Mapping[str, Any]) -> None:
        assert self.file is not None
        first, *lines = self.file.read_text(encoding="utf-8").split("\n")
        try:
            found = json.loads(first)
            if found["tokred_tune"] != VERSION:
                raise ConfigError(f"{self.file} is of version {found['tokred_tune']}: this release reads {VERSION}")
            if found["asked"] != head["asked"]:
                changed = "; ".join(differences(found["asked"], head["asked"])[:3])
                raise ConfigError(
                    f"{self.file.parent} has measurements of something else ({changed}): name another folder, or "
                    "begin anew with resume=False"
                )
            whole = lines[:-1]  # what follows the last newline was cut off as it was written
            for line in whole:
                entry = json.loads(line)
                self.known[entry["key"]] = entry["value"], float(entry["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{self.file} is damaged: {error}; begin anew with resume=False") from error
        if lines and lines[-1]:
            self.file.write_text("\n".join([first, *whole]) + "\n", encoding="utf-8")
