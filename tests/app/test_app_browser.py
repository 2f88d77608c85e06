"""The page as a person sees it: in a real Chromium, through the whole flow, light and dark, wide and on a phone.

Needs `pip install playwright` and a Chromium (`apt-get install chromium`). With TOKRED_SHOTS=folder it leaves
screenshots there, to be looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import diffusion_tokred as tokred

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
PATIENCE = 60_000  # ms


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def window(browser: Any, page: Any) -> Iterator[Any]:
    """The page, once the model is ready, set to small pictures; what goes wrong in the browser fails the test."""
    window = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    window.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    window.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    window.on("pageerror", lambda error: wrong.append(str(error)))
    outside: list[str] = []
    window.on(
        "request", lambda r: None if r.url.startswith((page.local_url, "data:", "blob:")) else outside.append(r.url)
    )
    window.goto(page.local_url, wait_until="domcontentloaded")
    window.wait_for_selector(".tk-ready")
    for name, value in {"steps": 6, "width": 64, "height": 64, "repeat": 1}.items():
        window.fill(f"#{name} input", str(value))
    yield window
    assert not wrong and not outside
    window.close()


def shot(window: Any, name: str) -> None:
    if folder := os.environ.get("TOKRED_SHOTS"):
        window.wait_for_timeout(800)
        window.screenshot(path=f"{folder}/{name}.png", full_page=True)


def status(window: Any, text: str) -> None:
    window.wait_for_selector(f"#status :text('{text}')")


def tab(window: Any, name: str) -> None:
    window.get_by_role("tab", name=name, exact=True).click()


def choose(window: Any, where: str, what: str) -> None:
    window.click(f"{where} input")
    window.get_by_role("option", name=what, exact=True).click()


def test_run_both(window: Any) -> None:
    window.click("#run")
    window.wait_for_selector(".tk-live img")  # an unfinished picture
    window.wait_for_selector(".tk-progress :text('left')")
    shot(window, "running")
    status(window, "Done: the same noise")
    assert window.locator(".tk-verdict").inner_text().startswith("B is ")
    assert window.locator("#slider img").count() == 2 and window.locator("#heat img").count() == 1
    shot(window, "pictures")


def test_tokens_are_scrubbed(window: Any) -> None:
    tab(window, "Tokens")
    seen = set()
    for step in (1, 6):
        window.fill("#step input[type=number]", str(step))
        window.locator("#step input[type=number]").press("Enter")
        window.wait_for_selector(f".tk-legend :text('step {step} of 6')")
        window.wait_for_timeout(500)
        seen.add(window.locator("#tokens img").get_attribute("src"))
    assert len(seen) == 2 and "merged" in window.locator(".tk-legend").inner_text()
    shot(window, "tokens")


def test_figures_and_code(window: Any) -> None:
    tab(window, "Figures")
    text = window.locator(".tk-table").first.inner_text()
    for word in ("seconds a call", "FLOPs", "kept from step to step", "PSNR", "SSIM", "initial noise"):
        assert word in text
    assert window.locator(".tk-plot svg use").count() > 6
    shot(window, "figures")
    tab(window, "Code")
    assert "tokred.patched(pipe" in window.locator("#code .cm-content").inner_text()
    with window.expect_download() as waiting:
        window.get_by_text("Save policy of B").click()
    policy = tokred.Policy.load(waiting.value.path())
    assert policy.points == ((1.0, 0.5, "reduce"),) and policy.method["_type"] == "tome"
    shot(window, "code")


def test_keep_a_and_run_another_b(window: Any) -> None:
    choose(window, "#method-b", "todo")
    window.wait_for_selector("label:has-text('factor')")
    window.click("#rerun")
    window.wait_for_selector(".tk-verdict:has-text('A was kept')")
    status(window, "Done")
    tab(window, "Figures")
    assert "kept, not timed" in window.locator(".tk-table").first.inner_text()
    shot(window, "kept")


def test_restore(window: Any) -> None:
    assert window.locator("#history button.thumbnail-item").count() == 2
    window.locator("#history button.thumbnail-item").nth(1).click()
    status(window, "Restored")
    window.wait_for_function("document.querySelector('#method-b input').value === 'tome'")
    window.wait_for_selector(".tk-verdict:has-text('B is ')")


def test_a_policy_file(window: Any, tmp_path: Path) -> None:
    window.get_by_text("B: policy").click()
    policy = tokred.Policy(
        points=((0.9, 0.25, "reduce"),), method=tokred.ToMeConfig(ratio=0.25, merge_ff=True).to_dict()
    )
    policy.save(tmp_path / "policy.json")
    _upload(window, tmp_path / "policy.json")
    window.wait_for_function("document.querySelector('#policy-b textarea').value.includes('0.25')")
    (tmp_path / "broken.json").write_text("{")
    _upload(window, tmp_path / "broken.json")
    window.wait_for_selector(":text('not JSON')")
    assert "Traceback" not in window.content()


def _upload(window: Any, path: Path) -> None:
    with window.expect_file_chooser() as waiting:
        window.get_by_text("Load a policy file").locator("visible=true").click()
    waiting.value.set_files(path)


def test_a_wrong_value_is_a_message(window: Any) -> None:
    window.fill("#prompt textarea", " ")
    window.click("#run")
    window.wait_for_selector(":text('the prompt is empty')")
    shot(window, "message")
    window.fill("#prompt textarea", "a red star on a plain gray background")


def test_stop(window: Any) -> None:
    window.fill("#steps input", "100")
    window.fill("#repeat input", "5")
    window.click("#run")
    window.wait_for_selector(".tk-live img")
    window.click("#stop")
    status(window, "Stopped")
    window.wait_for_timeout(3000)
    assert window.locator(".tk-progress").count() == 0, "it went on"
    window.fill("#steps input", "6")
    window.fill("#repeat input", "1")
    window.click("#run")  # and the next one runs
    status(window, "Done")


def test_batch(window: Any) -> None:
    tab(window, "Batch")
    for name, value in {"steps": 3, "width": 64, "height": 64}.items():
        window.fill(f"#batch-{name} input", str(value))
    window.fill("#batch-seeds input, #batch-seeds textarea", "0-1")
    window.fill("#batch-settings textarea", "tome:ratio=0.5\ntodo")
    window.click("#batch-run")
    window.wait_for_selector("#batch-status :text('Done')")
    assert window.locator("#batch-table tbody tr").count() == 3 and window.locator("#batch-grid img").count() == 1
    shot(window, "batch")
    tab(window, "A/B")


def test_dark_and_on_a_phone(window: Any) -> None:
    """Nothing runs over the edge, and text can be read: 4.5 times as bright as the ground, or as dark (WCAG AA)."""
    for width, name in ((1280, "wide"), (390, "phone")):
        window.set_viewport_size({"width": width, "height": 844})
        for dark in (False, True):
            window.evaluate(f"document.body.classList.toggle('dark', {str(dark).lower()})")
            for part in ("Pictures", "Tokens", "Figures", "Code"):
                tab(window, part)
                window.wait_for_timeout(400)
                if window.evaluate("document.documentElement.scrollWidth") > width:
                    pytest.fail(f"{part} at {width} px: too wide are {window.evaluate(TOO_WIDE, width)}")
                shot(window, f"{name}-{'dark' if dark else 'light'}-{part.lower()}")
            for selector in (".tk-title p", ".tk-state", ".tk-verdict", "#prompt textarea", "#run", "#rerun"):
                assert window.evaluate(CONTRAST, selector) >= 4.5, f"{selector}, dark={dark}"
    window.set_viewport_size({"width": 1280, "height": 900})


TOO_WIDE = """width => [...document.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > width + 1
  && e.childElementCount === 0 && e.checkVisibility()).map(e => e.outerHTML.slice(0, 120))"""

CONTRAST = """selector => {
  const light = ([r, g, b]) => { const [x, y, z] = [r, g, b].map(v => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * x + 0.7152 * y + 0.0722 * z; };
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const element = document.querySelector(selector);
  let ground = element, color = [0, 0, 0, 0];
  while (ground) { const found = rgb(getComputedStyle(ground).backgroundColor);
    if (found.length < 4 || found[3] > 0.9) { color = found; break; } ground = ground.parentElement; }
  const [a, b] = [light(rgb(getComputedStyle(element).color)), light(color)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


def test_the_page_is_there_before_the_model() -> None:
    """`tokred app` answers within 10 seconds; on a machine that is busy, within 10 seconds of its own computing."""
    command = [sys.executable, "-m", "diffusion_tokred.cli", "app", "--port", "7987", "--model", "toy-dit"]
    begin, url = time.monotonic(), "http://127.0.0.1:7987/"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while True:
                try:
                    answer = httpx.get(url, timeout=30)
                    break
                except httpx.ConnectError:
                    assert server.poll() is None and time.monotonic() - begin < 200
                    time.sleep(0.05)
            passed = time.monotonic() - begin
            ticks = sum(map(int, Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
            computed = ticks / os.sysconf("SC_CLK_TCK")
            assert answer.status_code == 200 and "diffusion_tokred" in answer.text
            assert min(passed, computed) < 10, (passed, computed)
            print(json.dumps({"seconds": passed, "computed": computed}))
        finally:
            server.terminate()
