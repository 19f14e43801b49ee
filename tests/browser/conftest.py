"""A page that watches itself: what went wrong in it, and what it asked of the network."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
SCREENSHOTS_VARIABLE = "RECSYS_EDU_SCREENSHOTS"


@dataclass
class Seen:
    """What a page complained about, and what it asked of other machines."""

    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


@pytest.fixture
def browser():
    """A Chromium that has no network but this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: browser)")
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed")
    if sys.platform == "win32":
        pytest.skip("the browser tests end servers as POSIX does")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """open_page(width, height, **options) gives a page and what is seen of it."""

    def open_one(width: int = 1400, height: int = 1600, **options: Any) -> tuple[Any, Seen]:
        seen = Seen()
        page = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
        page.set_default_timeout(90_000)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)

        def watch(route: Any) -> None:
            if urlsplit(route.request.url).hostname in ("127.0.0.1", "localhost"):
                route.continue_()
            else:
                seen.elsewhere.append(route.request.url)
                route.abort()

        page.route(lambda url: url.startswith("http"), watch)
        return page, seen

    return open_one


@pytest.fixture
def expect(browser):
    from playwright.sync_api import expect

    return expect


@pytest.fixture
def picture(tmp_path):
    """picture(page, name) keeps a screenshot, in the folder that RECSYS_EDU_SCREENSHOTS names where it is set."""
    folder = Path(os.environ.get(SCREENSHOTS_VARIABLE, tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name, **options: page.screenshot(path=str(folder / f"{name}.png"), **options)
