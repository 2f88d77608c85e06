"""The three errors a user of the library can meet. Each message says what was found, what is allowed and what to do."""

from __future__ import annotations


class ConfigError(ValueError):
    """An option, a policy or a size that cannot be right."""


class UnsupportedError(ValueError):
    """A model, a method or a combination of the two that the library does not support, with the reason."""


class StateError(RuntimeError):
    """A call at a moment when it cannot work: two runs at once on one denoiser, say."""
