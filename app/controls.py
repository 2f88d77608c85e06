"""A side's controls: a method, its options (made from its config's fields, with their help and limits), a policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

import gradio as gr

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError
from diffusion_tokred.evaluation.options import limits

from .limits import UNPATCHED, Side, config_of, policy_of

MAIN = ("ratio", "factor", "threshold", "interval")  # options that are shown at once; the rest on request
SLIDER_MOST = 64  # a whole number with a higher limit is typed
POLICY_HELP = (
    "Ratio by noise level u, from 1 (noise) to 0: [[1.0, 0.6], [0.3, 0.0]], or what Policy.save wrote. Empty: "
)


class SideControls:
    """The components of one side, made inside of the block that is open.

    Attributes:
        method: the choice; policy: its text, empty for the method's own ratio.
        options: method -> option -> component.
        inputs: all of them, in the order of `read`.
    """

    def __init__(self, letter: str, start: Side) -> None:
        self.letter = letter
        with gr.Column(elem_classes=["tk-side", f"tk-{letter.lower()}"]):
            self._make(letter, start)

    def _make(self, letter: str, start: Side) -> None:
        infos = tokred.methods()
        first = start.config.name if start.config else UNPATCHED
        self.method = gr.Dropdown(
            [UNPATCHED, *(info.name for info in infos)], value=first, label=f"{letter}: method", filterable=False,
            elem_id=f"method-{letter.lower()}",
        )  # fmt: skip
        self.options: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, gr.Group] = {}
        for info in infos:
            known = sorted(fields(info.config), key=lambda f: f.name not in MAIN)
            rest = [f for f in known if f.name not in MAIN]
            chosen = start.config if start.config and start.config.name == info.name else None
            with gr.Group(visible=info.name == first, elem_classes="tk-options") as group:
                made = {f.name: _control(f, getattr(chosen, f.name, f.default)) for f in known if f.name in MAIN}
                if rest:
                    with gr.Accordion(f"{len(rest)} more options of {info.name}", open=False):
                        made |= {f.name: _control(f, getattr(chosen, f.name, f.default)) for f in rest}
            self.options[info.name], self.groups[info.name] = made, group
        with gr.Accordion(f"{letter}: policy", open=False, visible=first != UNPATCHED) as self.more:
            self.policy = gr.Textbox(
                "" if start.policy is None else json.dumps(start.policy.to_dict()), lines=2, max_lines=8,
                label="Policy", info=POLICY_HELP + "the method's own ratio.", elem_id=f"policy-{letter.lower()}",
            )  # fmt: skip
            self.upload = gr.UploadButton(
                "Load a policy file", file_types=[".json"], type="binary", size="sm", elem_id=f"upload-{letter.lower()}"
            )
        self.inputs = [self.method, self.policy, *(c for made in self.options.values() for c in made.values())]

    def connect(self) -> None:
        """Show the chosen method's options only."""
        self.method.change(
            lambda name: [gr.update(visible=name == method) for method in self.groups]
            + [gr.update(visible=name != UNPATCHED)],
            self.method, [*self.groups.values(), self.more], queue=False, show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip

    def read(self, values: Sequence[Any]) -> dict[str, Any]:
        """What `limits.side_of` takes, from the values of `inputs`.

        Raises:
            ConfigError: a list of whole numbers that is none.
        """
        method, policy, *rest = values
        given = iter(rest)
        found = {name: {option: next(given) for option in made} for name, made in self.options.items()}
        if method not in found:
            return {"method": method}
        kinds = {f.name: type(f.default) for f in fields(type(config_of(method)))}
        options = {
            name: _integers(method, name, value) if kinds[name] is tuple else value
            for name, value in found[method].items()
        }
        return {"method": method, "options": options, "policy": policy}

    def show(self, side: Side) -> dict[Any, Any]:
        """Updates that set the controls to a side."""
        updates: dict[Any, Any] = {self.method: UNPATCHED if side.config is None else side.config.name}
        updates[self.policy] = "" if side.policy is None else json.dumps(side.policy.to_dict())
        if side.config is not None:
            for name, component in self.options[side.config.name].items():
                value = getattr(side.config, name)
                updates[component] = ",".join(map(str, value)) if isinstance(value, tuple) else value
        return updates

    def load(self, data: bytes | None) -> dict[Any, Any]:
        """Updates from an uploaded policy: its points, and the method that it was made for if it says which.

        Raises:
            ConfigError: it is none.
        """
        policy = policy_of(data)
        if policy is None:
            raise ConfigError("the file is empty: a policy is JSON, as Policy.save writes it")
        updates: dict[Any, Any] = {self.policy: json.dumps(policy.to_dict())}
        made_for = policy.method
        if isinstance(made_for, dict) and isinstance(made_for.get("_type"), str):
            config = tokred.MethodConfig.from_dict(made_for)
            return self.show(Side(config, policy))
        if isinstance(made_for, str) and made_for in self.options:
            updates[self.method] = made_for
        return updates


def _control(field: Field[Any], value: Any) -> Any:
    """The component for an option: what kind, its help, its limits, its default."""
    meta, kind = field.metadata, type(field.default)
    label, help = field.name, str(meta.get("help", ""))
    if kind is bool:
        return gr.Checkbox(value, label=label, info=help)
    if "choices" in meta:
        return gr.Dropdown(list(meta["choices"]), value=value, label=label, info=help, filterable=False)
    low, high = meta.get("low"), meta.get("high")
    if kind in (int, float) and low is not None and high is not None and (kind is float or high <= SLIDER_MOST):
        step = 1 if kind is int else 0.01 if high <= 1 else 0.05
        return gr.Slider(low, high, value, step=step, label=label, info=help)
    if kind in (int, float):
        return gr.Number(
            value, label=label, info=f"{help} ({limits(field)})", minimum=low, maximum=high,
            precision=0 if kind is int else None,
        )  # fmt: skip
    text = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return gr.Textbox("" if text is None else str(text), label=label, info=f"{help} ({limits(field)})", max_lines=1)


def _integers(method: str, name: str, text: Any) -> list[int]:
    try:
        return [int(part) for part in str(text or "").split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{method}: {name} takes whole numbers such as 0,1, got {str(text)[:40]!r}") from None
