"""The documentation in a real browser, opened as files: no server, no network."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedpriv

ROOT = Path(fedpriv.__file__).parent.parent

pytest.importorskip("material", reason="mkdocs-material is not installed: make docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", built]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(build, cwd=ROOT, env=environment, check=True)
    return built


def opened(browser, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
    """Return a page, and what it will complain of or ask others for."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if _outside(request) else 0)
    return page, complaints


def _outside(request: Any) -> bool:
    return not request.url.startswith(("file:", "data:", "about:"))


@pytest.mark.parametrize("start", ["index.html", "reference/config.html"])
def test_search_finds_without_a_server(site, browser, start: str) -> None:
    page, complaints = opened(browser)
    page.goto((site / start).as_uri())
    page.locator(".md-search__input").first.click()
    page.keyboard.type("noise multiplier")
    found = page.locator(".md-search-result__link")
    found.first.wait_for(timeout=20_000)
    assert found.count() > 3
    target = found.first.get_attribute("href")
    page.goto(target if "://" in target else (site / start).parent.joinpath(target).as_uri())
    assert "noise" in page.locator("article").inner_text().lower()
    assert complaints == []
    page.close()


LOOKED_AT = ["index", "tutorials", "reference/config", "privacy", "results"]


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_pages_can_be_read_by_all(site, browser, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page, complaints = opened(browser, width, scheme)
    for name in LOOKED_AT:
        page.goto((site / f"{name}.html").as_uri())
        found = axe.run(page, options={"preload": False}).response  # it would ask for the styles
        wrong = [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]]
        assert (name, wrong) == (name, [])
        assert len(found["passes"]) > 10
    assert complaints == []
    page.close()


def test_no_page_is_wider_than_a_phone(site, browser) -> None:
    page, _ = opened(browser, 390)
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path.name
    page.close()
