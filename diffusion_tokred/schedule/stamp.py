"""What a policy was made for: the model, the scheduler, the library, as plain JSON; and whether a model is that one."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError
from ..version import __version__

PARTS = ("unet", "transformer", "transformer_2", "prior")  # where pipelines have their denoisers
# What changes which noise levels a run meets, or what a step of it is. A policy means the same under any of them; what
# was measured was measured under these.
_SETTINGS = (
    "prediction_type", "num_train_timesteps", "timestep_spacing", "beta_schedule", "beta_start", "beta_end",
    "rescale_betas_zero_snr", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas",
    "flow_shift", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "shift_terminal", "solver_order",
    "algorithm_type", "final_sigmas_type",
)  # fmt: skip


def library() -> str:
    return f"diffusion_tokred {__version__}"


def model_of(denoisers: Iterable[Any]) -> dict[str, Any]:
    """The class of a pipeline's denoiser, and a hash of its configuration (of each, where it has two)."""
    found = list(denoisers)
    return {"class": type(found[0]).__name__, "configs": list(dict.fromkeys(map(config_hash, found)))}


def config_hash(model: Any) -> str:
    """16 hexadecimal digits for a model's shape: the same for its fine-tunes.

    Of the entries of its `config` that are not the class's defaults, without those that begin with "_" (paths and
    versions), so that a release of diffusers with one option more changes nothing.
    """
    config = getattr(model, "config", None)
    entries = dict(config) if isinstance(config, Mapping) else dict(vars(config)) if config is not None else {}
    defaults = {name: p.default for name, p in inspect.signature(type(model).__init__).parameters.items()}
    own = {
        name: value
        for name, value in entries.items()
        if not name.startswith("_") and (name not in defaults or _text(value) != _text(defaults[name]))
    }
    return hashlib.sha256(_text(own).encode()).hexdigest()[:16]


def scheduler_of(scheduler: Any) -> dict[str, Any] | None:
    """The class of a scheduler, and those of its settings that matter; None if there is none."""
    if scheduler is None:
        return None
    config = getattr(scheduler, "config", {})
    settings = {name: config[name] for name in _SETTINGS if name in config and config[name] is not None}
    return {"class": type(scheduler).__name__, **json.loads(_text(settings))}


def check_model(made_for: Any, model: Any) -> None:
    """Refuse a model that a policy was not made for.

    Args:
        made_for: the policy's `model`. Only what `model_of` gives is checked; other JSON is a remark.
        model: the denoiser at hand.

    Raises:
        ConfigError: with both.
    """
    if not isinstance(made_for, Mapping) or "class" not in made_for:
        return
    mine, name = config_hash(model), type(model).__name__
    configs = made_for.get("configs")
    if made_for["class"] == name and (not configs or mine in configs):
        return
    shape = f" of the shape {' or '.join(map(str, configs))}" if isinstance(configs, list) and configs else ""
    raise ConfigError(
        f"the policy was made for {made_for['class']}{shape}, and this is {name} of the shape {mine}: use one that was "
        "made for it; or take this one all the same: policy.without_model()"
    )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
