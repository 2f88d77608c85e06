"""Train the embedded models from scratch on scenes that are drawn on the fly.

    python scripts/train_zoo.py vae     --out runs/vae     --minutes 10      # first: both pipelines share these two
    python scripts/train_zoo.py text    --out runs/text    --minutes 4
    python scripts/train_zoo.py toy-clip --out runs/toy-clip --minutes 15    # the judge
    python scripts/train_zoo.py toy-sd  --out runs/toy-sd  --minutes 120 --vae runs/vae/export --text runs/text/export
    python scripts/train_zoo.py toy-dit --out runs/toy-dit --minutes 120 --vae runs/vae/export --text runs/text/export

The same command again continues after a kill, to the step. --init-from FOLDER starts with the weights of an exported
pipeline and a fresh optimiser, --stage N with a later stage. --export FOLDER writes a run's averaged weights as an
ordinary fp16 diffusers folder; a finished run does so by itself. Nothing of the data is stored: batch k follows from
(seed, k) alone. Several GPUs: accelerate launch scripts/train_zoo.py ...; each process draws its own batches and
gradients are averaged. The recipes are in scripts/recipes/, one file a model.
"""

import atexit
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import typer
from accelerate import PartialState
from accelerate.utils import reduce
from PIL import Image
from recipes.base import Recipe
from recipes.text import Text
from recipes.toy_clip import ToyCLIP
from recipes.toy_dit import ToyDiT
from recipes.toy_sd import ToySD
from recipes.vae import VAE
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from diffusion_tokred.zoo import scenes

FOLDER = partial(typer.Option, exists=True, file_okay=False)
RECIPES = {"vae": VAE, "text": Text, "toy-clip": ToyCLIP, "toy-sd": ToySD, "toy-dit": ToyDiT}


