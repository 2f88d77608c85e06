"""Two runs never write to one folder: a lock that dies with its process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ..errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Lock:
    """The lock of a folder, `.lock` in it.

    The first process of a run takes it alone, prepares the folder, and then shares it with the others: while one of
    them lives, no other run gets it alone. Where there are no such locks (Windows, some network file systems), the
    process and host that are written in the file must do.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._handle = -1
        self._first = False

    def alone(self) -> None:
        """Take it. The folder is made if it is missing.

        Raises:
            ConfigError: somebody works here.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        holder = os.read(self._handle, 500).decode(errors="replace").strip()
        free = self._flock("LOCK_EX")
        if free is None:
            free = not _alive(holder)
        if not free:
            self.release()
            raise ConfigError(
                f"{self.path.parent} is being worked on by {holder or 'another process'}: wait for it, or name another"
                f" folder (if there is no such process, delete {self.path})"
            )
        self._first = True
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.write(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def share(self) -> None:
        """After `alone`: let the others of the run in. In one of these: come in."""
        if self._handle < 0:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        if self._flock("LOCK_SH") is False:
            raise ConfigError(f"{self.path.parent} is being worked on by another run")

    def release(self) -> None:
        """Let go of it. Harmless twice."""
        if self._handle >= 0:
            if self._first:
                os.ftruncate(self._handle, 0)
            os.close(self._handle)
        self._handle, self._first = -1, False

    def _flock(self, kind: str) -> bool | None:
        """Whether the system gave it; None where it has no such locks."""
        if fcntl is None:
            return None
        try:
            fcntl.flock(self._handle, getattr(fcntl, kind) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True


def _alive(holder: str) -> bool:
    """Whether "process 12 on host" may be at work. Of another host, or on Windows, nobody can tell: so, yes."""
    words = holder.split()
    if len(words) != 4 or not words[1].isdigit() or int(words[1]) == os.getpid():
        return False
    if words[3] != socket.gethostname() or os.name == "nt":
        return True
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
