"""Measure the pictures that scripts/generate.py drew: distances to the unpatched ones, scores, FID and KID, the report.

    python scripts/generate.py --out runs/a --variant tome:ratio=0.5 --variant todo --variant steps:16
    python scripts/evaluate.py runs/a
    python scripts/evaluate.py runs/a --reference coco.npz --inception-weights pt_inception-2015-12-05-6726825d.pth
    python scripts/evaluate.py --compare runs/a/result.json runs/b/result.json

Nothing is drawn and nothing is timed: `tokred evaluate` does all of it in one go, and leaves the same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from diffusion_tokred.errors import ConfigError, UnsupportedError
from diffusion_tokred.evaluation.evaluate import made_before, state, write_report
from diffusion_tokred.evaluation.judges import Judges, check_reference
from diffusion_tokred.evaluation.layout import markdown_table
from diffusion_tokred.evaluation.measuring import measure
from diffusion_tokred.evaluation.models import pick_device
from diffusion_tokred.evaluation.report import tables
from diffusion_tokred.evaluation.versus import compare_files

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
def main(
    out: Annotated[Path | None, typer.Argument(help="The run's folder.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="For FID and KID: a folder of pictures, an .npz, or drawn (embedded scenes).")
    ] = None,
    clip_model: Annotated[str | None, typer.Option(help="Folder or hub id of a CLIPModel; toy: the embedded.")] = None,
    inception_weights: Annotated[str | None, typer.Option(help="FID's Inception-v3, a file.")] = None,
    alexnet_weights: Annotated[str | None, typer.Option(help="For LPIPS: torchvision's AlexNet, a file.")] = None,
    vgg_weights: Annotated[str | None, typer.Option(help="For LPIPS: torchvision's VGG16, a file.")] = None,
    pickscore_model: Annotated[str | None, typer.Option(help="Folder or hub id of PickScore as a CLIPModel.")] = None,
    hps_model: Annotated[str | None, typer.Option(help="Folder or hub id of HPSv2 as a CLIPModel.")] = None,
    resize: Annotated[str, typer.Option(help="Of Inception's pictures: tf1 (original FID) or antialias.")] = "tf1",
    resamples: Annotated[
        int | None, typer.Option(min=2, help="Bootstrap resamples of FID. (default: 100 for small features, else none)")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures judged together.")] = 16,
    device: Annotated[str, typer.Option(help="What the judges run on: cpu, cuda, ...")] = "cpu",
    compare: Annotated[tuple[Path, Path] | None, typer.Option(metavar="A B", help="Compare two result.json.")] = None,
    any_prompts: Annotated[bool, typer.Option("--any-prompts", help="Compare results of different prompts.")] = False,
) -> None:
    if compare is not None:
        print(compare_files(*compare, any_prompts=any_prompts))
        return
    if out is None:
        raise ConfigError("name the run's folder, or two results with --compare")
    given = dict(clip=clip_model, inception=inception_weights, alexnet=alexnet_weights, vgg16=vgg_weights)
    judges = Judges.find(given | dict(pickscore=pickscore_model, hps=hps_model), resize)
    judges.load()
    check_reference(reference)
    place = pick_device(device)
    timing = out / "timing.json"  # if `tokred evaluate` left one
    claim, early, said = made_before(out)
    with Progress(transient=True) as bar:
        task = bar.add_task("", total=1.0)
        data = measure(
            out, judges=judges, device=place, reference=reference, resamples=resamples, batch=batch, claim=claim,
            timing=json.loads(timing.read_text(encoding="utf-8")) if timing.exists() else None, **said,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )  # fmt: skip
        if claim is not None:
            state(out, data, early)
        write_report(out, data)
    print("\n".join(markdown_table(tables(data)[0])))
    print(f"\n{out / 'report.html'}")


if __name__ == "__main__":
    try:
        app()
    except (ConfigError, UnsupportedError, OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"evaluate: {error}") from None
