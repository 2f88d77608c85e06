"""A run that is killed, cut off or full ends as if it had never been stopped; no second one comes between."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation import results, store
from diffusion_tokred.evaluation.locks import Lock
from diffusion_tokred.evaluation.store import load_run, pictures
from diffusion_tokred.evaluation.variants import UNPATCHED, Variant
from tests.evaluation import toys
from tests.evaluation.runs import PROMPTS, QUICK, TOME, VARIANTS, count, draw, files, in_a_process, lines


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that `draw` makes without options. Nobody changes it."""
    out = tmp_path_factory.mktemp("runs") / "short"
    draw(out)
    return out


def test_killed_three_times_it_ends_with_the_same_bytes(tmp_path, short):
    def slowly() -> None:  # however fast the machine, it does not get to the end in the moments before a kill
        real = os.replace
        os.replace = lambda *args: (time.sleep(0.05), real(*args))  # type: ignore[assignment]
        draw(out)

    out, chance, least = tmp_path / "a", random.Random(0), 0
    for stop in (1, 4, 6):  # pictures there before the kill, at a random moment after
        process = in_a_process(slowly)
        while count(out) < stop and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = sum(len(items) for items in load_run(out, verify=True).items.values())
        assert least <= found < 10  # nothing was lost, and it was not done
        least = found
    made = draw(out)
    assert (made.kept, made.drawn) == (least, 10 - least)
    assert least >= 6
    assert files(out) == files(short)
    assert lines(out) == lines(short)


def kill_at(name: str, count: int, after: bool) -> Callable[..., Any]:
    """`os.<name>` that kills the process in its count-th call: before it has done anything, or after. A line that is
    written is cut in the middle."""
    real, calls = getattr(os, name), iter(range(1, 10**6))

    def fake(*args: Any, **kwargs: Any) -> Any:
        if next(calls) < count:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        elif name == "write":
            real(args[0], args[1][: len(args[1]) // 2])
        return os.kill(os.getpid(), signal.SIGKILL)

    return fake


@pytest.mark.parametrize(
    ("name", "count", "after", "left"),
    [
        ("replace", 1, False, 0),  # run.json is not yet there
        ("write", 1, True, 0),  # the lock says who, run.json is not yet there
        ("fsync", 3, False, 2),  # half a picture, under another name
        ("replace", 4, False, 2),  # a whole one, under another name
        ("replace", 4, True, 2),  # in place, not listed
        ("write", 4, False, 2),  # half of its line is written
        ("write", 4, True, 3),  # listed; its batch is not complete without it
    ],
)
def test_killed_at_the_worst_moments(tmp_path, short, name, count, after, left):
    out = tmp_path / "a"

    def work() -> None:
        setattr(os, name, kill_at(name, count, after))
        draw(out, variants=VARIANTS[:1])

    process = in_a_process(work)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    made = draw(out)
    assert made.kept == left
    assert files(out) == files(short)
    assert lines(out) == lines(short)
    assert not [p for p in out.rglob(".*") if p.name != ".lock"]


def test_pictures_that_are_lost_are_drawn_again_and_the_others_left_alone(tmp_path, short):
    out = tmp_path / "a"
    draw(out)
    gone = sorted(out.glob(f"images/{TOME}/*.png"))[1]
    gone.unlink()
    cut = sorted(out.glob(f"images/{UNPATCHED}/*.png"))[4]
    cut.write_bytes(cut.read_bytes()[:-1])
    other = sorted(out.glob(f"images/{UNPATCHED}/*.png"))[0]
    other.write_bytes(Path(sorted(out.glob(f"images/{TOME}/*.png"))[0]).read_bytes())  # a picture, but not this one
    times = {p: p.stat().st_mtime_ns for p in out.glob("images/*/*.png") if p not in (gone, cut, other)}
    run = load_run(out)
    assert run.missing == {UNPATCHED: ((0, 0), (4, 0)), TOME: ((1, 0),)}
    assert not run.complete
    made = draw(out)
    assert (made.drawn, made.kept) == (3, 7)
    assert made.run.complete
    assert files(out) == files(short)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert draw(out).drawn == 0


def test_a_flipped_bit_is_found_when_asked_for(tmp_path):
    out = tmp_path / "a"
    draw(out, variants=VARIANTS[:1])
    path = sorted(out.glob("images/*/*.png"))[2]
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    assert load_run(out).complete
    assert load_run(out, verify=True).missing == {UNPATCHED: ((2, 0),)}
    with pytest.raises(ConfigError, match=rf"{path.name} is damaged, .* delete it and run the same command again"):
        list(pictures(out, UNPATCHED))
    assert len(next(iter(pictures(out, UNPATCHED)))) == 2  # up to there they are good


def test_an_interrupt_keeps_what_is_done(tmp_path, short, pipe):
    out = tmp_path / "a"

    def stop(what: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(out, pipe, progress=stop)
    assert draw(out, pipe).kept == 4  # nor is the folder locked, nor the pipeline patched
    assert files(out) == files(short)


def test_variants_and_repeats_may_be_added(tmp_path, pipe):
    out, whole, call = tmp_path / "a", tmp_path / "whole", QUICK | {"num_inference_steps": 2}
    draw(whole, pipe, variants=VARIANTS, call=call)
    draw(out, pipe, variants=VARIANTS[:1], call=call)
    made = draw(out, pipe, variants=(VARIANTS[0], *VARIANTS[2:]), call=call)
    assert (made.kept, made.drawn) == (5, 15)
    made = draw(out, pipe, call=call)
    assert [variant.name for variant in made.run.variants] == [UNPATCHED, "steps-1", "seed", "numerics", TOME]
    assert made.run.variants == (VARIANTS[0], *VARIANTS[2:], VARIANTS[1])
    assert files(out) == files(whole)
    made = draw(out, pipe, repeats=2, call=call)
    assert (made.kept, made.drawn, made.run.asked["repeats"]) == (10, 10, 2)
    assert {name for name, missing in made.run.missing.items() if missing} == {"steps-1", "seed", "numerics"}
    assert files(out).items() > files(whole).items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 2}, "threads was 1, is 2"),
        ({"batch": 1}, "batch was 2, is 1"),
        ({"base_seed": 1}, "base_seed was 0, is 1"),
        ({"prompts": PROMPTS[:4]}, "prompts was .5, sha256 .*, is .4, sha256 "),
        ({"call": QUICK | {"num_inference_steps": 3}}, "call.num_inference_steps was 1, is 3"),
        ({"call": QUICK | {"height": 24}}, "call.height was 16, is 24"),
        ({"call": QUICK | {"negative_prompt": "x"}}, 'call.negative_prompt was absent, is "x"'),
        ({"variants": (VARIANTS[0], Variant(TOME, tokred.ToMeConfig(ratio=0.6)))}, "ratio was 0.5, is 0.6"),
        ({"dtype": torch.float64}, 'pipeline.dtype was "float32", is "float64"; pipeline.weights'),
        ({"torch": "1.0"}, r'versions.torch was ".*", is "1.0"'),
    ],
)
def test_other_settings_are_refused_in_words(tmp_path, monkeypatch, change, message):
    out, pipe = tmp_path / "a", toys.sd()
    draw(out, pipe, prompts=PROMPTS[:1] if "prompts" not in change else PROMPTS)
    before = (files(out), lines(out), (out / "run.json").read_text())
    if kind := change.pop("dtype", None):
        pipe.to(kind)
    if number := change.pop("torch", None):
        monkeypatch.setattr(results, "version", lambda name: number)
    with pytest.raises(ConfigError, match=f"has pictures of another run: .*{message}"):
        draw(out, pipe, **({"prompts": PROMPTS[:1]} | change))
    assert before == (files(out), lines(out), (out / "run.json").read_text())


