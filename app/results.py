"""The right half of the page: what a comparison found, in tabs."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from . import export, pictures, words
from .runs import LETTERS, Result


class Results:
    """The components, made inside of the block that is open; `updates` fills them."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="tokred-app-")  # of policy files; goes with the process
        self.verdict = gr.HTML()
        with gr.Tabs():
            with gr.Tab("Pictures", id="pictures"):
                self.slider = gr.ImageSlider(
                    format="png", label="A | B", show_label=True, max_height=560, elem_classes="tk-slider",
                    interactive=False, elem_id="slider",
                )  # fmt: skip
                self.gain = gr.Slider(1, 16, 4, step=1, label="Difference, amplified", elem_id="gain")
                self.heat = gr.Image(
                    format="png",
                    label="Difference",
                    show_label=False,
                    interactive=False,
                    height=320,
                    elem_id="heat",
                    buttons=["download", "fullscreen"],
                )
            with gr.Tab("Tokens", id="tokens"):
                self.layer = gr.Dropdown(
                    [], label="What is shown", filterable=False, visible=False, elem_id="layer", interactive=True
                )
                self.step = gr.Slider(
                    1, 2, 1, step=1, label="Step: drag to scrub", visible=False, elem_id="step", interactive=True
                )
                self.legend = gr.HTML(words.note("Each token, at each step: shown after a run with a method."))
                self.tokens = gr.Image(
                    format="png", label="Tokens of this step", show_label=False, interactive=False, height=460,
                    elem_id="tokens", visible=False, buttons=["download", "fullscreen"],
                )  # fmt: skip
            with gr.Tab("Figures", id="figures"):
                self.figures = gr.HTML(words.note("Times, FLOPs, tokens, memory and likeness: shown after a run."))
                self.plot = gr.HTML()
            with gr.Tab("Code", id="code"):
                self.code = gr.Code(
                    "# after a run: the Python that makes these pictures again", language="python",
                    label="Copy as Python", interactive=False, elem_id="code", lines=14,
                )  # fmt: skip
                with gr.Row():
                    self.files = [
                        gr.DownloadButton(
                            f"Save policy of {letter}", visible=False, size="sm", elem_id=f"save-{letter}"
                        )
                        for letter in LETTERS
                    ]

    @property
    def components(self) -> list[Any]:
        return [
            self.verdict, self.slider, self.heat, self.layer, self.step, self.legend, self.tokens, self.figures,
            self.plot, self.code, *self.files,
        ]  # fmt: skip

    def connect(self, current: gr.State) -> None:
        """What changes without a run: the gain, and the step that is shown."""
        quick: dict[str, Any] = dict(
            queue=False, show_progress="hidden", trigger_mode="always_last", api_visibility="private"
        )
        self.gain.change(self._heat, [current, self.gain], self.heat, **quick)
        for component in (self.layer, self.step):
            component.change(self._tokens, [current, self.layer, self.step], [self.tokens, self.legend], **quick)

    def updates(self, found: Result, gain: float) -> dict[Any, Any]:
        """Everything that a result fills."""
        choices = [name for name, _, _ in _layers(found)]
        last = len(_steps(found, choices[-1])) - 1 if choices else 0
        step = 1 + last // 2
        picture, legend = self._tokens(found, choices[-1] if choices else "", step)
        updates: dict[Any, Any] = {
            self.verdict: words.verdict(found),
            self.slider: gr.update(
                value=(found.a.picture, found.b.picture), label=f"A: {found.a.side.name} | B: {found.b.side.name}"
            ),
            self.heat: self._heat(found, gain),
            self.layer: gr.update(choices=choices, value=choices[-1] if choices else None, visible=len(choices) > 1),
            self.step: gr.update(maximum=max(last + 1, 2), value=step, visible=bool(choices)),
            self.legend: legend,
            self.tokens: gr.update(value=picture, visible=bool(choices)),
            self.figures: words.figures(found),
            self.plot: _plot(found),
            self.code: export.code(found),
        }
        for button, letter, drawn in zip(self.files, LETTERS, found.sides, strict=True):
            text = export.policy_text(found, drawn)
            updates[button] = gr.update(
                visible=text is not None, value=None if text is None else self._file(letter, text)
            )
        return updates

    def _heat(self, found: Result | None, gain: float) -> Any:
        return None if found is None else pictures.heat(found.a.picture, found.b.picture, max(1.0, float(gain or 1)))

    def _tokens(self, found: Result | None, layer: str | None, step: float | None) -> tuple[Any, str]:
        for name, place, at in [] if found is None else _layers(found):
            drawn = found.sides[place]  # type: ignore[union-attr]
            if name == layer and drawn.report is not None and (map := drawn.report.token_map) is not None:
                index = min(max(int(step or 1), 1), len(map)) - 1
                noise = next((s for s in drawn.report.steps if s.index == index), None)
                text = f"{LETTERS[place]}, step {index + 1} of {len(map)}"
                if noise is not None:
                    text += f", noise {noise.u:.2f}, {noise.mode}"
                return pictures.tokens(drawn.picture, map, index, at), words.legend(
                    pictures.counts(map, index, at), text
                )
        return None, words.note("Both sides are unpatched: every token was computed.")

    def _file(self, letter: str, text: str) -> str:
        """A file to download, in a folder that is called by its content."""
        folder = Path(self.folder.name) / hashlib.sha256(text.encode()).hexdigest()[:12]
        folder.mkdir(exist_ok=True)
        path = folder / f"policy-{letter.lower()}.json"
        path.write_text(text, encoding="utf-8")
        return str(path)


def _layers(found: Result) -> list[tuple[str, int, tuple[int, int]]]:
    """(name, side, (pass, level)) of all that was recorded; what is looked at first comes last."""
    return [
        (f"{LETTERS[place]}: {name}", place, at)
        for place, drawn in enumerate(found.sides)
        if drawn.report is not None
        for name, at in pictures.layers(drawn.report.token_map)
    ]


def _steps(found: Result, layer: str) -> Any:
    return next(found.sides[place].report.token_map for name, place, _ in _layers(found) if name == layer)  # type: ignore[union-attr]


def _plot(found: Result) -> str:
    curves = [
        pictures.Curve(
            drawn.side.name, drawn.policy, drawn.report.steps, place,
        )
        for place, drawn in enumerate(found.sides) if drawn.policy is not None and drawn.report is not None
    ]  # fmt: skip
    if not curves:
        return ""
    return (
        f'<figure class="tk-plot">{pictures.ratios_svg(curves)}<figcaption>Ratio by noise: lines are what was asked '
        "for, marks are the steps as they ran (ring: in full, dot: reduced, square: reused, triangle: forecast)."
        "</figcaption></figure>"
    )
