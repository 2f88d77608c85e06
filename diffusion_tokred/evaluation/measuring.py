"""From the pictures of a run to its result: figures of each picture, then what they say together.

items.jsonl    a line a picture: variant, index, repeat, prompt, seed, file, metrics (to the unpatched one), scores
result.json    `tokred.result/1` of kind "evaluate"; what its entries mean is in docs/how-to-measure.md
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from . import distribution, notes, statistics
from .cost import cost_of
from .features import Statistics
from .judges import Judges, references
from .judging import Figures, Panel, exactly, foreign
from .layout import label
from .paired import Paired, Scores, scene_of, why_null
from .results import plain, result, to_json, write_text
from .store import Run, load_run
from .variants import UNPATCHED

KIND = "evaluate"

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Claim:
    """A claim of non-inferiority, made before the figures are seen: no variant is worse than `against` by a margin.

    Attributes:
        against: a variant of the run, such as "steps-22".
        margins: how much worse is still as good, by metric, in its unit.
    """

    against: str
    margins: Mapping[str, float] = field(default_factory=lambda: {"psnr": 0.0, "ssim": 0.0})


def measure(
    out: str | Path,
    *,
    judges: Judges | None = None,
    device: torch.device | str = "cpu",
    reference: str | Path | None = None,
    claim: Claim | None = None,
    timing: Mapping[str, Any] | None = None,
    protocol: str | None = None,
    departures: Sequence[str] = (),
    resamples: int | None = None,
    batch: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a run's pictures; writes `items.jsonl` and `result.json` into its folder.

    Args:
        out: the folder that `generate` filled. A run with pictures missing is measured on the prompts that all variants
            have, and its status is "partial".
        judges: what to judge with; by default what is on this machine.
        device: what they run on, and figures of pixels too.
        reference: of FID and KID: a folder of pictures, an `.npz`, "drawn" (embedded scenes), or None.
        claim: of non-inferiority; it was to be made before the pictures were drawn.
        timing: what `measure_cost` returned.
        protocol: its name, for the result; `departures`: in words, what was chosen otherwise.
        resamples: of FID's interval, see `distribution.distances`.
        batch: pictures judged together.
        progress: called with what is being done and the share that is done.

    Returns:
        The result, as in `result.json`.

    Raises:
        ConfigError: no run, damaged pictures, a reference of another extractor, a claim about what is not in the run.
    """
    run, judges, tell = load_run(out), judges or Judges.find(), progress or (lambda what, share: None)
    names = [name for name in run.items if run.items[name]]
    if UNPATCHED not in names:
        raise ConfigError(f"{run.out} has no pictures of the unpatched pipeline: draw them first")
    panel = Panel(judges, run.prompts.texts, device)
    elsewhere = foreign(run, panel.better)
    check_claim(claim, names, judges, run.prompts.texts, elsewhere)
    better = panel.better | dict.fromkeys(elsewhere, "higher")
    with exactly(panel.device, batch):
        there, said = references(reference, panel.extractors, run.items[UNPATCHED][0].size[0], batch)

    common = set.intersection(*({(i.index, i.repeat) for i in run.items[name]} for name in names))
    failed = {(line["index"], line["repeat"]) for line in run.failures}
    if lost := len(common & failed):
        said.append(f"{lost} prompts (and repeats) with a failed picture are in no figure, of no variant")
    common -= failed
    if not common:
        raise ConfigError(f"{run.out}: no prompt was drawn well by all of {', '.join(names)}: draw more")
    with exactly(panel.device, batch):
        figures = _figures(run, panel, names, common, batch, tell)
    for found in figures.values():
        found.scores |= {score: [values.get(i.file) for i in found.items] for score, values in elsewhere.items()}

    write_text(run.out / "items.jsonl", "".join(_lines(figures)))
    size = run.items[UNPATCHED][0].size
    methods = [v["name"] for v in run.asked["variants"] if v["reduction"] and v["name"] in figures]
    variants = []
    for place, (name, found) in enumerate(figures.items()):
        tell(f"statistics of {name}", 0.9 + 0.1 * place / len(figures))
        asked = next(variant for variant in run.asked["variants"] if variant["name"] == name)
        entry = _entry(run, asked, found, figures[UNPATCHED], better, size)
        entry["distribution"] = _distribution(found, figures[UNPATCHED], panel.extractors, there, resamples, name)
        entry["cost"] = cost_of(timing, name) if timing is not None else None
        entry["verdict"] = _verdicts(claim, name, figures, methods, better)
        variants.append(entry)
    settings = run.asked["settings"]
    measured = {"measured": len({index for index, _ in common}), "repeats": len({repeat for _, repeat in common})}
    parts_of = {
        "env": settings["versions"] | {"device": settings["device"], "threads": settings["threads"]},
        "pipeline": {
            "model": run.asked["model"],
            **settings["pipeline"],
            "steps": settings["call"].get("num_inference_steps"),
            "guidance": settings["call"].get("guidance_scale"),
            "width": size[0],
            "height": size[1],
            "call": settings["call"],
        },
        "reduction": None,
        "prompts": run.prompts.to_dict() | measured,
    }
    data = result(KIND, **parts_of, rows=[], intervals=(timing or {}).get("intervals", {}), variants=variants)
    missing = {name: len(keys) for name, keys in run.missing.items() if keys}
    said += notes.few(len(set(figures[UNPATCHED].prompts))) + notes.departing(protocol, departures)
    said += [f"{label(metric)}: {text}" for metric, text in panel.paired.notes((size[1], size[0])).items()]
    said += notes.absent(judges)
    said += notes.timed(timing, settings["threads"])
    data |= plain(
        {
            "status": "partial" if missing else "complete",
            "protocol": protocol,
            "departures": list(departures),
            "judges": judges.to_dict(),
            "claim": None if claim is None else {"against": claim.against, "margins": dict(claim.margins)},
            "timing": None if timing is None else {"env": timing["env"], "created": timing["created"]},
            "failures": run.failures,
            "missing": missing,
            "notes": said,
        }
    )
    write_text(run.out / "result.json", to_json(data))
    tell("done", 1.0)
    return data


