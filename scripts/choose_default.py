"""Make a measured setting the default of its method on its model's family: an entry of diffusion_tokred/defaults.json.

    python scripts/choose_default.py benchmarks/caching-toy-dit-2x taylorseer-interval-2-warmup-1 --why "nearest at 2x"
    python scripts/choose_default.py --list

REPORT is the folder of a finished evaluation or caching comparison that is in the repository, VARIANT the name of a row
in it. Its config, speed and distance go into the entry, which `tests/test_defaults.py` holds against the report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion_tokred import MethodConfig, Policy
from diffusion_tokred.backbones import BACKBONES
from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation.layout import read
from diffusion_tokred.evaluation.results import write_text

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "diffusion_tokred" / "defaults.json"


def entry(report: Path, name: str, why: str) -> tuple[str, str, dict[str, Any]]:
    """Family, method and entry of a measured variant.

    Raises:
        ConfigError: no finished report in the repository, no such variant in it, or one that is no plain setting of a
            method, timed, on a model of a known family.
    """
    if not report.resolve().is_relative_to(ROOT):
        raise ConfigError(f"{report} is not in the repository: a default names a report that comes with it")
    result = read(report / "result.json")
    variants = {variant["name"]: variant for variant in result["variants"]}
    if result["status"] != "complete" or name not in variants:
        raise ConfigError(f"{report} is {result['status']} and has {', '.join(variants)}: found no {name!r}")
    variant, pipeline, env = variants[name], result["pipeline"], result["env"]
    cost, reduction = variant["cost"], variant["reduction"]
    if reduction is None or reduction.get("config", {}).get("_type") is None or reduction.get("policy") or not cost:
        raise ConfigError(f"{name!r} of {report} is no timed setting of a method of ours without a policy")
    config = MethodConfig.from_dict(reduction["config"])
    family = next((name for name, known in BACKBONES.items() if pipeline["denoiser"] in known.models), None)
    if family is None or "psnr" not in variant["paired"]:
        raise ConfigError(f"{name!r} of {report} has no PSNR, or {pipeline['denoiser']} is of no known family")
    policy = Policy.constant(config.share, config.asks).to_dict() | {
        "method": reduction["config"],
        "model": f"any of the family; measured on {pipeline['model']}",
        "measured": {
            "report": report.resolve().relative_to(ROOT).as_posix(),
            "variant": name,
            "model": pipeline["model"],
            "steps": variant["steps"],
            "prompts": result["prompts"]["n"],
            "device": f"{env['device']}, {env['threads']} thread" + ("" if env["threads"] == 1 else "s"),
            "speedup": [round(cost["speedup"][key], 4) for key in ("median", "low", "high")],
            "psnr": [round(variant["paired"]["psnr"][key], 4) for key in ("mean", "low", "high")],
            "why": why,
        },
    }
    return family, type(config).name, policy


def main(
    report: Annotated[Path | None, typer.Argument(help="benchmarks/..., with a result.json.")] = None,
    variant: Annotated[str | None, typer.Argument(help="A row of it.")] = None,
    why: Annotated[str, typer.Option(help="What made it the default, in a sentence.")] = "",
    list_: Annotated[bool, typer.Option("--list", help="Show the defaults there are, and change nothing.")] = False,
) -> None:
    stored: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    if not list_:
        if report is None or variant is None or not why:
            raise ConfigError("name a REPORT and a VARIANT of it, and say --why")
        family, method, made = entry(report, variant, why)
        stored.setdefault(family, {})[method] = made
        stored = {name: dict(sorted(methods.items())) for name, methods in sorted(stored.items())}
        write_text(FILE, json.dumps(stored, indent=1) + "\n")
    for family, methods in stored.items():
        for method, one in methods.items():
            m = one["measured"]
            print(f"{family:8} {method:12} {m['speedup'][0]:.2f}x {m['psnr'][0]:.1f} dB  {m['report']}, {m['variant']}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except ConfigError as error:
        print(f"choose_default: {error}", file=sys.stderr)
        sys.exit(2)
