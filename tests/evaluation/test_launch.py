"""Many processes draw what one draws; launches that would do the work twice are refused."""

from __future__ import annotations

import functools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation import generation, launch, models
from diffusion_tokred.evaluation.locks import Lock
from diffusion_tokred.evaluation.prompts import PromptSet
from diffusion_tokred.evaluation.store import load_run
from diffusion_tokred.evaluation.variants import UNPATCHED
from tests.evaluation.runs import PROMPTS, TOME, TYPED, count, draw, files, in_two_processes, lines

ROOT = Path(__file__).parents[2]


def script(*words: Any, launcher: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, *launcher, str(ROOT / "scripts" / "generate.py")]
    return start + [str(word) for word in words]


def options(model: Path, prompts: Path, out: Path) -> list[str]:
    found = f"--model {model} --prompts {prompts} --out {out} --batch 2 --steps 1 --size 16 --guidance 1"
    return [*found.split(), "--variant", TYPED[0]]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


ENV = {key: value for key, value in os.environ.items() if key not in (*launch._COUNTS, *launch._RANKS)}
ENV |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_processes_draw_what_one_draws(tmp_path, folder, prompt_file):
    """Two processes, one process, and one process in another program: the same bytes."""
    out, one = tmp_path / "two", tmp_path / "one"
    done = subprocess.run(
        script(*options(folder, prompt_file, out), launcher=TWO), env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "10 pictures drawn" in done.stdout
    assert done.stdout.count("pictures drawn") == 1
    texts = PromptSet(prompt_file.name, PROMPTS)
    draw(one, models.load_model(str(folder), device="cpu"), prompts=texts)
    assert files(out) == files(one)
    assert lines(out) == lines(one)
    ranks = {p.name: len(p.read_text().splitlines()) for p in out.glob(f"images/{UNPATCHED}/manifest-*")}
    assert ranks == {"manifest-0.jsonl": 3, "manifest-1.jsonl": 2}  # batches of 2, 2, 1, dealt out in turn


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_ten_times_in_the_script_it_ends_with_the_same_bytes(tmp_path, folder, prompt_file):
    """Real processes, killed at random moments; one or two of them, whatever comes."""
    out, one, chance = tmp_path / "a", tmp_path / "one", random.Random(1)
    texts = tuple(PROMPTS[i % 5] for i in range(60))
    prompt_file = tmp_path / "many.txt"
    prompt_file.write_text("\n".join(texts))
    kills = least = 0
    while kills < 10:
        many = script(*options(folder, prompt_file, out), launcher=TWO if kills % 3 == 2 else ())
        process = subprocess.Popen(many, env=ENV, stderr=subprocess.DEVNULL, start_new_session=True)
        before = count(out)
        while count(out) == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for _ in range(200):  # torchrun's workers are in sessions of their own: they go when it is gone
            if (out / ".lock").exists() and free(out):
                break
            time.sleep(0.05)
            for pid in workers(out):
                os.kill(pid, signal.SIGKILL)
        kills += 1
        found = sum(len(items) for items in load_run(out, verify=True).items.values())
        assert found >= least
        least = found
    subprocess.run(script(*options(folder, prompt_file, out)), env=ENV, check=True)
    draw(one, models.load_model(str(folder), device="cpu"), prompts=texts)
    assert files(out) == files(one)
    assert {json.loads(line)["sha256"] for line in lines(out)} == {json.loads(line)["sha256"] for line in lines(one)}


def free(out: Path) -> bool:
    lock = Lock(out)
    try:
        lock.alone()
    except ConfigError:
        return False
    lock.release()
    return True


def workers(out: Path) -> list[int]:
    """Processes of this test that are at work in a folder: their command lines name it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


# Ends while gloo's threads hold messages: what an end right after the last message is now and then.
ENDS_AT_ONCE = """
import torch
from diffusion_tokred.evaluation import launch

processes = launch.start("cpu")
for _ in range(20):
    received = [torch.zeros(1 << 18) for _ in range(2)]
    torch.distributed.all_gather(received, received[0] + 1, group=processes.group, async_op=True)
print("ends")
"""


def test_processes_leave_their_group_before_they_end(tmp_path):
    """Else some of them abort ("terminate called without an active exception"), with all of the work done."""
    file = tmp_path / "ends.py"
    file.write_text(ENDS_AT_ONCE)
    done = subprocess.run([sys.executable, *TWO, str(file)], env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ends\nends\n"), done.stderr


def test_nodes_that_do_not_see_each_other(tmp_path, pipe):
    with pytest.raises(ConfigError, match=r"5 pictures that were drawn are not in .*: do all nodes see the same"):
        draw(tmp_path / "a", pipe, processes=launch.Processes(rank=0, world=2))
    assert draw(tmp_path / "a", pipe).kept == 5  # two batches of two and one of one


def test_processes_that_would_not_draw_the_same():
    with pytest.raises(ConfigError, match='processes 0 and 2 would not draw the same pictures: device was "a", is "b"'):
        generation._alike([{"device": "a"}, {"device": "a"}, {"device": "b"}])


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher, and accelerate asked for nothing yet."""
    from accelerate import PartialState

    for name in (*launch._COUNTS, *launch._RANKS, "MASTER_ADDR", "ACCELERATE_USE_CPU", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    return monkeypatch


def test_one_process_needs_no_launcher(bare):
    assert launch.start("cpu") == launch.Processes(0, 1)
    bare.setenv("WORLD_SIZE", "1")
    bare.setenv("RANK", "0")
    assert launch.start("cpu").world == 1
    assert launch.Processes().share(lambda: 3) == 3
    assert launch.Processes().gather(3) == [3]


def test_whatever_goes_wrong_in_the_first_process_ends_the_others(tmp_path):
    """Also what nobody expected: it is raised there as it is, and told to those that wait."""

    def work(processes: launch.Processes) -> list[str]:
        found = []
        for error in (ZeroDivisionError("of nothing"), ConfigError("no such folder"), KeyError()):
            try:
                processes.share(functools.partial(fail, error))
            except Exception as raised:
                found.append(f"{type(raised).__name__}: {raised}")
        return [*found, processes.share(lambda: f"rank {processes.rank}")]

    first, second = in_two_processes(tmp_path, work)
    assert first == ["ZeroDivisionError: of nothing", "SharedError: no such folder", "KeyError: ", "rank 0"]
    assert second == ["SharedError: of nothing", "SharedError: no such folder", "SharedError: KeyError", "rank 0"]


def fail(error: Exception) -> None:
    raise error


def test_a_launch_that_would_do_the_work_twice_is_refused(bare, tmp_path, pipe):
    from accelerate import PartialState

    bare.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NUM_TASKS says .* 2 processes, .* torchrun --nproc-per-node 2"):
        draw(tmp_path / "a", pipe)
    bare.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE says .* 4 processes, but not which .* accelerate launch "):
        launch.start("cuda")
    # As under torchrun, after PartialState() without cpu=True: two ranks that do not know of each other.
    bare.setenv("RANK", "1")
    bare.setattr(PartialState, "_shared_state", {"num_processes": 1, "process_index": 0, "distributed_type": "NO"})
    with pytest.raises(
        ConfigError, match=r"4 processes, accelerate knows of 1: .* torchrun --nproc-per-node 4 .* cpu=True"
    ):
        draw(tmp_path / "a", pipe)
    assert not (tmp_path / "a").exists()


def test_accelerate_launch_on_the_cpu_is_refused(bare):
    """What `accelerate launch --cpu --num_processes 2` sets for the one process that it starts."""
    bare.setenv("ACCELERATE_USE_CPU", "True")
    assert launch.start("cpu").world == 1  # --num_processes 1
    bare.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match=r"starts one process, .* torchrun --nproc-per-node N"):
        launch.start("cpu")


def test_the_scripts_errors_take_one_line(bare, folder, prompt_file, tmp_path, capsys):
    def run(*words: Any) -> tuple[int, str]:
        bare.setattr(sys, "argv", script(*words)[1:])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(sys.argv[0], run_name="__main__")
        found = capsys.readouterr().err
        return int(stop.value.code or 0), found

    good = options(folder, prompt_file, tmp_path / "a")
    for words, message in (
        ([*good, "--variant", "tomee"], "variant 'tomee': no method 'tomee'"),
        ([*good, "--variant", TYPED[0]], f"two variants are called {TOME}"),
        ([*good, "--size", "wide"], "a size is written"),
        ([*good, "--prompts", "none.txt"], "cannot read the prompts none.txt"),
        ([*good, "--bogus"], "--bogus"),
        ([*good, "--device", "cuda:7"], "no device 'cuda:7'"),
        ([], "--out"),
    ):
        code, found = run(*words)
        assert code == 2
        assert message in found
        assert len(found.splitlines()) == 1
    assert not (tmp_path / "a").exists()
