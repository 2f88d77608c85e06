"""The page: both sides' controls, what a run shows, the history; and a tab for each of the other pages."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError
from diffusion_tokred.evaluation.compare import PROMPT
from diffusion_tokred.evaluation.models import unread

from . import api, batch, history, tuning, words
from .controls import SideControls
from .errors import answered
from .jobs import Job, Stops
from .limits import MOST_PAIRS, MOST_STEPS, Setup, Side, painted_of, setup_of, side_of
from .look import TOGGLE
from .models import QUEUE, Model, Models, usual_of
from .results import Results
from .runs import Drawn, Result, Stopped, Tick, compare

EXAMPLES = (
    ["a big red circle above a small blue square on a plain gray background", 0, "unpatched", "tome"],
    ["a big red star above a small blue ring on a striped pink background", 1, "unpatched", "toca"],
    ["a small green square left of a big yellow star on a plain white background", 2, "tome", "todo"],
    ["a big purple ring below a small yellow star on a checked gray background", 3, "fora", "taylorseer"],
)


def build(models: Models | Sequence[str] | str = ("toy-dit", "toy-sd"), device: str | None = None) -> gr.Blocks:
    """The app as gradio Blocks; nothing is loaded until somebody opens it.

    Args:
        models: names that may be chosen: embedded pipelines, folders, hub ids. The first is the one to begin with.
        device: as in `tokred compare`.
    """
    if not isinstance(models, Models):
        models = Models([models] if isinstance(models, str) else models, device)
    return Page(models).blocks


class Page:
    """The components and what they do; `blocks` is what gradio serves."""

    def __init__(self, models: Models) -> None:
        self.models, self.stops, self.clock = models, Stops(), time.monotonic
        self.can_protect = "protect" in inspect.signature(tokred.patch).parameters
        first = models.names[0]
        usual = usual_of(first)
        with gr.Blocks(title="diffusion_tokred", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            self.current, self.past = gr.State(None), gr.State([])
            with gr.Row():
                gr.HTML(
                    "<h1>diffusion_tokred</h1><p>Token reduction, side by side: one noise, two ways to compute.</p>",
                    elem_classes="tk-title",
                )
                gr.Button("◐", size="sm", elem_classes="tk-theme", elem_id="theme").click(None, js=TOGGLE)
            with gr.Row(equal_height=True):
                self.model = gr.Dropdown(
                    list(models.names), value=first, label="Model", filterable=False, scale=1, elem_id="model"
                )
                self.state = gr.HTML(words.state_line(*models.state(first)), elem_id="state")
            with gr.Tabs():
                with gr.Tab("A/B", id="ab"), gr.Row():
                    with gr.Column(scale=4, min_width=320):
                        self._controls(usual)
                    with gr.Column(scale=7, min_width=320):
                        with gr.Row():
                            self.run = gr.Button("Run both", variant="primary", elem_id="run", min_width=100)
                            self.rerun = gr.Button("Keep A, run B", elem_id="rerun", min_width=100)
                            self.stop = gr.Button("Stop", elem_id="stop", min_width=70)
                        self.status = gr.HTML(
                            words.note("Choose two sides and run them: same prompt, same noise."), elem_id="status"
                        )
                        self.results = Results()
                        self.gallery = gr.Gallery(
                            label="History of this session: click to restore", columns=4, height=240, format="png",
                            allow_preview=False, visible=False, elem_id="history", object_fit="contain",
                            fit_columns=False,
                        )  # fmt: skip
                with gr.Tab("Batch", id="batch"):
                    self.batch = batch.Batch(self)
                with gr.Tab("Tune", id="tune"):
                    self.tune = tuning.Tune(self)
            self.timer = gr.Timer(0.5)
            api.add(self)
            self._connect()

    def _controls(self, usual: dict[str, Any]) -> None:
        width, height = usual["size"]
        self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=6, elem_id="prompt")
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90, elem_id="seed")
            self.steps = gr.Number(
                usual["steps"], label="Steps", precision=0, minimum=1, maximum=MOST_STEPS, min_width=90, elem_id="steps"
            )
            self.guidance = gr.Number(
                usual["guidance"], label="Guidance", minimum=0, maximum=100, min_width=90, elem_id="guidance"
            )
        with gr.Row():
            self.width = gr.Number(width, label="Width", precision=0, minimum=16, min_width=90, elem_id="width")
            self.height = gr.Number(height, label="Height", precision=0, minimum=16, min_width=90, elem_id="height")
            self.repeat = gr.Number(
                2, label="Timed pairs", precision=0, minimum=0, maximum=MOST_PAIRS, min_width=90, elem_id="repeat"
            )
        self.a = SideControls("A", Side())
        self.b = SideControls("B", Side(tokred.ToMeConfig()))
        with gr.Accordion("Protected regions", open=False, visible=self.can_protect):
            gr.HTML(words.note("Paint what must stay exact: its tokens are computed in any case, on both sides."))
            self.mask = gr.ImageEditor(
                label="Protect", type="pil", format="png", layers=False, transforms=(), sources=(), height=360,
                brush=gr.Brush(default_size=10, colors=["#009e73"], color_mode="fixed"), canvas_size=(512, 512),
                elem_id="mask",
            )  # fmt: skip
            self.take = gr.Button("Paint on the picture of A", size="sm")
        gr.Examples(
            [list(example) for example in EXAMPLES], [self.prompt, self.seed, self.a.method, self.b.method],
            label="Examples", cache_examples=False, api_visibility="private",
            example_labels=[f"{a} | {b}, seed {seed}" for _, seed, a, b in EXAMPLES],
        )  # fmt: skip

    @property
    def inputs(self) -> list[Any]:
        """What decides a comparison."""
        return [
            self.model, self.prompt, self.seed, self.steps, self.width, self.height, self.guidance, self.repeat,
            self.mask, *self.a.inputs, *self.b.inputs,
        ]  # fmt: skip

    def _connect(self) -> None:
        private: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
        self.a.connect()
        self.b.connect()
        self.results.connect(self.current)
        self.tune.connect()
        for controls in (self.a, self.b):
            controls.upload.upload(
                answered(controls.load), controls.upload, controls.inputs, concurrency_limit=None, **private
            )  # fmt: skip
        shown = [self.status, *self.results.components, self.current, self.past, self.gallery]
        model: dict[str, Any] = dict(concurrency_limit=1, concurrency_id=QUEUE, api_visibility="private")
        model |= dict(show_progress="minimal", show_progress_on=self.status)
        inputs = [self.current, self.past, self.results.gain, *self.inputs]
        began = [
            self.run.click(answered(self._run), inputs, shown, **model),
            self.prompt.submit(answered(self._run), inputs, shown, **model),
            self.rerun.click(answered(self._rerun), inputs, shown, **model),
        ]
        # Two ways to stop: `cancels` takes a run out of the queue or closes it, the flag is read at each step.
        self.stop.click(self.stop_all, None, self.status, queue=False, cancels=list[Any](began), **private)
        self.gallery.select(
            answered(self._restore), [self.past, self.results.gain],
            [self.model, *self.inputs[1:8], *self.a.inputs, *self.b.inputs, *shown[:-2]], concurrency_limit=None,
            **private,
        )  # fmt: skip
        usual = [self.steps, self.guidance, self.width, self.height]
        self.model.change(self._chosen, self.model, [self.state, self.timer, *usual], queue=False, **private)
        looks = [self.state, self.timer, self.a.method, self.b.method]
        self.timer.tick(self._look, self.model, looks, queue=False, **private)
        self.blocks.load(self._chosen, self.model, [self.state, self.timer, *usual], queue=False, **private)
        self.take.click(
            lambda found: None if found is None else {"background": found.a.picture, "layers": [], "composite": None},
            self.current, self.mask, queue=False, **private,
        )  # fmt: skip

    # --- the model's state ----------------------------------------------------------------------------------------

    def _chosen(self, name: str) -> tuple[Any, ...]:
        """Begin to load a model, and say so; its usual settings."""
        self.models.start(name)
        model = self.models.ready(name)
        usual = usual_of(name) if model is None else model.usual
        width, height = usual["size"]
        return (
            words.state_line(*self.models.state(name)), gr.Timer(active=True),
            usual["steps"], usual["guidance"], width, height,
        )  # fmt: skip

    def _look(self, name: str) -> tuple[Any, ...]:
        """How far the loading is; once it is done, which methods there are for this model."""
        state, text = self.models.state(name)
        if state in ("waiting", "loading"):
            return words.state_line(state, text), gr.skip(), gr.skip(), gr.skip()
        model = self.models.ready(name)
        methods = gr.skip() if model is None else gr.update(choices=["unpatched", *model.works])
        return words.state_line(state, text), gr.Timer(active=False), methods, methods

    # --- runs -----------------------------------------------------------------------------------------------------

    def settings(self, values: Sequence[Any]) -> tuple[Setup, tuple[Side, Side]]:
        """Both sides' settings, from the values of `inputs`.

        Raises:
            ConfigError: one of them cannot be.
        """
        name, prompt, seed, steps, width, height, guidance, repeat, painted = values[:9]
        model = self.models.ready(name)
        setup = setup_of(
            name, prompt, seed, steps, width, height, guidance, repeat, self.models.names,
            model.largest if model else 4096,
        )  # fmt: skip
        cut = 9 + len(self.a.inputs)
        mask = painted_of(painted) if self.can_protect else None
        sides = [
            side_of(controls.read(part), mask) for controls, part in ((self.a, values[9:cut]), (self.b, values[cut:]))
        ]
        return setup, (sides[0], sides[1])

    def _run(self, request: gr.Request, current: Result | None, past: list[Result], gain: float, *values: Any) -> Any:
        setup, sides = self.settings(values)
        yield from self._show(request, setup, sides, None, past, gain)

    def _rerun(self, request: gr.Request, current: Result | None, past: list[Result], gain: float, *values: Any) -> Any:
        setup, sides = self.settings(values)
        yield from self._show(request, setup, sides, kept_of(current, setup, sides[0]), past, gain)

    def _show(
        self, request: gr.Request, setup: Setup, sides: tuple[Side, Side], kept: Drawn | None, past: list[Result],
        gain: float,
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        """A run as the page sees it: progress and previews, the pictures, the times."""
        found: Result | None = None
        previews = {} if kept is None else {0: kept.picture}
        try:
            for message in self.drawing(request.session_hash or "", setup, sides, kept):
                if isinstance(message, Result):
                    found, previews = message, {}
                    yield self.results.updates(found, gain) | {self.current: found}
                else:
                    if message.picture is not None:
                        previews[message.side] = message.picture
                    yield {self.status: words.progress(message, message.what, previews)}
            text = "Done: the same noise on both sides." if found and found.same_noise else "Done."
            note = words.note(text)
        except Stopped:
            note = words.note("Stopped." + (" What is shown is whole." if found else ""), "tk-stopped")
        except Exception:
            yield {self.status: words.note("Nothing was drawn: see the message.")}
            raise
        if found is None:
            yield {self.status: note}
            return
        past = history.add(past, found)
        yield {
            self.status: note, self.past: past,
            self.gallery: gr.update(value=history.tiles(past), visible=True, selected_index=None),
        }  # fmt: skip

    def drawing(
        self, session: str, setup: Setup, sides: tuple[Side, Side], kept: Drawn | None = None
    ) -> Iterator[Tick | Result]:
        """A comparison as it comes: ticks; the result once its pictures are there; and again with its times.

        Raises:
            Stopped: by the session, or since nobody watches any more.
            ConfigError, UnsupportedError, StateError: it cannot run.
        """
        stop = self.stops.new(session)
        try:
            yield Tick(f"loading {setup.model}", 0.0, None)
            model = self.loaded(setup)
            if note := unread(model.pipe, setup.prompt):
                yield Tick(note, 0.0, None)

            def work(tell: Any, stop: Any) -> Result:
                return compare(model, setup, sides, tell, stop, kept, show=tell)

            job = Job(work, self.models.lock, stop)
            for told in job:
                yield from told
            yield job.result()
        finally:
            self.stops.forget(session, stop)

    def loaded(self, setup: Setup) -> Model:
        """The model; waits until it is loaded.

        Raises:
            ConfigError: it cannot be loaded, or it draws no such sizes.
        """
        model = self.models.get(setup.model)
        if max(setup.width, setup.height) > model.largest:
            raise ConfigError(f"width and height go up to {model.largest} for {model.name}")
        return model

    def stop_all(self, request: gr.Request) -> str:
        """Stop what the session runs; in words."""
        count = self.stops.stop(request.session_hash or "")
        return words.note("Stopped: within one step." if count else "Nothing was running.", "tk-stopped")

    def _restore(self, event: gr.SelectData, past: list[Result], gain: float) -> dict[Any, Any]:
        """The controls and the results of an earlier run."""
        found = past[int(event.index)]
        s = found.setup
        updates: dict[Any, Any] = {
            self.prompt: s.prompt, self.seed: s.seed, self.steps: s.steps, self.width: s.width,
            self.height: s.height, self.guidance: s.guidance, self.repeat: s.repeat, self.current: found,
            self.status: words.note(f"Restored: {found.a.side.name} | {found.b.side.name}, seed {s.seed}."),
        }  # fmt: skip
        return updates | self.a.show(found.a.side) | self.b.show(found.b.side) | self.results.updates(found, gain)


def kept_of(current: Result | None, setup: Setup, side: Side) -> Drawn:
    """A of the last run, if it would be the same now.

    Raises:
        ConfigError: there is none, or something that decides its picture has changed.
    """
    if current is None:
        raise ConfigError("there is no A to keep yet: run both")
    if current.setup.picture != setup.picture:
        names = ("model", "prompt", "seed", "steps", "width", "height", "guidance")
        pairs = zip(names, current.setup.picture, setup.picture, strict=True)
        raise ConfigError(f"A cannot be kept, {', '.join(n for n, a, b in pairs if a != b)} changed: run both")
    if current.a.side != side:
        raise ConfigError("A cannot be kept, its own settings changed: run both")
    return current.a
