"""Other libraries' caches: put on, taken off without a trace, the same picture whatever ran before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

from diffusion_tokred import patched
from diffusion_tokred.errors import ConfigError, StateError, UnsupportedError
from diffusion_tokred.evaluation import peers
from diffusion_tokred.evaluation.store import load_run
from diffusion_tokred.evaluation.variants import Variant, parse_variant
from diffusion_tokred.testing import tiny
from tests.evaluation import runs, toys

# Family, a setting that acts, and one that is dense.
ACTING = [
    ("pixart", "diffusers-firstblock:threshold=0.1", "diffusers-firstblock:threshold=0"),
    ("flux", "diffusers-firstblock:threshold=9", "diffusers-firstblock:threshold=0"),  # its pipeline sets contexts
    ("sd3", "diffusers-taylorseer:interval=3", "diffusers-taylorseer:interval=1"),
    ("sd3", "diffusers-taylorseer:interval=3,what=modules,dtype=float32", None),
    ("pixart", "diffusers-taylorseer:interval=3,what=lite,order=0", "diffusers-taylorseer:interval=1,what=lite"),
    ("sd3", "diffusers-magcache:threshold=100,retention=0.04,ratios=ones", None),
    ("sd3", "cache-dit:fn=1,warmup=2,threshold=0.5", "cache-dit:fn=1,warmup=2,threshold=0"),
    ("sd3", "cache-dit:fn=1,warmup=3,threshold=0.5,taylor=1,no_taylor_text", None),
    ("sd", "peer-deepcache:interval=2", "peer-deepcache:interval=1"),
    ("sd", "peer-tgate:gate=3,interval=2,warmup=0", "peer-tgate:gate=1000,interval=1"),
    ("pixart", "peer-tgate:gate=4,later=2", None),
    ("sd", "tomesd:ratio=0.5", "tomesd:ratio=0"),
]
REFUSED = [
    ("sd3", "diffusers-firstblock", "TypeError: unsupported operand"),  # the last block gives no text back
    ("sd", "diffusers-firstblock", "IndexError: pop from empty list"),
    ("sd3", "diffusers-taylorseer:what=lite", "AttributeError: 'NoneType' object has no attribute 'dtype'"),
    ("sd", "diffusers-taylorseer", "it finds nothing to act on in UNet2DConditionModel"),
    ("sd3", "cache-dit", "AssertionError: Fn_compute_blocks 8 must be less"),
    ("sd", "cache-dit:fn=1", "ValueError: StableDiffusionPipeline is not officially supported"),
    ("sd3", "peer-deepcache", "AttributeError: .* has no attribute 'unet'"),
    (
        "sd3",
        "peer-tgate",
        "its package is written for Stable Diffusion, SDXL and PixArt, not for SD3Transformer2DModel",
    ),
    ("sd3", "tomesd", "AttributeError: .* has no attribute 'named_modules'"),
]


def there(text: str) -> Variant:
    """The variant, if its package is installed."""
    variant = parse_variant(text)
    assert variant.peer is not None
    pytest.importorskip(variant.peer.module)
    return variant


def state(pipe: Any) -> Any:
    """All that a peer might leave behind: attributes, hooks and classes."""

    def held(module: torch.nn.Module) -> dict[str, Any]:
        return {k: dict(v) if "hook" in k and isinstance(v, dict) else id(v) for k, v in vars(module).items()}

    modules = {name: (type(module), held(module)) for name, module in tiny.denoiser(pipe).named_modules()}
    return modules, dict(vars(type(pipe))), set(vars(pipe)), set(vars(pipe.scheduler))


@pytest.mark.parametrize(("family", "acting", "dense"), ACTING, ids=[acting for _, acting, _ in ACTING])
def test_it_acts_repeats_itself_and_leaves_nothing(family: str, acting: str, dense: str | None) -> None:
    variant, pipe = there(acting), tiny.BUILDERS[family]()
    plain, before = tiny.run(pipe, steps=6), state(pipe)
    with variant.applied(pipe):
        first = tiny.run(pipe, steps=6)
        tiny.run(pipe, steps=4, seed=5)
        tiny.run(pipe, steps=6, seed=7, batch=2)
        assert torch.equal(tiny.run(pipe, steps=6), first)  # whatever ran between
    assert not torch.equal(first, plain)
    assert state(pipe) == before
    assert torch.equal(tiny.run(pipe, steps=6), plain)
    with variant.applied(pipe):  # and on another day
        assert torch.equal(tiny.run(pipe, steps=6), first)
    if dense:
        with parse_variant(dense).applied(pipe):
            assert torch.allclose(tiny.run(pipe, steps=6), plain, atol=1e-5)
    assert state(pipe) == before


@pytest.mark.parametrize(("family", "text", "words"), REFUSED, ids=[f"{text}-{family}" for family, text, _ in REFUSED])
def test_what_does_not_run_says_so_in_its_own_words(family: str, text: str, words: str) -> None:
    variant, pipe = there(text), tiny.BUILDERS[family]()
    plain, before = tiny.run(pipe), state(pipe)
    with (
        pytest.raises(UnsupportedError, match=f"{variant.peer and variant.peer.name} does not run: {words}"),
        variant.applied(pipe),
    ):
        tiny.run(pipe)
    assert state(pipe) == before
    assert torch.equal(tiny.run(pipe), plain)


def test_a_run_of_its_own_that_breaks_leaves_nothing_in_the_next() -> None:
    variant, pipe = parse_variant("diffusers-taylorseer:interval=3"), tiny.sd3()

    def stop(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise KeyError("enough")
        return values

    with variant.applied(pipe):
        first = tiny.run(pipe, steps=6)
        with pytest.raises(KeyError, match="enough"):  # not the peer's: it stays what it is
            tiny.run(pipe, steps=6, callback_on_step_end=stop)
        assert torch.equal(tiny.run(pipe, steps=6), first)


def test_hooks_that_were_there_stay() -> None:
    """diffusers' own `remove_hook` corrupts such a chain."""
    pipe = tiny.pixart()
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer.proj_out)
    registry.register_hook(ModelHook(), "mine")
    plain, before, hooks = tiny.run(pipe), state(pipe), dict(registry.hooks)
    with parse_variant("diffusers-taylorseer:interval=2,what=lite").applied(pipe):
        assert len(registry.hooks) == len(hooks) + 1 == 2
        tiny.run(pipe, steps=5)
    assert state(pipe) == before and registry.hooks == hooks
    assert len(registry._hook_order) == len(registry._fn_refs) == 1
    assert torch.equal(tiny.run(pipe), plain)


