"""What watchers are sent: bounded by time and number; slow readers are dropped, never waited for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from luna_daemon.status import watchers as watchers_module
from luna_daemon.status.watchers import Watchers, _type_of


class Reader:
    """A watcher that keeps what it is sent, and takes only so much."""

    remote = "test"

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.texts: list[dict[str, Any]] = []
        self.dropped = False

    def send(self, text: str) -> bool:
        if len(self.texts) >= self.room:
            return False
        self.texts.append(json.loads(text))
        return True

    def drop(self) -> None:
        self.dropped = True


def watching(*readers: Reader) -> Watchers:
    """Watchers with these readers; a status counts how often it was made."""
    made: list[int] = []
    watchers = Watchers(lambda: {"made": made.append(1) or len(made)}, 10)
    watchers._open.update(readers)  # type: ignore[arg-type]
    return watchers


def test_nothing_is_kept_while_nobody_watches():
    """What happens then is not sent later."""
    watchers, reader = watching(), Reader()
    watchers.on_event("request", {"op": "ping"})
    watchers._open.add(reader)  # type: ignore[arg-type]
    watchers._flush()
    assert reader.texts == []


def test_requests_are_sent_together_and_the_rest_is_counted():
    """Ten per flush, and how many were left out; then it starts again. Errors come one by one, at most ten."""
    reader = Reader()
    watchers = watching(reader)
    for number in range(13):
        watchers.on_event("request", {"op": str(number)})
        watchers.on_event("error", {"code": str(number)})
    assert reader.texts == []
    watchers._flush()
    first, *errors = reader.texts
    assert (first["v"], first["type"]) == (1, "request")
    assert [request["op"] for request in first["data"]["requests"]] == [str(number) for number in range(10)]
    assert first["data"]["left_out"] == 3
    assert [error["data"]["code"] for error in errors] == [str(number) for number in range(10)]
    watchers.on_event("request", {"op": "later"})
    watchers._flush()
    assert reader.texts[-1]["data"] == {"requests": [{"op": "later"}], "left_out": 0}


def test_other_events_are_sent_at_once():
    """Workers and models come and go too seldom to gather."""
    reader = Reader()
    watching(reader).on_event("scaling", {"event": "worker_started"})
    assert reader.texts == [{"v": 1, "type": "scaling", "data": {"event": "worker_started"}}]


def test_a_slow_reader_is_dropped_and_the_others_stay():
    """Counted, and sent nothing more."""
    slow, quick = Reader(1), Reader()
    watchers = watching(slow, quick)
    for _ in range(3):
        watchers.on_event("scaling", {})
    assert slow.dropped and not quick.dropped and len(quick.texts) == 3
    assert (watchers.dropped, len(watchers)) == (1, 1)
    watchers.close()
    assert quick.dropped


def test_a_status_is_made_once_for_all_who_ask(monkeypatch):
    """A fresh one serves everybody; an old one is made again."""
    watchers = watching()
    monkeypatch.setattr(watchers_module, "_FRESH_S", 3600.0)
    watchers._made = (-7200.0, "")
    assert watchers._status_text() == watchers._status_text() and '"made":1' in watchers._status_text()
    monkeypatch.setattr(watchers_module, "_FRESH_S", 0.0)
    assert '"made":2' in watchers._status_text()


def test_a_bug_in_the_status_does_not_end_the_reports(monkeypatch, caplog):
    """It is logged, and the next round tries again."""
    monkeypatch.setattr(watchers_module, "_FLUSH_S", 0.001)
    monkeypatch.setattr(watchers_module, "_STATUS_S", 0.001)
    monkeypatch.setattr(watchers_module, "_FRESH_S", 0.0)
    answers = iter([KeyError("a bug")])

    def status() -> dict[str, Any]:
        for error in answers:
            raise error
        return {"fine": True}

    async def main() -> None:
        reader = Reader()
        watchers = Watchers(status, 10)
        watchers._open.add(reader)  # type: ignore[arg-type]
        running = asyncio.ensure_future(watchers.run())
        for _ in range(500):
            if reader.texts:
                break
            await asyncio.sleep(0.01)
        running.cancel()
        assert reader.texts[0]["data"] == {"fine": True}

    asyncio.run(main())
    assert "a bug" in caplog.text


@pytest.mark.parametrize(
    ("text", "kind"),
    [('{"type": "get_status"}', "get_status"), ("{", ""), ("[1]", ""), ('"x"', ""), ("{}", ""), ('{"type": 3}', "3")],
)
def test_what_a_watcher_asks(text, kind):
    """Whatever is sent is read without an error."""
    assert _type_of(text) == kind
