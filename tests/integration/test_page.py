"""The daemon's page in a real browser, against a real daemon that works: figures, scaling, absence, changes, keyboard.

Writes a screenshot of each state into ``build/screenshots``.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from luna_daemon.system.runtime import find_token
from luna_daemon.wire import messages as m
from tests.browser import Browser, browsing
from tests.integration.helpers import DEMO_TOML

pytestmark = [pytest.mark.timeout(180), pytest.mark.filterwarnings("default::ResourceWarning")]

LORAS = {"styles/watercolour_xl.safetensors": 3000, "detail-tweaker.safetensors": 900, "<b>ink.safetensors": 2000}
WORK = ("vae", "clip", "lora", "echo", "models.load")


class Page:
    """The page in a browser, by what people see of it."""

    def __init__(self, browser: Browser, daemon: Any) -> None:
        self.browser, self.daemon = browser, daemon
        self.url = f"http://127.0.0.1:{daemon.ws_port}/"

    def open(self, theme: str = "dark", width: int = 1280) -> Page:
        """From its start, without a token."""
        self.browser.wait(self._answers, 20, "the status page answers")
        self.browser.theme(theme)
        self.browser.open(self.url, width)
        self.browser.run("sessionStorage.clear()")
        self.browser.wait(lambda: self.field("status") == "running", 5, "the page shows the daemon")
        self.browser.errors()
        return self

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(self.url + "healthz", timeout=2).status == 200
        return False

    def info(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + "api/info", timeout=5) as answer:
            return json.load(answer)

    def field(self, name: str, within: str = ".luna") -> str:
        """The text of a figure."""
        return self.browser.run(
            "return document.querySelector(arguments[0])?.querySelector(`[data-field='${arguments[1]}']`)?.textContent",
            within, name,
        )  # fmt: skip

    def number(self, name: str) -> int:
        return int(self.field(name).replace("\u202f", ""))

    def workers(self) -> list[str]:
        return self.browser.run("return [...document.querySelectorAll('.worker')].map((one) => one.dataset.worker)")

    def loras(self) -> list[str]:
        return self.browser.run("return [...document.querySelectorAll('tr[data-lora]')].map((row) => row.dataset.lora)")

    def press(self, button: str, row: str = "") -> None:
        """Click a button by its text; in a LoRA's row."""
        self.browser.run(
            """const place = arguments[1] ? [...document.querySelectorAll("tr[data-lora]")].find(
                 (row) => row.dataset.lora === arguments[1]) : document.querySelector(".luna");
               [...place.querySelectorAll("button")].find((one) => one.textContent === arguments[0]).click();""",
            button, row,
        )  # fmt: skip

    def give_token(self, token: str) -> None:
        """Into the dialog that has asked for it, with the keyboard."""
        self.browser.wait(lambda: self.browser.run("return document.activeElement.name") == "token", 3, "the dialog")
        self.browser.press(token, "\ue007")

    def toasts(self) -> str:
        return self.browser.run("return document.querySelector('.toasts').textContent")

    def quiet(self) -> None:
        """Nothing was wrong on the console."""
        assert self.browser.errors() == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def daemon(browser: Browser, start_module_daemon: Any) -> Any:
    """Small, and quick to scale."""
    return start_module_daemon(toml=DEMO_TOML, cpu_threads=1, scale_up_delay_sec=0.2, queue_threshold=1)


@pytest.fixture
def page(browser: Browser, daemon: Any) -> Page:
    return Page(browser, daemon)


