"""Report of the soak: its course, the clients' logs, and whether each bar is met."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from soak_stage import Stage

__all__ = ["Course", "Measured", "judge", "read_logs", "table"]


@dataclass
class Measured:
    """What was seen of the control process and its files."""

    rss: int
    files: int
    arena: int
    open: list[str]


@dataclass
class Course:
    """How it went."""

    calm: tuple[float, float] = (0.0, 0.0)
    rough: tuple[float, float] = (0.0, 0.0)
    windows: list[tuple[str, float, float]] = field(default_factory=list)
    before: Measured | None = None
    minute: Measured | None = None
    after: Measured | None = None
    exit_code: int = -1
    left_over: list[str] = field(default_factory=list)


def read_logs(stage: Stage) -> list[dict[str, Any]]:
    """Every request that began, with its end if it had one."""
    requests: dict[tuple[int, int], dict[str, Any]] = {}
    for path in stage.folder.glob("client-*.jsonl"):
        number = int(path.stem.split("-")[1])
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # the last line of a client that was killed
                entry = json.loads(line)
                requests[number, entry["n"]] = {"client": number, **entry}
    return list(requests.values())


def judge(course: Course, requests: list[dict[str, Any]], killed: set[int]) -> dict[str, Any]:
    """The figures and whether each bar is met."""
    ended = [request for request in requests if "end" in request]
    wrong = [request for request in ended if request["is"].startswith(("wrong", "untyped"))]
    last = {}
    for request in requests:
        last[request["client"]] = max(last.get(request["client"], 0), request["n"])
    lost = [
        request for request in requests
        if "end" not in request and not (request["client"] in killed and request["n"] == last[request["client"]])
    ]  # fmt: skip
    rough = [request for request in ended if course.rough[0] <= request["t"] <= course.rough[1]]
    outside = [request for request in rough if not in_window(request, course.windows)]
    right = sum(request["is"] == "right" for request in outside)
    calm_rate, rough_rate = rate(ended, *course.calm), rate(ended, *course.rough)
    before, minute, after = course.before, course.minute, course.after
    assert before is not None and minute is not None and after is not None
    errors = Counter(request["is"] for request in ended if request["is"] not in ("right",) and request not in wrong)
    bars = [
        bar("wrong answers", len(wrong), len(wrong) == 0, "0"),
        bar("lost requests", len(lost), len(lost) == 0, "0"),
        bar("right outside fault windows", f"{right / max(1, len(outside)):.2%}", right >= 0.95 * len(outside), "95 %"),
        bar("right per second, with faults over without", f"{rough_rate:.1f} / {calm_rate:.1f}",
            rough_rate >= calm_rate / 2, "half"),
        bar("memory of the control process, end over minute 1", f"{after.rss >> 20} / {minute.rss >> 20} MB",
            after.rss <= 1.05 * minute.rss, "+5 %"),
        bar("open files, end and start", f"{after.files} / {before.files}", after.files <= before.files, "no more"),
        bar("shared memory in use, end and start", f"{after.arena} / {before.arena}", after.arena <= before.arena,
            "no more"),
        bar("left over after the stop", ", ".join(course.left_over) or "nothing", not course.left_over, "nothing"),
        bar("exit code", course.exit_code, course.exit_code == 0, "0"),
    ]  # fmt: skip
    return {
        "requests": len(requests), "right": sum(request["is"] == "right" for request in ended),
        "by_op": dict(Counter(request["op"] for request in ended)), "errors": dict(errors),
        "open_files": {"before": before.open, "after": after.open},
        "faults": dict(Counter(name for name, *_ in course.windows)), "bars": bars,
        "wrong": [request["is"] for request in wrong[:10]],
    }  # fmt: skip


def bar(what: str, value: Any, met: bool, limit: str) -> dict[str, Any]:
    return {"what": what, "value": value, "met": met, "bar": limit}


def in_window(request: dict[str, Any], windows: list[tuple[str, float, float]]) -> bool:
    return any(request["t"] <= end and request["end"] >= start for _, start, end in windows)


def rate(ended: list[dict[str, Any]], start: float, end: float) -> float:
    """Right answers per second."""
    return sum(request["is"] == "right" and start <= request["end"] <= end for request in ended) / max(1.0, end - start)


def table(report: dict[str, Any], title: str, private: bool) -> Table:
    shown = Table(title=title, show_header=False)
    shown.add_row("requests", f"{report['requests']}: " + listing(report["by_op"]), "", "")
    shown.add_row("right", str(report["right"]), "", "")
    shown.add_row("faults", listing(report["faults"]) + ("" if private else "; no tmpfs to fill"), "", "")
    shown.add_row("typed errors", listing(report["errors"]) or "none", "", "")
    shown.add_section()
    for row in report["bars"]:
        shown.add_row(row["what"], str(row["value"]), row["bar"], "met" if row["met"] else "MISSED")
    for text in report["wrong"]:
        shown.add_row("wrong", text, "", "")
    return shown


def listing(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(counts.items()))
