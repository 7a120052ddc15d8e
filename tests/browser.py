"""A real browser for tests of the page and the panel: Debian's Chromium, headless, with a fresh profile."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FAINT = """
const [selector, host] = arguments;
const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const ground = (node) => {
  for (; node; node = node.parentElement ?? node.getRootNode().host) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3) return colour;
  }
  return [255, 255, 255];
};
const top = host ? document.querySelector(host).shadowRoot : document;
return [...top.querySelectorAll(selector)].filter((node) => node.checkVisibility() &&
  [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())
).map((node) => {
  const [a, b] = [parse(getComputedStyle(node).color), ground(node)].map(light).sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), `${node.tagName} ${node.className}: ${node.textContent.slice(0, 40)}`];
}).filter(([ratio]) => ratio < 4.5);
"""
"""Texts with less than the contrast that WCAG asks for (AA), with their ratio."""

__all__ = ["SCREENSHOTS", "Browser", "browsing", "missing"]

SCREENSHOTS = Path(__file__).resolve().parents[1] / "build" / "screenshots"
_FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--hide-scrollbars",
    "--force-color-profile=srgb",
)  # fmt: skip
_CHROMIUM, _DRIVER = ("chromium", "chromium-browser", "google-chrome"), "chromedriver"


def missing() -> str:
    """What keeps a browser from being started here, in a line; empty if nothing does."""
    import importlib.util

    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed: pip install -e '.[dev]'"
    if not _program():
        return "no Chromium: apt-get install chromium chromium-driver"
    return "" if shutil.which(_DRIVER) else "no chromedriver: apt-get install chromium-driver"


def _program() -> str:
    return next((found for name in _CHROMIUM if (found := shutil.which(name))), "")


class Browser:
    """A window, and short words for what tests do with it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.allowed_errors: tuple[str, ...] = ()
        """Parts of console errors that a test brings about itself."""

    def open(self, url: str, width: int = 1280, height: int = 1000) -> None:
        self.resize(width, height)
        self.driver.get(url)

    def resize(self, width: int, height: int = 1000) -> None:
        """The viewport's size, exactly: a window has a least width."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def theme(self, name: str) -> None:
        """``dark`` or ``light``, as the operating system would say."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a JavaScript function's body."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "") -> Any:
        """The first true value of ``condition``."""
        end = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < end, f"never happened within {timeout_s:g} s: {what}"
            time.sleep(0.05)
        return value

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def shot(self, name: str, whole: bool = True) -> Path:
        """A screenshot of the page, to its end or what the window shows, in ``build/screenshots``."""
        import base64

        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        options = {"captureBeyondViewport": whole}
        if whole:
            size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
            width = self.run("return innerWidth")
            options["clip"] = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
        data = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        path = SCREENSHOTS / f"{name}.png"
        path.write_bytes(base64.b64decode(data))
        return path

    def faint(self, selector: str, host: str = "") -> list[Any]:
        """Texts that are hard to read on their ground, below elements of a selector; in the shadow of ``host``."""
        return self.run(_FAINT, selector, host)

    def errors(self) -> list[str]:
        """Errors on the console since the last look, but those that the test brings about."""
        found = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [text for text in found if not any(part in text for part in self.allowed_errors)]


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser of one's own; skips the test, with a line that says why, where there is none."""
    why = missing()
    if why:
        pytest.skip(why)
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(prefix="luna-browser-", ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = _program()
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = Chrome(options=options, service=Service(shutil.which(_DRIVER)))
        try:
            yield Browser(driver)
        finally:
            driver.quit()