@dataclass
class Run:
    """One training run. Its state is in `out`; as data and noise follow from (seed, step), no generator is saved."""

    recipe: Recipe
    out: Path
    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    threads: int = 1
    bf16: bool = False
    save_every: float = 2
    sheet_every: float = 10
    first_stage: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.processes = PartialState(cpu=self.device == "cpu")
        atexit.register(self.processes.destroy_process_group)  # gloo's threads abort in a half-gone interpreter
        self.clock = time.process_time if self.device == "cpu" else time.perf_counter
        modules = self.recipe.modules.train().to(self.device)
        self.parameters = dict(modules.named_parameters())
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=self.recipe.lr, betas=(0.9, 0.99), fused=True)
        self.step, self.busy, self.stop = 0, 0.0, False
        self.stage, self.entered = self.first_stage, 0  # the step at which the stage began
        self.restart_average()

    def restart_average(self) -> None:
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}

    def save(self) -> None:
        if not self.processes.is_main_process:
            return
        state = dict(step=self.step, busy=self.busy, seed=self.seed, ema=self.ema)
        state |= dict(stage=self.stage, entered=self.entered)
        state |= dict(modules=self.parameters, optimizer=self.optimizer.state_dict())
        torch.save(state, self.out / "state.tmp")
        os.replace(self.out / "state.tmp", self.out / "state.pt")

    def resume(self) -> bool:
        if not (self.out / "state.pt").exists():
            return False
        state = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        self.step, self.busy, self.seed, self.ema = (state[key] for key in ("step", "busy", "seed", "ema"))
        self.stage, self.entered = state["stage"], state["entered"]
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state["modules"][name])
        return True

    def progress(self) -> float:
        return min(1.0, self.step / self.steps if self.steps else self.busy / (60 * self.minutes))

    def due(self) -> int:
        """Index of the stage that progress has reached."""
        stages = self.recipe.stages[self.first_stage :]
        left = self.progress() * sum(share for share, _ in stages)
        passed = 0
        for share, _ in stages[:-1]:
            left -= share
            passed += left >= 0
        return self.first_stage + passed

    def enter(self, stage: int) -> None:
        """The averages begin anew with each stage: what grows is better than its past."""
        while self.stage < stage:
            old, new = (next(iter(self.recipe.stages[i][1])) for i in (self.stage, self.stage + 1))
            with self.averaged() as recipe:  # goes on from the average, not from the last step's weights
                recipe.grow(old, new)
                grown = {name: p.detach().clone() for name, p in self.parameters.items()}
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(grown[name])
            self.stage, self.entered = self.stage + 1, self.step
        self.restart_average()

    def advance(self) -> tuple[Any, float]:
        """One optimiser step: the variant that was drawn and its loss."""
        if self.due() > self.stage:
            self.enter(self.due())
        rng = random.Random(f"{self.seed}-{self.step}")
        variants = self.recipe.stages[self.stage][1]
        what = rng.choices(list(variants), [8, 1, 1][: len(variants)])[0]
        rank = self.processes.process_index
        if rank:  # the same variant everywhere, other scenes
            rng = random.Random(f"{self.seed}-{self.step}-process-{rank}")
        # Drawing and encoding a scene costs as much as a step with it: a pool serves 32 steps, each scene about four.
        pool = [f"{self.seed}-{self.step // 32}-{rank}-{i}" for i in range(8 * variants[what])]
        batch = [scenes.sample_scene(random.Random(name)) for name in rng.sample(pool, variants[what])]
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        since = self.step - self.entered
        rate = min(1.0, (since + 1) / 100, max(0.03, (1 - self.progress()) / 0.35))  # warm-up, plateau, decay
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * rate
        with torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext():
            loss = self.recipe.loss(batch, what, rng, noise)
        loss.backward()
        if self.processes.num_processes > 1:
            for p in self.parameters.values():
                if p.grad is not None:
                    p.grad = reduce(p.grad, "mean")
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        # The average looks back over a tenth of the stage so far, at most 2,000 steps.
        weight = max(0.0005, 10 / (since + 10))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], weight)
        return what, loss.item()

    @contextmanager
    def averaged(self) -> Iterator[Recipe]:
        """The recipe with its averaged weights in place."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.ema[name])
            yield self.recipe
            for name, p in self.parameters.items():
                p.copy_(kept[name])

    def agree(self) -> None:
        """All processes go by the same clock, and stop together."""
        if self.processes.num_processes > 1:
            busy, stop = reduce(torch.tensor([self.busy, float(self.stop)], device=self.device), "mean").tolist()
            self.busy, self.stop = busy, stop > 0

    def sheet(self, what: Any) -> None:
        if not self.processes.is_main_process:
            return
        with self.averaged() as recipe:
            pictures = recipe.sheet(what)
        if pictures is None:
            return
        rows = pictures.unflatten(0, (-1, 8)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
        name = f"sheet-{self.step:07d}-{what}.png".replace(" ", "-")
        Image.fromarray((rows * 255).round().byte().cpu().numpy()).save(self.out / name)

    def export(self, folder: Path) -> None:
        with self.averaged() as recipe:
            recipe.save(folder, torch.float16)

    def train(self) -> None:
        def finish(*_: Any) -> None:
            self.stop = True

        handlers = {number: signal.signal(number, finish) for number in (signal.SIGTERM, signal.SIGINT)}
        saved = drawn = self.busy
        losses: dict[str, float] = {}
        text = TextColumn("step {task.fields[step]} {task.percentage:.1f}% {task.fields[note]}")
        columns = (BarColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
        main = self.processes.is_main_process
        with Progress(*columns, disable=not main) as bar:
            task = bar.add_task("", total=1.0, step=self.step, note="")
            while self.progress() < 1 and not self.stop:
                start = self.clock()
                what, loss = self.advance()
                # On a CPU this process's time, not the wall's: a run that shares its cores trains as much.
                self.busy += (self.clock() - start) / (self.threads if self.device == "cpu" else 1)
                self.agree()
                losses[str(what)] = losses.get(str(what), loss) * 0.98 + loss * 0.02
                note = ", ".join(f"{name}: {value:.4f}" for name, value in sorted(losses.items()))
                bar.update(task, completed=self.progress(), step=self.step, note=note)
                if main and self.step % 100 == 0:
                    record = json.dumps(dict(step=self.step, minutes=round(self.busy / 60, 2), loss=losses))
                    with open(self.out / "log.jsonl", "a") as log:
                        log.write(record + "\n")
                    if not bar.console.is_terminal:
                        print(f"{self.progress():.1%} {record}", flush=True)
                if self.busy - saved > 60 * self.save_every:
                    self.save()
                    saved = self.busy
                if self.busy - drawn > 60 * self.sheet_every:
                    self.sheet(next(iter(self.recipe.stages[self.stage][1])))
                    drawn = self.busy
        self.save()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if main and not self.stop:
            self.sheet(next(iter(self.recipe.stages[self.stage][1])))
            self.export(self.out / "export")


def start(recipe: Callable[[], Recipe], out: Path, *, init_from: Path | None = None, **options: Any) -> Run:
    """A run at its beginning, or where it was left."""
    torch.set_num_threads(options.get("threads", 1))
    torch.manual_seed(options.get("seed", 0))
    run = Run(recipe(), out, **options)
    if not run.resume() and init_from:
        run.recipe.load(init_from)
        run.restart_average()
    return run


def main(
    model: Annotated[
        Literal["vae", "text", "toy-clip", "toy-sd", "toy-dit"], typer.Argument(help="The pipelines need vae and text.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run: state, log, sample sheets, export.")],
    vae: Annotated[Path | None, FOLDER(help="Export of a VAE run; else --init-from has it.")] = None,
    text: Annotated[Path | None, FOLDER(help="Export of a text run; else --init-from has it.")] = None,
    init_from: Annotated[Path | None, FOLDER(help="Exported folder to start from, new optimiser.")] = None,
    stage: Annotated[int, typer.Option(min=0, help="Begin with this stage of the recipe (0 is the first).")] = 0,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Length of the run: minutes of CPU time per thread.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the run in optimiser steps instead.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the scenes and the noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16 (slow on a CPU without AVX-512).")] = False,
    save_every: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 2,
    sheet_every: Annotated[float, typer.Option(help="Minutes between sample sheets.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda (each process takes its own).")] = "cpu",
    export: Annotated[Path | None, typer.Option(help="Only write the run's averaged weights here, and end.")] = None,
) -> None:
    if export is None and (minutes is None) == (steps is None):
        raise typer.BadParameter("give the length of the run: --minutes or --steps, one of them")
    if export is not None and not (out / "state.pt").exists():
        raise typer.BadParameter(f"--export: there is no run in {out}, it has no state.pt")
    vae, text = vae or init_from, text or init_from
    pipeline = model in ("toy-sd", "toy-dit")
    if pipeline and (vae is None or text is None):
        raise typer.BadParameter("pipelines need --vae and --text, exports of finished runs (or --init-from)")
    if pipeline and not (vae / "vae").is_dir():  # type: ignore[operator]
        raise typer.BadParameter(f"--vae: {vae} is no export of a VAE run or a pipeline: it has no folder vae")
    if pipeline and not any(text.glob("text_encoder*")):  # type: ignore[union-attr]
        raise typer.BadParameter(f"--text: {text} is no export of a text run or a pipeline: it has no text_encoder")
    if stage >= len(RECIPES[model].stages):
        raise typer.BadParameter(f"--stage {stage}: {model} has {len(RECIPES[model].stages)} stages, 0 is the first")
    options = dict(minutes=minutes, steps=steps, seed=seed, threads=threads, bf16=bf16, device=device)
    options |= dict(save_every=save_every, sheet_every=sheet_every, first_stage=stage)
    recipe = (lambda: RECIPES[model](vae, text)) if pipeline else RECIPES[model]
    run = start(recipe, out, init_from=init_from, **options)
    run.export(export) if export else run.train()


main.__doc__ = __doc__

if __name__ == "__main__":
    typer.run(main)
