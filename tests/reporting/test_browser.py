"""The report in a real browser."""

import json
from typing import Any

import pytest

from fedpriv.reporting.report import render, write_report


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_reports_open_without_errors_fit_and_can_be_read_by_all(
    make_run, browser, width: int, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    one, other = make_run(), make_run("b", privacy=None, rounds=4)
    pages = [write_report([one]), write_report([one, other], one / "both.html")]
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if _outside(request) else 0)
    for path in pages:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("document.querySelectorAll('details').forEach((fold) => fold.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.run(page).response
        assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
        assert len(found["passes"]) > 10
    page.goto(pages[0].as_uri())
    expected = json.loads(render([one], "json"))["runs"][0]["epsilon"]
    for accountant, epsilon in expected.items():
        assert float(page.locator(f"#epsilon-{accountant}").get_attribute("value")) == epsilon
    assert complaints == []
    page.close()


def test_the_head_of_a_report_is_seen_at_once(make_run, browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(write_report([make_run()]).as_uri())
    for shown in (".badge", "#epsilon-pld", "#quality-by-epsilon", ".plain"):
        box = page.locator(shown).bounding_box()
        assert box["y"] + box["height"] <= 800, shown
    page.mouse.wheel(0, 3000)
    page.wait_for_function("window.scrollY > 2000")
    assert page.locator("nav a").first.bounding_box()["y"] >= 0
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
