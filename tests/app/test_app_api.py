"""The server as programs see it, through gradio_client: endpoints by name, messages for hostile input, stopping."""

from __future__ import annotations

import io
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from diffusion_tokred.app import serve
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from typer.testing import CliRunner

import diffusion_tokred as tokred
from diffusion_tokred.cli import app

CALL: dict[str, Any] = dict(
    prompt="a red star on a plain gray background", a="unpatched", b="tome:ratio=0.5", seed=0, steps=2, width=64,
    height=64, guidance=3, repeat=1, model="toy-sd", protect=None, api_name="/compare",
)  # fmt: skip


def test_the_endpoints_have_names(client: Client) -> None:
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/compare", "/batch", "/tune", "/explain", "/methods", "/models", "/stop"}


def test_compare(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = client.submit(**CALL)
    a, b, found, python = job.result()
    before, after = Image.open(a).convert("RGB"), Image.open(b).convert("RGB")
    assert before.size == after.size == (64, 64) and before.tobytes() != after.tobytes()
    assert found["schema"] == "tokred.result/1" and found["rows"][0]["noise"] == found["rows"][1]["noise"] != ""
    assert found["reduction"]["B"]["options"]["ratio"] == 0.5 and len(found["rows"][1]["seconds"]) == 1
    shares = [output[2]["share"] for output in job.outputs()[:-1]]
    assert shares == sorted(shares) and 0 <= shares[0] < shares[-1] <= 1

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(python, "exported.py", "exec"), names)
    assert names["a"].tobytes() == before.tobytes() and names["b"].tobytes() == after.tobytes()


def test_what_can_be_asked_without_a_run(client: Client) -> None:
    found = client.predict(model="toy-sd", api_name="/methods")
    assert set(found) == {info.name for info in tokred.methods()}
    assert found["tome"]["refused"] is None and "stack" in found["ras"]["refused"]
    assert client.predict(api_name="/models")["toy-sd"]["state"] == "ready"
    side = {"method": "tome", "policy": [[0.5, 0.5]]}
    plan = client.predict(side=side, steps=4, width=64, height=64, guidance=3, model="toy-sd", api_name="/explain")
    assert [step["ratio"] > 0 for step in plan["steps"]] == [step["u"] <= 0.5 for step in plan["steps"]]
    assert client.predict(api_name="/stop") == {"stopped": 0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"steps": -3}, "steps must be from 1 to 100"),
        ({"width": 10**6}, "width must be from 16"),
        ({"width": 1024}, "go up to 512"),
        ({"width": 65}, "refuses this call"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"guidance": None}, "guidance must be a number"),
        ({"model": "../../etc"}, "no model"),
        ({"b": "nonsense"}, "unknown method"),
        ({"b": "ras"}, "acts on stack"),
        ({"b": 5}, "a side is text"),
        ({"b": {"method": "tome", "options": {"ratio": 0.9}}}, "0.75"),
        ({"b": {"method": "tome", "policy": "../../etc/passwd"}}, "not JSON"),
    ],
)
def test_bad_input_is_a_message(client: Client, given: dict[str, Any], message: str) -> None:
    with pytest.raises((AppError, ValueError), match=message) as caught:
        client.predict(**(CALL | given))
    assert "Traceback" not in str(caught.value) and "File " not in str(caught.value)


def test_nan_on_the_wire(page: Any) -> None:
    """No client sends it; somebody may."""
    values = ["a star", "unpatched", "tome", math.nan, 2, 64, 64, 3, 1, "toy-sd", None]
    base = f"{page.local_url}gradio_api/call/compare"
    sent = httpx.post(base, content=json.dumps({"data": values}), headers={"content-type": "application/json"})
    text = sent.text
    if sent.status_code == 200:
        text = httpx.get(f"{base}/{sent.json()['event_id']}", timeout=60).text
        assert "event: error" in text and "seed must be a whole number" in text
    assert "Traceback" not in text


def test_no_file_from_outside(client: Client, page: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(tokred.Policy.constant(0.123).to_dict()))
    forged = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception) as caught:
        client.predict(**(CALL | {"protect": forged}))
    assert "0.123" not in str(caught.value)
    base = page.local_url.rstrip("/")
    for path in (str(secret), "/etc/passwd", "../../../../etc/passwd"):
        assert httpx.get(f"{base}/gradio_api/file={path}").status_code in (403, 404)
    stored = httpx.post(
        f"{base}/gradio_api/upload", files={"files": ("../../../evil.json", io.BytesIO(b"{}"))}, timeout=20
    ).json()[0]
    assert ".." not in stored and Path(stored).name == "evil.json" and not (Path.cwd().parent / "evil.json").exists()


