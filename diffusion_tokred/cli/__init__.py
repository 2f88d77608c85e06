"""The `tokred` command: what the library does, in words. Heavy imports wait until a command needs them."""

from . import commands, evaluate, serve, tune  # noqa: F401
from .common import app


def main() -> None:
    """The console command."""
    app()