@contextlib.contextmanager
def load(daemon: Any, clients: int = 4) -> Iterator[None]:
    """Clients that decode and encode without a pause, each a size of its own, so that nothing is joined."""
    import torch

    stop = threading.Event()
    errors: list[BaseException] = []
    model = m.ModelRef("vae", "demo")

    def work(number: int) -> None:
        client = daemon.client(name=f"client {number}")
        try:
            while not stop.is_set():
                client.call(m.VaeDecode(model), [torch.zeros(1, 16, 8 + 4 * number, 8)])
                client.call(m.VaeEncode(model), [torch.zeros(1, 64, 64 + 8 * number, 3)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not errors


def fill_loras(daemon: Any) -> None:
    import torch

    client = daemon.client(name="loras")
    for hits, (name, rows) in enumerate(LORAS.items()):
        client.lora_cache_put(name, {"weight": torch.zeros(rows, 1000)})
        for _ in range(hits):
            client.lora_cache_get(name)


def done(info: dict[str, Any]) -> int:
    return sum(n for op, n in info["requests"].items() if op.startswith(WORK))


def test_an_idle_daemon_is_shown_honestly(page):
    """No workers, no LoRAs, no GPU: words instead of empty boxes."""
    page.open()
    text = page.browser.run("return document.querySelector('main').innerText")
    assert "No workers yet: they start at the first request" in text
    assert "None in RAM yet" in text and "Nothing is loaded" in text
    assert ("No GPU" in text) == (not page.info()["gpus"])
    marks = "return [...document.querySelector('.ticks').children].map((mark) => mark.textContent)"
    assert page.browser.run(marks) == ["0.5", "1"], "a throughput of 0 has a readable scale"
    assert page.browser.run("return document.querySelectorAll('[data-field=gpus] li').length") == len(
        page.info()["gpus"]
    )
    page.browser.shot("empty")
    page.quiet()


def test_a_second_worker_is_seen_within_two_seconds(page):
    """Under load a worker is added, and the page shows it while it starts."""
    page.open()
    with load(page.daemon):
        page.daemon.wait_for(lambda info: len(info["workers"]) == 2, 60)
        since = time.monotonic()
        page.browser.wait(lambda: page.workers() == ["1", "2"], 4, "the second worker on the page")
        assert time.monotonic() - since < 2
    page.quiet()


def test_figures_are_the_daemons(page):
    """Under load they lie between two answers of ``/api/info``; at rest they are equal."""
    fill_loras(page.daemon)
    page.open()
    with load(page.daemon):
        page.browser.wait(lambda: page.field("throughput") not in ("0", "–"), 20, "a throughput")
        for _ in range(5):
            before = done(page.info())
            shown = page.number("requests")
            assert before - 200 <= shown <= done(page.info()), "not older than the last status"
            time.sleep(0.3)
        page.browser.wait(lambda: page.browser.run("return document.querySelectorAll('path.line').length") >= 4, 5)
        page.browser.shot("dark-load")
    page.browser.wait(lambda: page.info()["in_flight"] == 0, 20)
    page.browser.wait(lambda: page.number("requests") == done(page.info()), 20, "the last status")
    info = page.info()
    assert page.number("requests") == done(info)
    assert page.number("in_flight") == 0 and page.number("queue") == info["queue"]["waiting"]
    assert page.number("clients") == len(info["clients"]) and page.number("fallbacks") == info["fallbacks"]
    for worker in info["workers"]:
        card = f".worker[data-worker='{worker['number']}']"
        plural = "" if worker["requests"] == 1 else "s"
        assert page.field("requests", card) == f"{worker['requests']} request{plural}"
        assert page.field("state", card) == worker["state"] and page.field("device", card) == worker["device"]
        assert ("luna_demo_vae" in page.field("models", card)) == bool(worker["models"])
    for op in ("vae.decode", "vae.encode"):
        row = page.browser.run(
            f"return [...document.querySelector('tr[data-op=\"{op}\"]').cells].map((c) => c.innerText)"
        )
        assert row[:2] == [op, str(info["latency"][op]["count"])]
        assert row[2] == page.browser.run(
            "return (await import('/web/luna/format.js')).duration(arguments[0])", info["latency"][op]["p50_ms"]
        )
    assert sorted(page.loras()) == sorted(info["caches"]["lora"]["loras"])
    assert page.browser.run("return document.querySelectorAll('.luna b b, th b').length") == 0, "a name became markup"
    page.quiet()


def test_pin_and_evict_need_the_token(page):
    """Reading does not. A wrong token is refused by the daemon, and asked for again."""
    fill_loras(page.daemon)
    page.open()
    name = "detail-tweaker.safetensors"

    def pinned():
        return page.info()["caches"]["lora"]["loras"][name]["pinned"]

    page.browser.wait(lambda: name in page.loras(), 5)
    page.press("Pin", name)
    page.browser.wait(lambda: page.browser.run("return document.querySelector('dialog')"), 3)
    page.browser.shot("token", whole=False)
    assert page.browser.faint("dialog *") == []
    page.browser.press("\ue00c")
    page.browser.wait(lambda: not page.browser.run("return document.querySelector('dialog')"), 3)
    assert not pinned() and page.toasts() == ""

    page.press("Pin", name)
    page.give_token("a-guess")
    page.browser.wait(lambda: "token is wrong" in page.toasts(), 3, "the refusal")
    assert not pinned() and page.browser.run("return sessionStorage.length") == 0

    page.press("Pin", name)
    page.give_token(find_token(page.daemon.port, page.daemon.runtime_dir, {}))
    page.browser.wait(pinned, 3, "pinned")
    page.browser.wait(lambda: "Pinned" in page.browser.run("return document.querySelector('.loras').innerText"), 3)
    page.press("Evict", name)
    page.browser.wait(lambda: name not in page.info()["caches"]["lora"]["loras"], 3, "evicted")
    page.browser.wait(lambda: name not in page.loras(), 3, "its row is gone")
    assert "401" in "".join(page.browser.errors()), "only the refusal is on the console"


def test_a_model_is_warmed_and_unloaded(page):
    """With the buttons; unloading for everybody asks once more."""
    page.open()
    page.press("Warm")
    page.give_token(find_token(page.daemon.port, page.daemon.runtime_dir, {}))
    page.browser.wait(lambda: "demo (VAE) is loaded" in page.toasts(), 30, "the model is loaded")
    page.browser.wait(
        lambda: "luna_demo_vae" in page.browser.run("return document.querySelector('.loaded').innerText"), 3
    )
    page.press("Unload all")
    assert page.info()["models"]["loaded"]
    page.press("Unload for everybody?")
    page.browser.wait(lambda: not page.info()["models"]["loaded"], 5, "unloaded")
    page.quiet()


def test_everything_can_be_done_with_the_keyboard(page):
    """Tab goes through all that can be used, each with a visible ring; Enter sorts."""
    fill_loras(page.daemon)
    page.open()
    page.browser.wait(lambda: len(page.loras()) == len(LORAS), 5)
    focused = """const one = document.activeElement, style = getComputedStyle(one);
      return [one.ariaLabel ?? one.textContent, one.matches(":focus-visible") && style.outlineStyle !== "none"
        && parseFloat(style.outlineWidth) >= 2];"""
    seen = []
    for _ in range(60):
        page.browser.press("\ue004")
        name, ringed = page.browser.run(focused)
        if (seen and name == seen[0]) or not name or name.startswith("\n"):
            break
        assert ringed, name
        seen.append(name)
    reachable = page.browser.run(
        "return [...document.querySelectorAll('.luna :is(button, select)')].filter((one) => one.checkVisibility())"
        ".map((one) => one.ariaLabel ?? one.textContent)"
    )
    assert seen == reachable

    page.browser.run("document.querySelector('[data-column=name] .sort').focus()")
    page.browser.press("\ue007")
    assert page.loras() == sorted(LORAS, key=lambda name: name.split("/")[-1])
    assert page.browser.run("return document.querySelector('[data-column=name]').ariaSort") == "ascending"
    page.browser.press("\ue007")
    assert page.loras() == sorted(LORAS, key=lambda name: name.split("/")[-1], reverse=True)
    page.browser.run(
        """window.changes = 0;
           const seen = new MutationObserver(() => { window.changes += 1; });
           seen.observe(document.querySelector('.luna'), { subtree: true, childList: true, characterData: true });"""
    )
    page.browser.wait(lambda: page.browser.run("return window.changes") >= 2, 20, "two further statuses")
    assert page.browser.run("return document.activeElement.textContent") == "LoRA", "a status moved the focus"
    page.quiet()


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("width", [1280, 320])
def test_it_can_be_read(page, theme, width):
    """Contrast of all text is 4.5 at least, in both themes; at 320 pixels nothing has to be scrolled sideways."""
    fill_loras(page.daemon)
    page.open(theme, width)
    with load(page.daemon, clients=2):
        page.browser.wait(lambda: page.browser.run("return document.querySelectorAll('path.line').length") >= 4, 20)
        page.browser.wait(lambda: len(page.loras()) == len(LORAS), 20)
        page.browser.shot(f"{theme}-{width}")
        assert page.browser.faint(".luna *") == []
    assert page.browser.run("return document.documentElement.scrollWidth") <= width
    cut = "return [...document.querySelectorAll('.card *')].filter((one) => one.checkVisibility() && "
    cut += f"one.getBoundingClientRect().right > {width} + 0.5).map((one) => one.outerHTML.slice(0, 80))"
    assert page.browser.run(cut) == []
    page.quiet()


def test_memory_of_gpus_is_drawn(page):
    """With a status as a machine with two cards would send it."""
    page.open()
    info = page.info()
    info["gpus"] = [
        {"index": 0, "name": "RTX 4090", "uuid": "GPU-a", "total": 24 << 30, "used": 9 << 30, "free": 15 << 30},
        {"index": 1, "name": "RTX 3060", "uuid": "GPU-b", "total": 12 << 30, "used": 23 << 29, "free": 1 << 29},
    ]
    info["workers"] = [
        {"number": 4, "device": "cuda:0", "state": "idle", "models": {"clip:t5xxl:0a": 9 << 30}, "rss": 2 << 30,
         "requests": 1, "last_error": "out of memory: 2 GB more were asked for"},
    ]  # fmt: skip
    page.browser.run(
        """const { mount } = await import("/web/luna/app.js");
           document.getElementById("luna").replaceChildren();
           const { root, store } = mount(document.getElementById("luna"), { call: async () => null });
           root.dataset.theme = "dark";
           store.receive({ v: 1, type: "status", data: arguments[0] });
           store.receive({ v: 2, type: "of a later version", data: {} });""",
        info,
    )
    page.browser.wait(lambda: page.browser.run("return document.styleSheets.length") >= 2, 3)
    read = (
        "return [...document.querySelectorAll('[data-field=gpus] .meter')].map((one) => [one.ariaLabel,"
        " one.ariaValueText, Math.round(100 * one.firstChild.offsetWidth / one.offsetWidth), one.dataset.tone ?? ''])"
    )
    drawn = [["GPU 0", "9.0 GB of 24.0 GB", 38, ""], ["GPU 1", "11.5 GB of 12.0 GB", 96, "bad"]]
    page.browser.wait(lambda: page.browser.run(read) == drawn, 20, "the meters at their ends")
    page.browser.shot("gpus")
    assert page.field("last_error") == "out of memory: 2 GB more were asked for"
    page.quiet()


def test_a_daemon_that_goes_and_comes_back_is_seen(browser, start_daemon):
    """The page says that it is away, keeps what was known, and finds the next daemon by itself."""
    first = start_daemon(toml=DEMO_TOML, cpu_threads=1)
    page = Page(browser, first).open()
    browser.allowed_errors = ("ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "net::ERR_EMPTY_RESPONSE")
    try:
        first.stop()
        browser.wait(lambda: page.field("status") == "away", 8, "the page says that it is away")
        assert "The daemon is away" in browser.run("return document.querySelector('.absence').innerText")
        assert browser.run("return document.querySelector('main').inert")
        browser.shot("away")
        second = start_daemon(toml=DEMO_TOML, cpu_threads=1, port=first.port, ws_port=first.ws_port)
        browser.wait(lambda: page.field("status") == "running", 15, "the page has found it again")
        assert f"process {second.process.pid}" in page.field("facts")
        assert not browser.run("return document.querySelector('main').inert")
        second.client().call(m.Drain())
        browser.wait(lambda: page.field("status") == "draining", 3, "draining is shown")
        browser.shot("draining", whole=False)
        page.quiet()
    finally:
        browser.allowed_errors = ()