def test_what_is_there_already_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sd()
    with patched(pipe, method="todo"), pytest.raises(StateError, match="unpatch the pipeline first"):
        parse_variant("tomesd").applied(pipe).__enter__()
    monkeypatch.setattr(peers.CacheDiT, "module", "cache_dit_that_is_not_here")
    with pytest.raises(ConfigError, match="cache-dit needs cache-dit, which is not here: pip install cache-dit"):
        parse_variant("cache-dit").applied(pipe).__enter__()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diffusers-firstblok", "no method 'diffusers-firstblok': .*of other libraries cache-dit, .*tomesd; and nume"),
        ("diffusers-firstblock:treshold=0.1", r"no option treshold \(did you mean threshold\?\); .* has threshold"),
        ("diffusers-firstblock:threshold", r"threshold needs a value: number in \[0, 100\]"),
        ("diffusers-firstblock:threshold=low", r"threshold takes number in \[0, 100\], got 'low'"),
        ("diffusers-firstblock:threshold=-1", r"threshold must be in \[0, 100\], got -1.0"),
        ("diffusers-taylorseer:what=all", "what must be one of 'attention', 'modules', 'lite', got 'all'"),
        ("tomesd:ratio=0.8", r"ratio must be in \[0, 0.75\]"),
        ("tomesd:max_downsample=3", "max_downsample must be one of 1, 2, 4, 8, got 3"),
        ("tomesd:use_rand=maybe", "use_rand takes .*, got 'maybe'"),
        ("tomesd:policy=0.3", "no option policy; tomesd has ratio"),
    ],
)  # fmt: skip
def test_what_is_typed_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        parse_variant(text)
    assert str(found.value).startswith(f"variant {text!r}: ")


