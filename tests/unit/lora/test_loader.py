"""What the loader decides: to map or to copy, to keep or not, once for all who wait, and what a failure leaves."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from luna_daemon.config import load_settings
from luna_daemon.core import LimitExceeded, ModelLoadError
from luna_daemon.lora import loader as loader_module
from luna_daemon.lora.convert import Refused, convert
from luna_daemon.lora.loader import LoRALoader
from luna_daemon.lora_cache import LoRACache
from luna_daemon.wire.shared_memory import SharedMemory


@pytest.fixture
def folder(tmp_path) -> Path:
    """A LoRA folder with a file of 4 KB."""
    made = tmp_path / "loras"
    made.mkdir()
    save_file({"up": torch.ones(32, 32)}, made / "ink.safetensors")
    return made


def loading(folder: Path, max_bytes: int = 1 << 20, max_copy: int = 1 << 20, **settings: Any) -> LoRALoader:
    """A loader of the LoRAs below a folder, without shared memory."""
    chosen = load_settings({"model_dirs": [folder.parent], **settings}, {})
    return LoRALoader(chosen, LoRACache(max_bytes, 10), SharedMemory(None, "off"), max_copy)


def use(loader: LoRALoader, *uses: dict[str, Any]) -> list[Any]:
    """Several uses of ``ink.safetensors`` at once; their entries, or what was raised."""

    async def main() -> list[Any]:
        calls = [loader.use("ink.safetensors", number, **use) for number, use in enumerate(uses, 1)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            if not isinstance(result, BaseException):
                result[1].release()
        loader._threads.shutdown()
        return [result if isinstance(result, BaseException) else result[0] for result in results]

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("lora_copy", "network", "asked", "kind"),
    [
        ("auto", False, False, "file"),
        ("auto", True, False, "arena"),
        ("auto", False, True, "arena"),
        ("never", True, False, "file"),
        ("never", False, True, "arena"),
        ("always", False, False, "arena"),
    ],
)
def test_to_map_or_to_copy(folder, monkeypatch, lora_copy, network, asked, kind):
    """A client that cannot map the file gets a copy, whatever the setting; a copy holds the bytes of the file."""
    monkeypatch.setattr(loader_module, "is_on_network", lambda path: network)
    (entry,) = use(loading(folder, lora_copy=lora_copy), {"copy": asked})
    assert entry.kind == kind
    if kind == "arena":
        ((key, ref),) = entry.refs
        data = bytes(entry.slots[0].view[ref.offset : ref.offset + ref.nbytes])
        assert key == "up" and data == torch.ones(32, 32).numpy().tobytes()


def test_once_for_all_who_wait(folder, monkeypatch):
    """Those who come while it is read share the entry, and count as hits."""
    reads = []
    monkeypatch.setattr(loader_module, "read_through", lambda *a: reads.append(a))
    loader = loading(folder)
    first, *others = use(loader, {}, {}, {})
    assert all(other is first for other in others) and len(reads) == 1
    assert (loader.cache.misses, loader.cache.hits, first.clients) == (1, 2, {})


def test_what_finds_no_room_is_used_and_not_kept(folder):
    """The client gets it, the cache counts it, and its memory goes with its user."""
    loader = loading(folder, max_bytes=100, lora_copy="always")
    (entry,) = use(loader, {})
    assert len(loader.cache) == 0 and loader.cache.uncached == 1
    assert entry._uses == 0


def test_a_file_that_changed_is_loaded_again(folder):
    """By its time, size or inode; the old entry is dropped."""
    loader = loading(folder)
    (old,) = use(loader, {})
    save_file({"up": torch.zeros(32, 32), "down": torch.ones(1)}, folder / "ink.safetensors")
    loader = loading(folder)
    loader.cache.keep(old)
    (new,) = use(loader, {})
    assert new is not old and len(new.refs) == 2 and len(loader.cache) == 1


@pytest.mark.parametrize("failure", ["broken", "disk", "large"])
def test_failures_reach_everybody_who_waits(folder, monkeypatch, failure):
    """As typed errors that name the LoRA; nothing is kept, and the next request tries again."""
    loader = loading(folder, max_copy=100 if failure == "large" else 1 << 20, lora_copy="always")
    if failure == "broken":
        (folder / "ink.safetensors").write_bytes(b"\xff" * 64)
    if failure == "disk":
        monkeypatch.setattr(loader_module, "read_through", _bad_disk)
    errors = use(loader, {}, {})
    kind = LimitExceeded if failure == "large" else ModelLoadError
    assert all(isinstance(error, kind) and "ink.safetensors" in str(error) for error in errors)
    assert len(loader.cache) == 0 and not loader._pending


def _bad_disk(*_: Any) -> None:
    raise OSError(5, "Input/output error")


def test_a_file_is_opened_beside_the_event_loop(folder, monkeypatch):
    """A network disk that does not answer holds up one thread, and no other client."""
    threads = []
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda *a, **k: (threads.append(threading.current_thread()), opened(*a, **k))[1])
    (entry,) = use(loading(folder, lora_copy="always"), {})
    assert entry.kind == "arena" and threads and threading.main_thread() not in threads


def test_a_converter_error_without_text_is_named_by_its_class(tmp_path, monkeypatch):
    """Some errors of torch have no message."""
    monkeypatch.setattr(torch, "load", lambda *a, **k: (_ for _ in ()).throw(AssertionError))
    with pytest.raises(Refused, match="AssertionError"):
        convert(tmp_path / "a.pt", tmp_path / "b", 100)
