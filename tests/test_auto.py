"""`method="auto"`: a tuned policy, a default, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import LCMScheduler

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError, Policy, UnsupportedError
from diffusion_tokred.auto import file_of, remember
from diffusion_tokred.home import home
from diffusion_tokred.testing import tiny


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKRED_HOME", str(tmp_path / "home"))


def test_where_tuned_policies_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home() == tmp_path / "home"
    monkeypatch.delenv("TOKRED_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert home() == tmp_path / "caches" / "diffusion_tokred"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path("~/.cache/diffusion_tokred").expanduser()
    first, other = tiny.sd3().transformer, tiny.sd3(seed=1).transformer
    assert file_of(first) == file_of(other)  # other weights of the same shape
    assert file_of(first) != file_of(tiny.sd3(dual=(0, 1)).transformer)


def test_a_tuned_policy_is_used() -> None:
    config = tokred.TaylorSeerConfig(interval=100, warmup=1, damping=0.7)
    policy = Policy(points=((1.0, 0.0, "full"), (0.8, 1.0, "forecast")), method=config.to_dict())
    remember(policy, tiny.sd3().transformer)
    pipe = tokred.patch(tiny.sd3(), method="auto")
    tiny.run(pipe, steps=12)
    modes = {(step.u > 0.8, step.mode) for step in tokred.report(pipe).steps}
    assert modes == {(True, "full"), (False, "forecast")} and tokred.report(pipe).config == config.to_dict()
    assert tokred.patch(tiny.sd3(dual=(0,)), method="auto").transformer._tokred.policy != policy
    assert tokred.explain(tiny.sd3(), method="auto").default == f"tuned: {file_of(pipe.transformer)}"
    file_of(pipe.transformer).write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        tokred.patch(tiny.sd3(), method="auto")


def test_the_defaults() -> None:
    told = [tokred.explain(make(), method="auto", num_inference_steps=20) for make in (tiny.sd3, tiny.sd, tiny.flux)]
    assert [one.method for one in told] == ["taylorseer", "deepcache", "taylorseer"]
    assert all(one.default.startswith("measured: ") for one in told[:2])
    assert told[2].default.startswith("nothing tuned for this model: ")
    pipe = tiny.flux()
    with tokred.patched(pipe, method="auto"):
        tiny.run(pipe, steps=12)
        assert any(step.mode == "forecast" for step in tokred.report(pipe).steps)


def test_where_nothing_pays() -> None:
    pipe = tiny.sd()

    class Distilled(type(pipe)):  # type: ignore[misc]
        def __call__(self, prompt: str | None = None, num_inference_steps: int = 4) -> None: ...

    few = Distilled(**pipe.components, requires_safety_checker=False)
    with pytest.raises(UnsupportedError, match="nothing pays here: Distilled makes 4 steps"):
        tokred.patch(few, method="auto")
    pipe.scheduler = LCMScheduler()
    with pytest.raises(UnsupportedError, match="nothing pays here: LCMScheduler is for few steps"):
        tokred.patch(pipe, method="auto")
    assert "_tokred" not in vars(pipe.unet)


def test_auto_takes_nothing_else() -> None:
    pipe = tiny.sd()
    with pytest.raises(ConfigError, match=r"chooses everything itself: leave out policy, ratio"):
        tokred.patch(pipe, method="auto", policy=0.5, ratio=0.5)
