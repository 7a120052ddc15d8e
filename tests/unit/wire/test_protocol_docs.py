"""``docs/protocol.md`` is complete: whoever writes a client in another language finds everything in it."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import msgspec
import pytest

from luna_daemon import core
from luna_daemon.core import LunaError
from luna_daemon.wire import messages as m
from luna_daemon.wire.codec import ITEM_SIZES
from luna_daemon.wire.frame import MAGIC, PREFIX_SIZE

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "protocol.md").read_text("utf-8")
WORKERS_ONLY = {m.WorkerReady, m.WorkerStatus, m.Job, m.Unload}
CALLS = typing.get_args(m.Call)
MESSAGES = typing.get_args(m.Message)


def tag(kind: type) -> str:
    """The op of a call, the type of a message."""
    return str(kind.__struct_config__.tag)


def errors(root: type[LunaError] = LunaError) -> list[type[LunaError]]:
    """Every class of the tree."""
    children = [child for child in root.__subclasses__() if child.__module__ == core.__name__]
    return [root, *(error for child in children for error in errors(child))]


def row(heading: str, first: str) -> str:
    """The table's line below ``heading`` that begins with this name."""
    part = TEXT.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|") and f"`{first}`" in line.split("|")[1]]
    assert len(lines) == 1, f"docs/protocol.md, {heading}: {len(lines)} lines for {first!r}"
    return lines[0]


@pytest.mark.parametrize("call", CALLS, ids=tag)
def test_every_op_and_its_fields(call):
    """Each op has one line, which names every field and the default of those that have one."""
    line = row("Ops", tag(call))
    for field in msgspec.structs.fields(call):
        assert f"`{field.name}`" in line, f"{tag(call)} does not name {field.name}"


@pytest.mark.parametrize("message", [kind for kind in MESSAGES if kind not in WORKERS_ONLY], ids=tag)
def test_every_message_and_its_fields(message):
    """Each message of a client's connection has one line with its fields; the greeting has tables of its own."""
    line = row("Messages", tag(message))
    for field in msgspec.structs.fields(message):
        assert f"`{field.name}`" in (TEXT if message in (m.Hello, m.Welcome) else line), field.name


@pytest.mark.parametrize("message", sorted(WORKERS_ONLY, key=tag), ids=tag)
def test_messages_of_workers_are_set_apart(message):
    """They are named, so that nobody wonders what they are."""
    assert f"`{tag(message)}`" in TEXT


@pytest.mark.parametrize("error", errors(), ids=lambda error: error.code)
def test_every_error_and_whether_the_local_model_helps(error):
    """Each code has one line, whose last column agrees with ``local_ok``."""
    line = row("Errors", error.code)
    assert line.rstrip().endswith("| yes |") == error.local_ok


@pytest.mark.parametrize("kind", [m.Limits, m.ArenaInfo, m.ModelRef, m.FileId, m.Tiling, m.TensorRef])
def test_every_field_of_the_parts(kind):
    """Limits, models, files, tiles and descriptors are explained field by field."""
    assert [field for field in kind.__struct_fields__ if f"`{field}`" not in TEXT] == []


def test_the_descriptor_is_an_array_in_this_order():
    """The line that shows it has the fields in the order of the wire."""
    (line,) = re.findall(r"^\[(dtype, .*)\]$", TEXT, re.MULTILINE)
    assert [part.split(" = ")[0] for part in re.split(r", (?![^\[]*\])", line)] == list(m.TensorRef.__struct_fields__)


def test_the_numbers():
    """Magic, prefix, dtypes and protocol version are those of the code."""
    assert f'"{MAGIC.decode()}"' in TEXT and f"LDP/{core.PROTOCOL_VERSION}" in TEXT and f" {PREFIX_SIZE} " in TEXT
    assert [name for name in ITEM_SIZES if f"`{name}`" not in TEXT] == []


def test_no_op_is_invented():
    """Every line of the table of ops is an op of the code."""
    part = TEXT.split("\n## Ops\n", 1)[1].split("\n## ", 1)[0].split("| `op` |", 1)[1]
    named = set(re.findall(r"^\| `([a-z.]+)` \|", part, re.MULTILINE))
    assert named == {tag(call) for call in CALLS}
