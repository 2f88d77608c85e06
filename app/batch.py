"""The batch page: several seeds by several settings, a grid of pictures and a table."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from diffusion_tokred import ConfigError
from diffusion_tokred.evaluation.compare import PROMPT
from diffusion_tokred.evaluation.metrics import Spread, psnr, speedup, ssim
from diffusion_tokred.evaluation.options import seeds as seeds_of
from diffusion_tokred.evaluation.results import environment, prompts_of, result

from . import pictures, words
from .errors import answered
from .jobs import Job
from .limits import UNPATCHED, Setup, Side, setup_of, side_of
from .models import QUEUE, Model, usual_of
from .runs import Drawn, Runner, Stopped, Tick

if TYPE_CHECKING:
    from .page import Page

MOST_SEEDS, MOST_SETTINGS, MOST_PICTURES = 16, 12, 64
SETTINGS = "tome:ratio=0.25\ntome:ratio=0.5\ntodo\ntoca"
HEADS = ("setting", "seconds a call", "speed-up", "FLOPs", "left out", "PSNR", "SSIM")


@dataclass
class Grid:
    """What a batch has drawn so far: for each setting (the unpatched pipeline first) and each seed."""

    setup: Setup
    sides: tuple[Side, ...]
    seeds: tuple[int, ...]
    counted: list[Drawn] = field(default_factory=list)
    pictures: list[list[Image.Image]] = field(default_factory=list)  # of each setting, by seed
    seconds: list[list[float]] = field(default_factory=list)
    env: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Seeds that every setting has drawn."""
        return min(map(len, self.pictures), default=0)

    def picture(self) -> Image.Image:
        rows = [
            (f"seed {seed}", [drawn[i] for drawn in self.pictures]) for i, seed in enumerate(self.seeds[: self.done])
        ]
        return pictures.grid(rows, [side.name for side in self.sides])

    def rows(self) -> list[dict[str, Any]]:
        """A line a setting: medians and quartiles over the seeds; speed-ups are of calls of the same seed."""
        n, found = self.done, []
        base, times = self.pictures[0][:n], self.seconds[0][:n]
        for place, side in enumerate(self.sides):
            drawn, mine, flops = self.counted[place], self.pictures[place][:n], self.counted[place].flops
            dense = next((d.report.flops_dense for d in self.counted if d.report), self.counted[0].flops)
            found.append(
                {
                    "setting": side.to_dict(),
                    "name": side.name,
                    "seconds": self.seconds[place][:n],
                    "speedup": vars(speedup(times, self.seconds[place][:n])),
                    "flops": dense if drawn.report is None else flops,
                    "flops_unpatched": dense,
                    "tokens_saved": 0.0 if drawn.report is None else drawn.report.tokens_saved,
                    "psnr": [psnr(a, b) for a, b in zip(base, mine, strict=True)],
                    "ssim": [ssim(a, b) for a, b in zip(base, mine, strict=True)],
                    "why_null": {"flops": "an architecture that cannot be counted"} if dense is None else {},
                }
            )
        return found

    def table(self) -> str:
        lines = []
        for row in self.rows():
            first, flops = row["name"] == UNPATCHED, row["flops"]
            share = f"{flops / row['flops_unpatched']:.0%}" if flops and row["flops_unpatched"] else "not counted"
            value = statistics.median(row["psnr"])
            near = "equal" if value == float("inf") else f"{value:.1f} dB"
            speed = Spread(**row["speedup"]).text(2, "×").replace("-", "–")
            lines.append(
                (
                    row["name"], Spread.of(row["seconds"]).text(3).replace("-", "–"), "" if first else speed, share,
                    f"{row['tokens_saved']:.0%}", "" if first else near,
                    "" if first else f"{Spread.of(row['ssim']).median:.3f}",
                )
            )  # fmt: skip
        return words.table(HEADS, lines)

    def to_dict(self) -> dict[str, Any]:
        """As plain data in the schema `tokred.result/1`."""
        s = self.setup
        return result(
            "batch", env=self.env, reduction=None, prompts=prompts_of([s.prompt] * len(self.sides)), rows=self.rows(),
            intervals={},
            pipeline={"model": s.model, "steps": s.steps, "guidance": s.guidance, "width": s.width, "height": s.height,
                      "seeds": list(self.seeds)},
        )  # fmt: skip


def draw(
    model: Model, setup: Setup, seeds: Sequence[int], sides: Sequence[Side], tell: Callable[[Any], None],
    stop: threading.Event,
) -> Grid:  # fmt: skip
    """Every setting with every seed: one untimed call of each setting, then a round of timed calls a seed, every other
    round backwards. Tells ticks, and the grid after each round.

    Raises:
        Stopped, ConfigError, UnsupportedError, StateError: as `runs.compare`.
    """
    every = (Side(), *sides)
    runner = Runner(model, setup, len(every) * (1 + len(seeds)), tell, stop)
    for side in every:
        runner.check(side)
    found = Grid(setup, every, tuple(seeds), env=environment(runner.device))
    runner.setup = replace(setup, seed=seeds[0])
    found.counted = [runner.draw(side, 2) for side in every]
    found.pictures, found.seconds = [[] for _ in every], [[] for _ in every]
    for i, seed in enumerate(seeds):
        runner.setup = replace(setup, seed=seed)
        for place in range(len(every)) if i % 2 == 0 else reversed(range(len(every))):
            picture, took = runner.time(every[place], 2)
            found.pictures[place].append(picture)
            found.seconds[place].append(took)
        tell(found)
    return found