def check_claim(
    claim: Claim | None, names: Sequence[str], judges: Judges, texts: Sequence[str], more: Iterable[str] = ()
) -> None:
    """Refuse a claim that cannot be tested (ConfigError): `names` of the run's variants, its prompts' texts, and `more`
    scores, made elsewhere."""
    if claim is None:
        return
    if claim.against not in names:
        raise ConfigError(f"the claim is held against {claim.against!r}, the run has {', '.join(names)}")
    paired = Paired(judges.lpips, judges.clip).better
    scores = dict(Scores(judges.clip, all(map(scene_of, texts)), judges.preferences).better) | dict.fromkeys(more, "")
    if unknown := sorted(set(claim.margins) - set(paired) - set(scores)):
        known = ", ".join([*paired, *scores])
        raise ConfigError(f"a margin for {', '.join(unknown)}, which is not measured here; there is {known}")
    for metric, margin in claim.margins.items():
        if not (math.isfinite(margin) and margin >= 0):
            raise ConfigError(f"a margin says how much worse is still as good: a number >= 0, got {metric} {margin}")
        if claim.against == UNPATCHED and metric in paired:
            raise ConfigError(f"{metric} is a distance to the unpatched pictures: hold it against another, as steps-N")


def read_items(out: str | Path) -> list[dict[str, Any]]:
    """The lines of `items.jsonl`."""
    text = (Path(out) / "items.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]  # prompts may hold other ends of lines


def _figures(
    run: Run, panel: Panel, names: Sequence[str], keys: set[tuple[int, int]], batch: int, tell: Progress
) -> dict[str, Figures]:
    """Of all variants, the unpatched one first."""
    figures: dict[str, Figures] = {}
    for place, name in enumerate(names):

        def judged(share: float, what: str = f"judging {name}", place: int = place) -> None:
            tell(what, 0.9 * (place + share) / len(names))

        judged(0.0)
        figures[name] = panel.look(run, name, keys, figures.get(UNPATCHED), batch, judged)
    return figures


def _lines(figures: Mapping[str, Figures]) -> Iterator[str]:
    for name, found in figures.items():
        for place, item in enumerate(found.items):
            metrics, scores = (
                {key: values[place] for key, values in part.items()} for part in (found.metrics, found.scores)
            )
            reasons = why_null({k: math.nan if v is None else v for k, v in (metrics | scores).items()})
            line = {
                "variant": name,
                "index": item.index,
                "repeat": item.repeat,
                "prompt": item.prompt,
                "seed": item.seed,
                "file": item.file,
                "metrics": {k: v if v is None or math.isfinite(v) else None for k, v in metrics.items()},
                "scores": scores,
            }
            line |= {"failure": item.failure} if item.failure else {}
            line |= {"why_null": reasons} if reasons else {}
            yield json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _entry(
    run: Run,
    asked: Mapping[str, Any],
    found: Figures,
    unpatched: Figures,
    better: Mapping[str, str],
    size: tuple[int, int],
) -> dict[str, Any]:
    """What a variant's figures say: `paired`, `scores` and `change`."""
    prompts, per_picture = found.prompts, 3 * size[0] * size[1]
    entry: dict[str, Any] = {"name": asked["name"], "anchor": asked["anchor"], "reduction": asked["reduction"]}
    if entry["reduction"] is not None:
        entry["reduction"] = entry["reduction"] | {"seed": run.asked["settings"]["base_seed"]}
    call = run.asked["settings"]["call"] | asked["call"]
    entry |= {"call": asked["call"], "steps": call.get("num_inference_steps"), "paired": {}, "change": {}}
    for metric, values in found.metrics.items():
        if metric == "psnr":
            entry["paired"][metric] = statistics.paired_psnr(values, per_picture, prompts)
        else:
            entry["paired"][metric] = statistics.paired(values, better[metric], prompts)
    entry["scores"] = {name: statistics.score(values, better[name], prompts) for name, values in found.scores.items()}
    if found is not unpatched:
        entry["change"] = {
            name: statistics.change(values, unpatched.scores[name], better[name], prompts)
            for name, values in found.scores.items()
        }
    return entry


def _distribution(
    found: Figures,
    unpatched: Figures,
    extractors: Sequence[Any],
    there: Sequence[Statistics | None],
    resamples: int | None,
    name: str,
) -> dict[str, Any]:
    """FID and KID to the reference, what the variant adds to them, and both to the unpatched pictures."""
    entry: dict[str, Any] = {}
    if len(found.items) < 2:
        return entry
    for place, (extractor, reference) in enumerate(zip(extractors, there, strict=True)):

        def of(figures: Figures, source: str, place: int = place, by: Any = extractor) -> Statistics:
            made_by = (by.name, by.weights_sha256, by.resize)
            return Statistics.from_features(figures.features[place], *made_by, source=source)

        mine, base = of(found, name), of(unpatched, UNPATCHED)
        options: dict[str, Any] = dict(prompts=found.prompts, resamples=resamples)
        if reference is not None:
            entry |= {key: d.to_dict() for key, d in distribution.distances(mine, reference, **options).items()}
        if found is unpatched:
            continue
        if reference is not None:
            entry |= {key: d.to_dict() for key, d in distribution.changes(mine, base, reference, **options).items()}
        for key, d in distribution.distances(mine, base, paired=True, **options).items():
            entry[f"{key}_to_unpatched"] = d.to_dict()
    return entry


def _verdicts(
    claim: Claim | None,
    name: str,
    figures: Mapping[str, Figures],
    methods: Sequence[str],
    better: Mapping[str, str],
) -> dict[str, Any] | None:
    """For each margin of the claim: a variant with a method against what it names. All that the run gives share the
    chance of a false one."""
    held = [method for method in methods if claim is not None and method != claim.against]
    if claim is None or name not in held:
        return None
    found, control, verdicts = figures[name], figures[claim.against], {}
    size = found.items[0].size
    for metric, margin in claim.margins.items():
        pair = []
        for some in (found, control):
            values = (some.metrics | some.scores)[metric]
            pair.append(statistics.capped_psnr(values, 3 * size[0] * size[1]) if metric == "psnr" else values)
        verdicts[metric] = statistics.verdict(
            *pair, margin=margin, better=better[metric], against=claim.against, prompts=found.prompts,
            family=len(claim.margins) * len(held),
        )  # fmt: skip
    return verdicts
