"""`tokred tune`: the policy for a pipeline and a target, found by measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .common import (
    INTERRUPTED,
    Device,
    Dtype,
    Guidance,
    Json,
    Model,
    Size,
    Steps,
    Threads,
    app,
    load_pipeline,
    make_console,
    print_table,
    quiet_libraries,
    say,
    working,
)  # fmt: skip


@app.command(
    epilog="""Examples:

    tokred tune --model toy-dit --target-speedup 2

    tokred tune --model toy-sd --min-psnr 40 --methods deepcache,taylorseer --budget 10min

    tokred tune --model ./sdxl --prompts mine.txt --limit 6 --held-out 20 --target-speedup 1.5 --out runs/sdxl

    The same command again goes on where it was stopped.""",
)
def tune(
    model: Model = "toy-dit",
    prompts: Annotated[
        str, typer.Option(help="scenes, a .txt/.csv/.tsv/.jsonl file, owner/name[:split[:column]].")
    ] = "scenes",
    limit: Annotated[int, typer.Option(min=1, help="The first so many prompts are searched with.")] = 6,
    held_out: Annotated[int, typer.Option(min=1, help="The next so many decide.")] = 24,
    target_speedup: Annotated[
        float | None, typer.Option(help="How many times as fast as unpatched. (default: 2)")
    ] = None,
    max_lpips: Annotated[float | None, typer.Option(help="Instead: as fast as it can be with this mean LPIPS.")] = None,
    min_psnr: Annotated[float | None, typer.Option(help="Instead: as fast as it can be with this mean PSNR.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these, as taylorseer,toca. (default: all)")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="N|TIME", help="Evaluations, or a time as 10min. (default: 120 evaluations)")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search, and of the first prompt's noise.")] = 0,
    steps: Steps = None,
    size: Size = None,
    guidance: Guidance = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of what is reported.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder; a search that is there goes on.")] = Path("tokred-tune"),
    resume: Annotated[bool, typer.Option(help="Go on with what is in the folder, or begin anew.")] = True,
    keep: Annotated[bool, typer.Option(help="Keep the policy for `method='auto'`, if it reaches its target.")] = True,
    json: Json = None,
) -> None:
    """Find the policy with which a pipeline is so many times as fast and its pictures stay closest to its own.

    Ctrl-C keeps the best so far; the same command goes on.
    """
    quiet_libraries()
    console = make_console(stderr=json == "-")
    with working("starting"):
        from ..evaluation import options, results
        from ..evaluation import prompts as prompt_sets
        from ..evaluation.judges import Judges
        from ..evaluation.models import steps_of, unread_of
        from ..tuning import tune as run
        from ..tuning.goal import budget_of, goal_of
        from ..tuning.report import brief, head
        from ..tuning.tuner import EVALUATIONS, ROUNDS

        goal_of(target_speedup, max_lpips, min_psnr, Judges.find())  # what is wrong is said before anything is loaded
        budget_of(budget, EVALUATIONS)
        pixels = None if size is None else options.size(size)
        texts = prompt_sets.load(prompts, limit + held_out, unique=True).texts
        if len(texts) < limit + held_out:
            raise ConfigError(
                f"{prompts} has {len(texts)} different prompts, --limit and --held-out ask for {limit + held_out}"
            )
    pipe, own = load_pipeline(model, dtype, device, threads)
    if unread := unread_of(pipe, texts):
        say(unread)
    width, height = pixels or own.get("size") or (None, None)
    call: dict[str, Any] = dict(own.get("call", {})) | dict(width=width, height=height)
    call |= dict(guidance_scale=own.get("guidance") if guidance is None else guidance)
    call |= dict(num_inference_steps=steps or own.get("steps") or steps_of(pipe))
    found = run(
        pipe, texts[:limit], target_speedup=target_speedup, max_lpips=max_lpips, min_psnr=min_psnr,
        methods=None if methods is None else [name.strip() for name in methods.split(",")],
        budget=budget, holdout=texts[limit:], seed=seed, out=out, resume=resume, keep=keep, model=model,
        call={name: value for name, value in call.items() if value is not None}, rounds=(ROUNDS[0], rounds),
    )  # fmt: skip
    data = found.to_dict()
    if json not in (None, "-"):
        results.write_text(json, results.to_json(data))
    if json == "-":
        print(results.to_json(data), end="")
    for line in (*head(data), *found.notes):
        console.print(line, markup=False, soft_wrap=True)
    table = brief(data)
    print_table(console, table.head, table.rows)
    console.print(f"{out / 'policy.json'}\n{out / 'report.html'}", soft_wrap=True)
    if results.busy(data["env"]):
        say(f"the machine was busy (load {data['env']['load']:.1f} on {data['env']['cpus']} CPUs): mistrust the times")
    if found.status != "complete":
        say("interrupted: this is the best so far; the same command goes on")
        raise typer.Exit(INTERRUPTED)
