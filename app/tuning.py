"""The tune page: the policy for a speed or a likeness, found by measuring the model that is loaded."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError
from diffusion_tokred.tuning import report

from . import words
from .errors import answered
from .jobs import Job
from .limits import MOST_LETTERS, Setup, Side, number, setup_of, whole
from .models import QUEUE, Model, usual_of
from .runs import Stopped, Tick

if TYPE_CHECKING:
    from .page import Page

MOST_PROMPTS, MOST_EVALUATIONS = 48, 200
GOALS = ("times as fast", "PSNR in dB, at least")
ROUNDS = (2, 4)  # of measuring steps, and of timing what is reported
PROMPTS = """a big red circle above a small blue square on a plain gray background
a small green square left of a big yellow star on a plain white background
a big purple ring below a small red ring on a striped brown background
a small blue star right of a big cyan circle on a striped pink background
a big yellow square above a small green circle on a checked gray background
a small red ring left of a big purple star on a dotted black background"""


def search(
    model: Model, setup: Setup, prompts: Sequence[str], goal: str, target: float, methods: Sequence[str] | None,
    budget: int, tell: Callable[[Any], None], stop: threading.Event,
) -> tokred.Tuned:  # fmt: skip
    """`tokred.tune` with a third of the prompts to search and the others to decide.

    When it is stopped the best so far comes, with status "interrupted".

    Raises:
        Stopped: before anything was found.
        ConfigError, UnsupportedError: as `tokred.tune`.
    """
    told = [False]

    def before(*_: Any) -> None:
        if stop.is_set() and not told[0]:  # once: `tune` then makes do with what it has
            told[0] = True
            raise KeyboardInterrupt

    handle = model.denoiser.register_forward_pre_hook(before)
    wanted: dict[str, Any] = {"target_speedup" if goal == GOALS[0] else "min_psnr": target}
    call = {
        "num_inference_steps": setup.steps, "guidance_scale": setup.guidance, "width": setup.width,
        "height": setup.height, **model.call,
    }  # fmt: skip
    try:
        return tokred.tune(
            model.pipe, prompts, **wanted, methods=methods, budget=budget, call=call, keep=False, model=model.name,
            seed=setup.seed, rounds=ROUNDS, progress=lambda what, share: tell(Tick(what, share, None)),
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Stopped from None
    finally:
        handle.remove()


def prompts_of(text: Any) -> list[str]:
    """One a line, without repeats. Raises ConfigError: too few, too many, too long."""
    lines = [" ".join(line.split()) for line in str(text or "")[: MOST_PROMPTS * MOST_LETTERS].splitlines()]
    found = list(dict.fromkeys(line for line in lines if line))
    if not 3 <= len(found) <= MOST_PROMPTS:
        raise ConfigError(f"{len(found)} different prompts: from 3 to {MOST_PROMPTS}, one a line")
    if any(len(line) > MOST_LETTERS for line in found):
        raise ConfigError(f"a prompt has up to {MOST_LETTERS:,} letters")
    return found


class Tune:
    """The components of the page, made inside of the block that is open, and the endpoint /tune."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.folder = tempfile.TemporaryDirectory(prefix="tokred-tune-")
        usual = usual_of(page.models.names[0])
        width, height = usual["size"]
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self.prompts = gr.Textbox(
                    PROMPTS, lines=6, max_lines=12, label="Prompts, one a line", elem_id="tune-prompts",
                    info="what the model is used for: a third to search with, the others decide",
                )  # fmt: skip
                with gr.Row():
                    self.goal = gr.Dropdown(
                        list(GOALS), value=GOALS[0], label="Target", filterable=False, min_width=150
                    )
                    self.target = gr.Number(1.5, label="How much", min_width=90, elem_id="tune-target")
                self.methods = gr.Dropdown(
                    [info.name for info in tokred.methods()], value=[], multiselect=True, label="Methods",
                    info="none: all that work on the model", elem_id="tune-methods",
                )  # fmt: skip
                with gr.Row():
                    self.budget = gr.Number(
                        12, label="Evaluations", precision=0, min_width=90, elem_id="tune-budget", info="more find more"
                    )
                    self.steps = gr.Number(
                        usual["steps"], label="Steps", info="of each", precision=0, min_width=90, elem_id="tune-steps"
                    )
                with gr.Row():
                    self.width = gr.Number(width, label="Width", precision=0, min_width=90, elem_id="tune-width")
                    self.height = gr.Number(height, label="Height", precision=0, min_width=90, elem_id="tune-height")
                    self.guidance = gr.Number(usual["guidance"], label="Guidance", min_width=90)
            with gr.Column(scale=7, min_width=320):
                with gr.Row():
                    self.go = gr.Button("Tune", variant="primary", elem_id="tune-run")
                    self.stop = gr.Button("Stop, keep the best", elem_id="tune-stop", min_width=80)
                self.status = gr.HTML(
                    words.note("Measures what steps cost on this machine, searches, and lets held-out prompts decide."),
                    elem_id="tune-status",
                )
                self.head = gr.HTML(elem_id="tune-table")
                self.plot = gr.Image(
                    format="png", label="Quality and speed", show_label=False, interactive=False, visible=False,
                    buttons=["download", "fullscreen"], elem_id="tune-plot",
                )  # fmt: skip
                with gr.Row():
                    self.use = gr.Button("Use it on side B", visible=False, size="sm", elem_id="tune-use")
                    self.file = gr.DownloadButton("Save the policy", visible=False, size="sm")
                self.data = gr.JSON(label="tokred.result/1", visible=False)
        self.found = gr.State(None)
        outputs = [self.status, self.head, self.plot, self.use, self.file, self.data, self.found]
        self.go.click(  # not among what Stop cancels: what was found so far is wanted
            answered(self._run),
            [self.prompts, self.goal, self.target, self.methods, self.budget, self.steps, self.width, self.height,
             self.guidance, page.model],
            outputs, api_name="tune", concurrency_limit=1, concurrency_id=QUEUE, show_progress="minimal",
            show_progress_on=self.status,
        )  # fmt: skip
        self.stop.click(self._stop, None, None, queue=False, api_visibility="private")

    def connect(self) -> None:
        """Hand what was found to side B."""
        controls = self.page.b
        self.use.click(
            lambda found: {} if found is None else controls.show(found), self.found, controls.inputs,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip

    def _stop(self, request: gr.Request) -> None:
        self.page.stops.ask(request.session_hash or "")

    def _run(
        self, request: gr.Request, prompts: str, goal: str, target: float, methods: list[str], budget: float,
        steps: float, width: float, height: float, guidance: float, model: str,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Find the policy for a target: a table, a plot, the policy's file and a tokred.result/1."""
        page = self.page
        name = model or page.models.names[0]
        setup = setup_of(name, "-", 0, steps, width, height, guidance, 0, page.models.names, 4096)
        lines, count = prompts_of(prompts), whole("evaluations", budget, 1, MOST_EVALUATIONS)
        if goal not in GOALS:
            raise ConfigError(f"the target is one of: {'; '.join(GOALS)}")
        target = number("the target", target, 1, 100)
        session = request.session_hash or ""
        stop, empty = page.stops.new(session), (gr.skip(),) * 6
        try:
            yield words.progress(None, f"loading {name}", {}), *empty
            loaded = page.loaded(setup)
            job = Job(
                lambda tell, stop: search(loaded, setup, lines, goal, target, methods or None, count, tell, stop),
                page.models.lock, stop,
            )  # fmt: skip
            began = page.clock()
            for told in job:
                passed, tick = page.clock() - began, told[-1]
                left = passed * (1 - tick.share) / tick.share if tick.share > 0.02 else None
                yield words.progress(Tick(tick.what, tick.share, left), tick.what, {}), *empty
            yield self._show(job.result())
        except Stopped:
            yield words.note("Stopped, before anything was found.", "tk-stopped"), *empty
        finally:
            page.stops.forget(session, stop)

    def _show(self, found: tokred.Tuned) -> tuple[Any, ...]:
        data = found.to_dict()
        table = report.brief(data)
        notes = "".join(words.note(line) for line in (*report.head(data), *found.notes))
        path = Path(tempfile.mkdtemp(dir=self.folder.name))
        found.policy.save(path / "policy.json")
        picture = None
        if report.plot(data, path / "plot.png"):
            with Image.open(path / "plot.png") as drawn:
                picture = drawn.convert("RGB")
        done = "Done." if found.status == "complete" else "Stopped: the best so far."
        return (
            words.note(done + ("" if found.reached else " The target was not reached.")),
            words.table(table.head, [list(map(str, row)) for row in table.rows]) + notes,
            gr.update(value=picture, visible=picture is not None),
            gr.update(visible=True),
            gr.update(value=str(path / "policy.json"), visible=True),
            data,
            Side(found.config, found.policy),
        )
