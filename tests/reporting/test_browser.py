"""The report in a real browser."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from fedpriv.reporting.report import render, write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

_QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        yield launched
        launched.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_the_report_opens_without_errors_and_fits(make_run, browser, width: int) -> None:
    path = make_run()
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if _outside(request) else 0)
    page.goto(write_report([path]).as_uri())
    expected = json.loads(render([path], "json"))["runs"][0]["epsilon"]
    for accountant, epsilon in expected.items():
        assert float(page.locator(f"#epsilon-{accountant}").get_attribute("value")) == epsilon
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    page.close()


def test_paper_hides_nothing(make_run, browser) -> None:
    page = browser.new_page()
    page.goto(write_report([make_run()]).as_uri())
    text = page.locator("details pre").first
    assert not text.is_visible()
    page.emulate_media(media="print")
    assert text.is_visible()
    page.close()


def _outside(request: Any) -> bool:
    return not request.url.startswith(("file:", "data:"))