def test_as_data_and_back() -> None:
    variant = parse_variant("tomesd:ratio=0.6,no_use_rand,merge_mlp")
    assert variant.name == "tomesd-ratio-0.6-no_use_rand-merge_mlp"
    assert variant.peer == peers.ToMeSD(ratio=0.6, use_rand=False, merge_mlp=True)
    assert Variant.from_dict(json.loads(json.dumps(variant.to_dict()))) == variant
    reduction = variant.to_dict()["reduction"]
    assert reduction["method"] == "tomesd" and reduction["package"].startswith("tomesd ")
    assert parse_variant("diffusers-taylorseer:interval=3,order=1").name == "diffusers-taylorseer-interval-3"
    with pytest.raises(ConfigError, match="no cache of another library is called 'nocache'"):
        peers.peer_from_dict({"_type": "nocache", "_version": 1})
    with pytest.raises(ConfigError, match="in version 2 cannot be read"):
        peers.peer_from_dict({"_type": "tomesd", "_version": 2})
    with pytest.raises(ConfigError, match="not both"):
        Variant("a", parse_variant("tome").config, peer=variant.peer)
    with pytest.raises(ConfigError, match="it takes no method"):
        Variant("a", anchor="seed", peer=variant.peer)


def test_it_is_drawn_recorded_and_gone_on_with(tmp_path: Path) -> None:
    pytest.importorskip("tomesd")
    pipe, variants = toys.sd(), (*runs.VARIANTS[:1], parse_variant("tomesd:ratio=0.5"))
    made = runs.draw(tmp_path / "a", pipe, variants=variants)
    assert made.drawn == 10 and load_run(tmp_path / "a").variants == variants
    tome = parse_variant("tome")
    again = runs.draw(tmp_path / "a", pipe, variants=(*variants, tome))
    assert (again.drawn, again.kept) == (5, 10)
    runs.draw(tmp_path / "b", pipe, variants=(variants[0], tome, variants[1]))
    assert runs.files(tmp_path / "b") == runs.files(tmp_path / "a")


def test_runs_from_before_there_were_peers_still_load(tmp_path: Path) -> None:
    runs.draw(tmp_path / "a")
    asked = json.loads((tmp_path / "a" / "run.json").read_text())
    assert all(set(variant) == {"name", "anchor", "reduction", "call"} for variant in asked["variants"])
    assert load_run(tmp_path / "a").variants == runs.VARIANTS[:2]


def test_cache_dit_does_not_wait_for_other_processes(monkeypatch):
    """It decides together with all processes of a group: one that times alone would wait for ever."""
    pytest.importorskip("cache_dit")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    peer = peers.applied(tiny.sd3(), peers.parse_peer("cache-dit", []))
    with pytest.raises(UnsupportedError, match="use it in one process"), peer:
        pass


def test_tgate_draws_what_its_package_draws() -> None:
    """The half batch is made around the denoiser here, and by a pipeline's second `__call__` there."""
    tgate, pipe = pytest.importorskip("tgate"), tiny.sd()
    options = {"gate_step": 3, "sp_interval": 2, "fi_interval": 2, "warm_up": 0}
    with peers.applied(pipe, peers.PeerTGate(gate=3, interval=2, later=2, warmup=0)):
        ours = tiny.run(pipe, steps=7)
        tiny.run(pipe, steps=7, guidance=1.0)  # where the package's loop breaks
    loaded = tgate.TgateSDLoader(tiny.sd())
    call = tiny.inputs(loaded, 0, 1, 4.0) | {"num_inference_steps": 7, "output_type": "latent"}
    theirs = loaded.tgate(**call, **options, generator=[torch.Generator().manual_seed(0)])[0]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_tgates_steps_do_what_they_are_called() -> None:
    """By the attention that runs in each."""
    pytest.importorskip("tgate")
    pipe, peer = tiny.sd(), peers.PeerTGate(gate=4, interval=2, later=2, warmup=0)
    found: list[str] = []
    ran: set[str] = set()
    unet = pipe.unet
    for name, module in unet.named_modules():
        if name.endswith((".attn1.to_q", ".attn2.to_q")):
            kind = name.split(".")[-2]
            module.register_forward_hook(lambda *_, kind=kind: ran.add(kind))

    def ended(*_: Any) -> None:
        names = {("attn1", "attn2"): "full", ("attn2",): "reuse self", ("attn1",): "reuse cross", (): "reuse"}
        found.append(names[tuple(sorted(ran))])
        ran.clear()

    unet.register_forward_hook(ended)
    with peers.applied(pipe, peer):
        tiny.run(pipe, steps=8)
    assert found == peer.kinds(8)
    assert set(found) == {"full", "reuse self", "reuse cross", "reuse"}
