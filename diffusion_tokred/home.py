"""Where this library keeps what it has measured for this user: tuned policies, calibrations of devices."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """The folder that `TOKRED_HOME` names, else `diffusion_tokred` where the system has a user's caches
    (`XDG_CACHE_HOME`, ~/.cache)."""
    return Path(os.environ.get("TOKRED_HOME") or platformdirs.user_cache_dir("diffusion_tokred")).expanduser()