def test_a_mask_that_is_a_bomb(client: Client, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    Image.new("1", (5000, 5000)).save(bomb)
    with pytest.raises(AppError, match=r"5000x5000|cannot protect"):
        client.predict(**(CALL | {"protect": handle_file(str(bomb))}))


def test_stop(client: Client) -> None:
    job = client.submit(**(CALL | {"steps": 100, "repeat": 10}))
    while not (job.outputs() and job.outputs()[-1][2]["share"] > 0):
        time.sleep(0.05)
        assert not job.done()
    assert client.predict(api_name="/stop") == {"stopped": 1}
    with pytest.raises(AppError, match="stopped"):
        job.result(timeout=30)
    a, *_ = client.predict(**(CALL | {"repeat": 0}))  # and the next one runs
    assert Image.open(a).size == (64, 64)


def test_batch(client: Client) -> None:
    words: dict[str, Any] = dict(prompt=CALL["prompt"], steps=2, width=64, height=64, guidance=3, model="toy-sd")
    note, grid, table, found = client.predict(settings="tome\ntodo", seeds="0,1", **words, api_name="/batch")
    assert (
        "Done" in note and "todo" in table and Image.open(grid["value"] if isinstance(grid, dict) else grid).width > 200
    )
    assert [row["name"] for row in found["rows"]] == ["unpatched", "tome ratio 0.5", "todo factor 2"]
    with pytest.raises(AppError, match="no settings"):
        client.predict(settings="", seeds="0", **words, api_name="/batch")


def test_who_may_come_in() -> None:
    with pytest.raises(tokred.ConfigError, match="--auth"):
        serve(share=True)
    with pytest.raises(tokred.ConfigError, match="user:password"):
        serve(auth="ada")
    with pytest.raises(tokred.ConfigError, match="queue size"):
        serve(queue_size=0)


@pytest.mark.slow
def test_ten_users_at_once(page: Any) -> None:
    def user(seed: int) -> tuple[bytes, str]:
        client = Client(page.local_url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 120})
        a, _, found, _ = client.predict(**(CALL | {"seed": seed}))
        return Image.open(a).convert("RGB").tobytes(), found["rows"][0]["noise"]

    with ThreadPoolExecutor(10) as pool:
        drawn = list(pool.map(user, range(10)))
    assert len(set(drawn)) == 10  # each has the picture of its own seed
    assert drawn[3] == user(3)


@pytest.mark.slow
def test_a_full_queue_is_a_message() -> None:
    running = serve(("toy-sd",), block=False, queue_size=1)
    try:
        first = Client(running.local_url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 120})
        jobs = [first.submit(**(CALL | {"steps": 60})) for _ in range(6)]
        said = []
        for job in jobs:
            try:
                job.result(timeout=280)
            except Exception as error:
                said.append(str(error))
        assert said and all("queue" in text.lower() for text in said)
    finally:
        running.close()


@pytest.mark.slow
def test_a_stranger_is_not_let_in() -> None:
    running = serve(("toy-sd",), block=False, auth="ada:secret")
    try:
        assert httpx.get(f"{running.local_url}config").status_code == 401
        with pytest.raises((AppError, ValueError, httpx.HTTPError)):
            Client(running.local_url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 120}).predict(
                api_name="/models"
            )
        known = Client(
            running.local_url,
            auth=("ada", "secret"),
            verbose=False,
            analytics_enabled=False,
            httpx_kwargs={"timeout": 120},
        )
        assert "toy-sd" in known.predict(api_name="/models")
    finally:
        running.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--share"], "--auth user:password"), (["--auth", "ada"], "user:password"), (["--queue-size", "0"], "queue")],
)
def test_the_command_refuses_in_one_line(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["app", *words])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_taken_port_is_one_line(page: Any) -> None:
    done = CliRunner().invoke(app, ["app", "--port", str(page.server_port)])
    assert done.exit_code == 2 and str(page.server_port) in done.stderr and "Traceback" not in done.output
