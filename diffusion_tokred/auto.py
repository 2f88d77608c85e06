"""`method="auto"`: the policy that `tune` found for this model on this machine, else a default, else a refusal.

Tuned policies lie in `home()`/policies, a file a model: by the class of its denoiser and a hash of its configuration,
so that fine-tunes share one. The last one tuned is used; `Policy.load` takes any other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .backbones import backbone_of
from .backbones.base import default_of
from .defaults import measured_default
from .errors import ConfigError, UnsupportedError
from .home import home
from .methods import MethodConfig, make_config
from .schedule.policy import Policy
from .schedule.stamp import config_hash, library, model_of, scheduler_of

AUTO = "auto"
DISTILLED = ("LCMScheduler", "TCDScheduler")  # schedulers of models that were distilled to a few steps
# By what a model offers, the first that fits: chosen on toy-dit and toy-sd, see docs/benchmarks.md.
DEFAULTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("deep", "deepcache", {}),
    ("stack", "taylorseer", {"interval": 2}),
    ("attention", "taylorseer", {}),
)


def made_for(denoiser: Any, scheduler: Any = None) -> dict[str, Any]:
    """What a policy says of the model, the scheduler and the release that it was made on."""
    found = {"model": model_of([denoiser]), "scheduler": scheduler_of(scheduler), "library": library()}
    return {name: value for name, value in found.items() if value is not None}


def file_of(denoiser: Any) -> Path:
    """Where a model's tuned policy is, or would be."""
    return home() / "policies" / f"{type(denoiser).__name__}-{config_hash(denoiser)}.json"


def remember(policy: Policy, denoiser: Any) -> Path:
    """Make a policy the one that `method="auto"` uses for this model."""
    file = file_of(denoiser)
    file.parent.mkdir(parents=True, exist_ok=True)
    policy.save(file)
    return file


def choose_auto(target: Any, denoiser: Any, kinds: Collection[str]) -> tuple[MethodConfig, Policy | None]:
    """The method and the policy to use.

    Args:
        target: what is patched.
        denoiser: its denoiser.
        kinds: of the sites that it has.

    Raises:
        UnsupportedError: nothing pays, with the reason.
        ConfigError: the file of the tuned policy is damaged.
    """
    file = file_of(denoiser)
    if file.exists():
        policy = Policy.load(file)
        if not isinstance(policy.method, Mapping):
            raise ConfigError(f"{file} does not say for which method it is: delete it, or tune again")
        return MethodConfig.from_dict(dict(policy.method)), policy
    for kind, method, options in DEFAULTS:
        if kind in kinds:
            config = make_config(method, **options)
            if reason := _few(target, getattr(config, "min_steps", 0)):
                raise UnsupportedError(
                    f"nothing pays here: {reason}, which differ too much for what one computes to be used in another; "
                    "name a method to insist"
                )
            return _measured(method, denoiser) or (config, None)
    raise UnsupportedError(
        f"nothing pays here: {type(denoiser).__name__} has neither blocks that can be left out whole nor attention; it "
        f"has {', '.join(sorted(kinds)) or 'no sites'}"
    )


def _measured(method: str, denoiser: Any) -> tuple[MethodConfig, Policy] | None:
    """What was measured for this family of models, if there is that."""
    policy = measured_default(method, backbone_of(denoiser).name)
    return None if policy is None else (MethodConfig.from_dict(dict(policy.method)), policy)


def _few(target: Any, least: int) -> str | None:
    """Why a pipeline's runs have few steps, as far as it is known before them."""
    steps, scheduler = default_of(target, "num_inference_steps"), type(getattr(target, "scheduler", None)).__name__
    if isinstance(steps, int) and steps < least:
        return f"{type(target).__name__} makes {steps} steps"
    return f"{scheduler} is for few steps" if scheduler in DISTILLED else None
