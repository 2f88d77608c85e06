"""The settings that an evaluation compares, the unpatched pipeline first."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ConfigError, UnsupportedError
from ..methods import CONFIGS, MethodConfig
from ..patching import denoisers, patched
from ..ruling import settle
from ..schedule.policy import Policy, as_policy
from . import peers
from .options import config_from
from .options import policy as policy_from
from .peers import PEERS, PeerConfig, parse_peer, peer_from_dict
from .results import version

ANCHORS = {
    "numerics": "the unpatched pipeline with another attention backend: what rounding alone changes",
    "seed": "the unpatched pipeline from other noise: as far apart as two pictures of one prompt are",
    "steps": "the unpatched pipeline with fewer steps: what the same time buys without any reduction",
}
UNPATCHED = "unpatched"
LONGEST = 64  # characters of a name


@dataclass(frozen=True)
class Variant:
    """One setting of a pipeline.

    Attributes:
        name: short and safe as a folder's name.
        config: the method with its options; None leaves the pipeline alone.
        policy: ratio by noise level, as in `patch`.
        call: keyword arguments of the pipeline that differ from the run's, such as `num_inference_steps`.
        anchor: None, or one of `ANCHORS`: what the figures of the others are held against.
        peer: another library's cache with its options, instead of a method.
        bare: the method was named and nothing else: see `suited`.
    """

    name: str
    config: MethodConfig | None = None
    policy: Policy | None = None
    call: Mapping[str, Any] = field(default_factory=dict, hash=False)
    anchor: str | None = None
    peer: PeerConfig | None = None
    bare: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[a-z0-9][a-z0-9._-]{{0,{LONGEST - 1}}}", self.name):
            raise ConfigError(
                f"a variant's name is at most {LONGEST} of a-z, 0-9, '.', '_' and '-', and starts with a letter or a"
                f" digit; got {self.name!r}"
            )
        if self.anchor is not None and self.anchor not in ANCHORS:
            raise ConfigError(f"anchor is one of {', '.join(ANCHORS)}, got {self.anchor!r}")
        if self.anchor and (self.config or self.peer):
            raise ConfigError(f"{self.name}: an anchor is a run of the unpatched pipeline, it takes no method")
        if self.config and self.peer:
            raise ConfigError(f"{self.name}: a method of ours or another library's cache, not both")
        if self.config is None and self.policy is not None:
            raise ConfigError(f"{self.name}: a policy without a method changes nothing")
        for name, value in self.call.items():
            if not isinstance(value, (bool, int, float, str)):
                raise ConfigError(f"{self.name}: {name} of a variant is a number or text, got {type(value).__name__}")
        object.__setattr__(self, "policy", as_policy(self.policy))

    @contextlib.contextmanager
    def applied(self, pipe: Any, seed: int = 0) -> Iterator[Any]:
        """The pipeline in this setting; left as it was. `seed`: of the method's random draws."""
        if self.anchor == "numerics":
            with sdpa_kernel(SDPBackend.MATH):
                yield pipe
        elif self.peer is not None:
            with peers.applied(pipe, self.peer, seed):
                yield pipe
        elif self.config is None:
            yield pipe
        else:
            with patched(pipe, self.config, policy=self.policy, seed=seed):
                yield pipe

    def to_dict(self) -> dict[str, Any]:
        """As plain data: what decides the pictures, beside pipeline, prompt and seed.

        Raises:
            ConfigError: the policy is a function, which nothing can record.
        """
        reduction = None
        if self.config is not None:
            policy = None if self.policy is None else self.policy.to_dict()
            reduction = {"method": self.config.name, "config": self.config.to_dict(), "policy": policy}
        elif self.peer is not None:
            reduction = {"method": self.peer.name, "config": self.peer.to_dict(), "policy": None}
            reduction["package"] = f"{self.peer.package} {version(self.peer.package)}"
        return {"name": self.name, "anchor": self.anchor, "reduction": reduction, "call": dict(self.call)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Variant:
        """The inverse of `to_dict`."""
        found = data["reduction"] or {}
        is_peer = "package" in found
        return Variant(
            name=data["name"],
            config=MethodConfig.from_dict(found["config"]) if found and not is_peer else None,
            peer=peer_from_dict(found["config"]) if is_peer else None,
            policy=Policy.from_dict(found["policy"]) if found.get("policy") else None,
            call=data["call"],
            anchor=data["anchor"],
        )


def check(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """The variants, if they can be compared: the first is the unpatched pipeline, and names differ."""
    if not variants or variants[0] != Variant(UNPATCHED):
        raise ConfigError(f"the first variant is Variant({UNPATCHED!r}): all others are compared with it")
    names = [variant.name for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two variants are called {', '.join(twice)}: their pictures would share a folder")
    return tuple(variants)


def parse_variant(text: str, steps: int | None = None) -> Variant:
    """A variant as it is typed: a method with options, another library's cache, or an anchor.

        tome                                tome:ratio=0.6,levels=0,1,merge_ff
        todo:factor=2,policy=sdxl.json      numerics        seed        steps:12
        diffusers-firstblock:threshold=0.1  (of another library: `peers.PEERS`)

    Args:
        text: as above. `policy=` takes a ratio or the path of a policy's JSON file.
        steps: of the run; an anchor "steps" has fewer.

    Raises:
        ConfigError: no such method, anchor or option, or a wrong value; says what is allowed.
    """
    head, colon, rest = (part.strip() for part in text.partition(":"))
    try:
        if head == UNPATCHED:
            raise ConfigError("the unpatched pipeline is drawn in any case: leave it out")
        if head == "steps":
            return _steps(rest, steps)
        if head in ANCHORS:
            if colon:
                raise ConfigError(f"{head} takes no options")
            return Variant(head, anchor=head)
        if head not in CONFIGS and head not in PEERS:
            raise ConfigError(
                f"no method {head!r}: there is {', '.join(sorted(CONFIGS))}; of other libraries"
                f" {', '.join(sorted(PEERS))}; and numerics, seed and steps:N, runs of the unpatched pipeline to hold"
                " the others against"
            )
        words = [word.strip() for word in re.split(r",(?=\s*[A-Za-z])", rest)] if rest else []  # levels=0,1 is one word
        if head in PEERS:
            peer = parse_peer(head, words)
            return Variant(name_of(peer), peer=peer)
        policies = [word.partition("=")[2] for word in words if word.startswith("policy=")]
        if len(policies) > 1:
            raise ConfigError("more than one policy")
        policy = policy_from(policies[0]) if policies else None
        config = config_from(head, [f"--{word}" for word in words if not word.startswith("policy=")], policy)
        return Variant(name_of(config, policies[0] if policies else None), config, policy, bare=not words)
    except ConfigError as error:
        raise ConfigError(f"variant {text!r}: {error}") from error


def suited(variants: Sequence[Variant], pipe: Any) -> list[Variant]:
    """The variants as `patch` would take them: a method named without options has what was measured for the
    pipeline's family of models, where that was. Names say the options, so two may be the same then: `check` tells."""
    found = []
    for variant in variants:
        if variant.bare and variant.config is not None:
            with contextlib.suppress(UnsupportedError):  # an architecture that is said later
                config, rule = settle(None, variant.config.name, {}, None, denoisers(pipe)[0])
                if rule.measured is not None:
                    variant = Variant(name_of(config), config, rule, variant.call)
        found.append(variant)
    return found


def name_of(config: MethodConfig, policy: str | None = None) -> str:
    """A folder's name for a method: its ratio and the options that were changed, such as "tome-ratio-0.6-merge_ff".

    `policy`: the ratio or the file, as typed.
    """
    parts = [config.name]
    for option in fields(config):
        value = getattr(config, option.name)
        if value == option.default and option.name not in ("ratio", "factor"):
            continue
        if isinstance(value, bool):
            parts.append(option.name if value else f"no_{option.name}")
        else:
            shown = (
                "_".join(map(str, value)) if isinstance(value, tuple) else format(value, "g" * (type(value) is float))
            )
            parts.append(f"{option.name}-{shown}")
    if policy is not None:
        parts.append(f"policy-{Path(policy).stem if policy.endswith('.json') else policy}")
    name = re.sub(r"[^a-z0-9._-]", "_", "-".join(parts).lower())
    if len(name) > LONGEST:
        name = f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _steps(text: str, most: int | None) -> Variant:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"steps takes a number of steps, as steps:12, got {text!r}")
    count = int(text)
    if most is not None and count >= most:
        raise ConfigError(f"{count} steps are not fewer than the run's {most}")
    return Variant(f"steps-{count}", call={"num_inference_steps": count}, anchor="steps")