# --- one run at a time, and full disks -------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, pipe):
    out = tmp_path / "a"

    def second(what: str, done: int, total: int) -> None:
        with pytest.raises(ConfigError, match=rf"is being worked on by process {os.getpid()} on .*: wait for it"):
            draw(out, pipe)
        seen.append(done)

    seen: list[int] = []
    draw(out, toys.sd(), prompts=PROMPTS[:1], progress=second)
    assert seen == [0, 1, 1, 2]
    assert draw(out, pipe, prompts=PROMPTS[:1]).kept == 2


def test_locks_are_shared_within_a_run_only(tmp_path):
    first, mate, stranger = Lock(tmp_path), Lock(tmp_path), Lock(tmp_path)
    first.alone()
    first.share()
    mate.share()
    first.release()  # the first is done, its mate still draws
    with pytest.raises(ConfigError, match="being worked on"):
        stranger.alone()
    mate.release()
    stranger.alone()
    with pytest.raises(ConfigError, match="another run"):
        mate.share()
    stranger.release()


def test_where_there_are_no_locks_the_process_id_must_do(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_tokred.evaluation.locks.fcntl", None)
    sleeper = in_a_process(lambda: time.sleep(60))
    host = os.uname().nodename
    (tmp_path / ".lock").write_text(f"process {sleeper.pid} on {host}\n")
    with pytest.raises(ConfigError, match=rf"process {sleeper.pid} on {host}: wait .* delete .*\.lock"):
        Lock(tmp_path).alone()
    sleeper.kill()
    sleeper.join()
    lock = Lock(tmp_path)
    lock.alone()  # the dead do not hold it
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {host}\n"
    lock.release()
    (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
    with pytest.raises(ConfigError, match="process 1 on elsewhere"):
        Lock(tmp_path).alone()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of a size; called again, it grows."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size: str) -> Path:
        how = ["-o", f"remount,size={size}"] if mounted else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        if subprocess.run(["mount", *how, str(folder)], capture_output=True).returncode:
            pytest.skip("mounting a disk needs root")
        mounted.append(size)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["28k", "36k"])
def test_a_full_disk_loses_nothing(disk, short, size):
    out = disk(size) / "a"
    with pytest.raises(ConfigError, match=r"cannot write to .*: No space left on device\. Pictures .* are safe"):
        draw(out)
    there = sum(len(items) for items in load_run(out, verify=True).items.values())
    assert 0 < there < 10
    disk("1m")
    made = draw(out)
    assert (made.kept, made.drawn) == (there, 10 - there)
    assert files(out) == files(short)
    assert lines(out) == lines(short)


def test_a_disk_that_is_full_in_the_middle_of_a_line(tmp_path, monkeypatch):
    file, real = tmp_path / "manifest-0.jsonl", os.write
    store._append(file, '{"a": 1}\n')
    with monkeypatch.context() as m:
        m.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
        with pytest.raises(OSError, match="was cut"):
            store._append(file, '{"b": 2}\n')
    assert file.read_text() == '{"a": 1}\n'
