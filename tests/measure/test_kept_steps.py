"""What kept steps cost: the rounds, the counts and the fractions, on a tiny transformer. No time is asserted."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from diffusion_tokred import ConfigError
from diffusion_tokred.evaluation import kept_steps
from diffusion_tokred.testing import tiny
from scripts import benchmark_caching

RUN = typer.Typer()
RUN.command()(benchmark_caching.main)


@pytest.fixture
def small(monkeypatch):
    """A tiny SD3 in the place of those of real width."""
    denoiser = tiny.sd3().transformer

    @torch.no_grad()
    def call():
        seen.append(denoiser.__dict__.get("_tokred"))
        return denoiser(
            hidden_states=torch.ones(1, denoiser.config.in_channels, 16, 16),
            encoder_hidden_states=torch.ones(1, 5, tiny.TEXT), pooled_projections=torch.ones(1, tiny.POOLED),
            timestep=torch.tensor([5.0]), return_dict=False,
        )  # fmt: skip

    seen: list = []
    monkeypatch.setattr(benchmark_caching, "model", lambda *args: (denoiser, call, 5))
    return denoiser, call, seen


def test_rounds_and_counts(small):
    denoiser, call, seen = small
    found = {k.method: k for k in kept_steps.kept_steps(denoiser, call, 5, kept_steps.configs(0.75), rounds=2)}
    assert {(k.tokens, k.computed) for name, k in found.items() if name != "fora, all blocks"} == {(64, 16)}
    assert found["fora, all blocks"].computed == 0
    assert found["fora, all blocks"].flop_share < found["toca, packed"].flop_share < 1
    assert found["toca, packed"].flop_share == pytest.approx(found["ras"].flop_share, rel=0.05)
    assert all(k.ideal > 1 and k.speedup[0] <= k.speedup[1] <= k.speedup[2] for k in found.values())
    # Four calls to profile; in each round five calls a method, three of them patched.
    assert len(seen) == 4 + 2 * 5 * 5 and sum(driver is not None for driver in seen) == 2 * 5 * 3
    assert "_tokred" not in denoiser.__dict__


def test_refusals(small):
    denoiser, call, _ = small
    with pytest.raises(ConfigError, match="shape is sd3 or pixart, got 'flux'"):
        kept_steps.model("flux")
    with pytest.raises(ConfigError, match="at least one round, got 0"):
        kept_steps.kept_steps(denoiser, call, 5, kept_steps.configs(0.5), rounds=0)


def test_the_command(small, tmp_path):
    threads = torch.get_num_threads()
    result = CliRunner().invoke(RUN, ["--shape", "sd3", "--rounds", "1", "--out", str(tmp_path / "a.json")])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["schema"] == "tokred.result/1" and data["env"]["dtype"] == "float32"
    assert [row["method"] for row in data["rows"]] == list(kept_steps.configs(0.5))