def settings_of(text: Any, seeds: Any) -> tuple[tuple[int, ...], list[Side]]:
    """Seeds, and the sides of the lines, without repeats.

    Raises:
        ConfigError: none, too many, or a line that is no setting.
    """
    lines = [line.strip() for line in str(text or "").splitlines() if line.strip()]
    sides = [side for side in dict.fromkeys(side_of(line) for line in lines[:200]) if side.config is not None]
    try:
        text = str(seeds)
        if len(text) > 200 or any(len(number) > 10 for number in text.replace("-", ",").split(",")):
            raise ConfigError("seeds are written 0 or 0,2 or 0-3, up to 10 digits each")
        first, _, last = text.partition("-")
        if last.isdigit() and first.isdigit() and int(last) - int(first) >= MOST_SEEDS:
            raise ConfigError(f"up to {MOST_SEEDS} seeds")
        numbers = seeds_of(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not sides:
        raise ConfigError("no settings: write one a line, such as tome:ratio=0.5")
    if len(numbers) > MOST_SEEDS or len(sides) > MOST_SETTINGS or len(numbers) * len(sides) > MOST_PICTURES:
        raise ConfigError(
            f"{len(numbers)} seeds by {len(sides)} settings: up to {MOST_SEEDS} seeds, {MOST_SETTINGS} settings and "
            f"{MOST_PICTURES} pictures"
        )
    return numbers, sides


class Batch:
    """The components of the page, made inside of the block that is open, and the endpoint /batch."""

    def __init__(self, page: Page) -> None:
        self.page = page
        width, height = usual_of(page.models.names[0])["size"]
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_lines=6, elem_id="batch-prompt")
                self.settings = gr.Textbox(
                    SETTINGS, lines=5, max_lines=MOST_SETTINGS, label="Settings, one a line", elem_id="batch-settings",
                    info="method:option=value,... as in `tokred evaluate --variant`; unpatched is drawn in any case",
                )  # fmt: skip
                with gr.Row():
                    self.seeds = gr.Textbox(
                        "0-3", label="Seeds", info="0 or 0,2 or 0-3", elem_id="batch-seeds", min_width=90
                    )
                    self.steps = gr.Number(
                        20, label="Steps", info="of each", precision=0, min_width=90, elem_id="batch-steps"
                    )
                with gr.Row():
                    self.width = gr.Number(width, label="Width", precision=0, min_width=90, elem_id="batch-width")
                    self.height = gr.Number(height, label="Height", precision=0, min_width=90, elem_id="batch-height")
                    self.guidance = gr.Number(3, label="Guidance", min_width=90, elem_id="batch-guidance")
            with gr.Column(scale=7, min_width=320):
                with gr.Row():
                    self.go = gr.Button("Run the batch", variant="primary", elem_id="batch-run")
                    self.stop = gr.Button("Stop", elem_id="batch-stop", min_width=80)
                self.status = gr.HTML(words.note("Each seed, unpatched and with each setting, from the same noise."),
                                      elem_id="batch-status")  # fmt: skip
                self.grid = gr.Image(
                    format="png",
                    label="Grid",
                    show_label=False,
                    interactive=False,
                    elem_id="batch-grid",
                    visible=False,
                    buttons=["download", "fullscreen"],
                )
                self.table = gr.HTML(elem_id="batch-table")
                self.data = gr.JSON(label="tokred.result/1", visible=False)
        model = page.model
        inputs = [
            self.prompt, self.settings, self.seeds, self.steps, self.width, self.height, self.guidance, model,
        ]  # fmt: skip
        began = self.go.click(
            answered(self._run), inputs, [self.status, self.grid, self.table, self.data], api_name="batch",
            concurrency_limit=1, concurrency_id=QUEUE, show_progress="minimal", show_progress_on=self.status,
        )  # fmt: skip
        self.stop.click(
            page.stop_all, None, self.status, queue=False, cancels=[began], show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip

    def _run(
        self, request: gr.Request, prompt: str, settings: str, seeds: str, steps: float, width: float, height: float,
        guidance: float, model: str,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw a prompt with several seeds and several settings: the grid, the table and a tokred.result/1."""
        page = self.page
        name = model or page.models.names[0]
        setup = setup_of(name, prompt, 0, steps, width, height, guidance, 0, page.models.names, 4096)
        numbers, sides = settings_of(settings, seeds)
        stop = page.stops.new(request.session_hash or "")
        grid: Grid | None = None
        empty = (gr.skip(), gr.skip(), gr.skip())
        try:
            yield words.progress(None, f"loading {name}", {}), *empty
            loaded = page.loaded(setup)
            job = Job(lambda tell, stop: draw(loaded, setup, numbers, sides, tell, stop), page.models.lock, stop)
            for told in job:
                for message in told:
                    if isinstance(message, Tick):
                        previews = {0: message.picture} if message.picture is not None else {}
                        yield words.progress(message, message.what, previews), *empty
                    else:
                        grid = message
                        yield gr.skip(), gr.update(value=grid.picture(), visible=True), grid.table(), gr.skip()
            grid = job.result()
            note = f"Done: {len(numbers)} seeds, {len(sides)} settings. Medians over the seeds; in brackets quartiles."
            yield words.note(note), gr.update(value=grid.picture(), visible=True), grid.table(), grid.to_dict()
        except Stopped:
            note = words.note(
                f"Stopped after {grid.done} of {len(numbers)} seeds." if grid else "Stopped.", "tk-stopped"
            )
            yield note, *empty
        finally:
            page.stops.forget(request.session_hash or "", stop)
