"""Loads LoRAs into the cache: finds, checks, reads or converts each file once for all clients that wait."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..config import Settings
from ..core import InternalError, LimitExceeded, LunaError, ModelLoadError, logger
from ..files.identity import same_file
from ..files.safetensors import NamedRef, is_on_network, read_header, read_through
from ..lora_cache import LoRACache, LoRAEntry
from ..wire.arena import Slot
from ..wire.codec import ITEM_SIZES
from ..wire.shared_memory import SharedMemory
from .folders import FoundLoRA, LoRAFolders

T = TypeVar("T")
_THREADS = 4
"""Number of threads that read files, and of threads that look up names."""
_CONVERT_S = 120.0
_PAGE_CACHE_S = 60.0
_SCRIPT = Path(__file__).resolve().with_name("convert.py")


class LoRALoader:
    """Loads LoRAs into the cache.

    Args:
        memory: shared memory for copies; a copy that finds no room there is on the heap, and travels by the socket.
        max_copy: limit of the bytes of a copy.
    """

    def __init__(self, settings: Settings, cache: LoRACache, memory: SharedMemory, max_copy: int) -> None:
        self.settings = settings
        self.cache = cache
        self.memory = memory
        self.max_copy = max_copy
        self.folders = LoRAFolders(settings)
        # Not the loop's default threads: a slow disk must not hold up other work in those.
        self._threads = ThreadPoolExecutor(_THREADS, "lora")
        self._names = ThreadPoolExecutor(_THREADS, "lora-name")
        self._pending: dict[tuple[FoundLoRA, bool], list[tuple[asyncio.Future[tuple[LoRAEntry, Slot]], int]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._converting = asyncio.Lock()
        self._page_cache_at = time.monotonic()

    def apply(self, settings: Settings) -> None:
        """Use new settings; entries beyond the new limits are evicted when the next LoRA needs room."""
        self.settings = settings
        self.folders = LoRAFolders(settings)
        self.cache.max_bytes = int(settings.lora_cache_gb * (1 << 30))
        self.cache.max_entries = settings.lora_cache_entries

    async def use(self, name: str, client: int = 0, file: Any = None, copy: bool = False) -> tuple[LoRAEntry, Slot]:
        """Load a LoRA, unless the cache has it.

        Args:
            client: number of the session; 0 for the daemon itself.
            file: identity of the client's own file, if the client has one.
            copy: whether the bytes must be in the daemon's memory, since the client cannot map the file.

        Returns:
            The entry, and a slot whose release ends the use of the entry.

        Raises:
            BadRequest, ModelNotFound, ModelMismatchError: see ``LoRAFolders.find``.
            ModelLoadError: the file cannot be read or is not valid.
            LimitExceeded: a copy would be larger than ``max_copy``.
        """
        put = self.cache.look(name)
        if put is not None and put.kind == "put":
            self.cache.get(name)
            return put, put.hold(client)
        found = await asyncio.get_running_loop().run_in_executor(self._names, self.folders.find, name, file)
        entry = self.cache.look(found.name, found.source)
        if entry is not None and not (copy and entry.kind == "file"):
            self.cache.get(found.name)
            return entry, entry.hold(client)
        return await self._join(found, copy, client)

    async def _join(self, found: FoundLoRA, copy: bool, client: int) -> tuple[LoRAEntry, Slot]:
        """Wait until the file is loaded: join a running load, or start one."""
        waiter: tuple[asyncio.Future[tuple[LoRAEntry, Slot]], int]
        waiter = (asyncio.get_running_loop().create_future(), client)
        waiting = self._pending.get((found, copy))
        self.cache.count(found.name, hit=waiting is not None)
        if waiting is not None:
            waiting.append(waiter)
        else:
            self._pending[found, copy] = [waiter]
            task = asyncio.get_running_loop().create_task(self._load(found, copy))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            return await waiter[0]
        except asyncio.CancelledError:
            if waiter[0].done() and not waiter[0].cancelled() and waiter[0].exception() is None:
                waiter[0].result()[1].release()
            raise

    async def _load(self, found: FoundLoRA, copy: bool) -> None:
        """Read a file, keep the LoRA if the cache has room, and give it to all waiting clients."""
        entry, error = None, None
        try:
            entry = await self._read(found, copy)
        except LunaError as refusal:
            error = refusal
        except OSError as refusal:
            error = ModelLoadError(f"LoRA {found.name!r}: {refusal.strerror or refusal}", "Check the disk")
        except Exception as bug:
            logger.exception("LoRA %s could not be loaded", found.name)
            error = InternalError.of(bug)
        waiting = self._pending.pop((found, copy))
        kept = entry is not None and self.cache.keep(entry)
        for future, client in waiting:
            if future.done():
                continue
            if entry is not None:
                future.set_result((entry, entry.hold(client)))
            elif error is not None:
                future.set_exception(error)
        if entry is not None and not kept:
            self.cache.uncached += 1
            entry.drop()

    async def _read(self, found: FoundLoRA, copy: bool) -> LoRAEntry:
        began = time.monotonic()
        if found.is_safetensors and not await self._in_thread(self._must_copy, found, copy):
            fits = found.source.size <= self.cache.max_bytes
            refs = await self._in_thread(_check_and_warm, found, fits)
            return LoRAEntry(
                found.name, "file", refs, found.source.size, source=found.source, load_s=time.monotonic() - began
            )
        if found.is_safetensors:
            refs, slot = await self._image(found, found.path)
        else:
            refs, slot = await self._converted(found)
        return LoRAEntry(found.name, "arena", refs, slot.nbytes, [slot], found.source, time.monotonic() - began)

    def _must_copy(self, found: FoundLoRA, asked: bool) -> bool:
        wanted = self.settings.lora_copy
        return asked or wanted == "always" or (wanted == "auto" and is_on_network(found.path))

    async def _image(self, found: FoundLoRA, path: Path) -> tuple[list[NamedRef], Slot]:
        """Copy the tensors of a safetensors file into shared memory, or onto the heap."""
        with await self._in_thread(path.open, "rb") as file:  # a network disk may hang here
            status = os.fstat(file.fileno())
            if path == found.path:
                _check_unchanged(found, status)
            size = status.st_size
            refs = await self._in_thread(_refs, file, size, found.name)
            start = file.tell()
            self._check_copy(found, size - start)
            slot = await self.memory.allocate(size - start) or Slot.on_heap(size - start)
            try:
                await self._in_thread(read_through, file, slot.view, size - start, start)
            except BaseException:
                slot.release()
                raise
        return [(key, ref.placed(ref.offset - start)) for key, ref in refs], slot

    def _check_copy(self, found: FoundLoRA, nbytes: int) -> None:
        if nbytes > self.max_copy:
            raise LimitExceeded(
                f"LoRA {found.name!r} has {nbytes} bytes; the limit of a copy is {self.max_copy}", "Raise max_tensor_mb"
            )

    # --- torch's own formats ---

    async def _converted(self, found: FoundLoRA) -> tuple[list[NamedRef], Slot]:
        """Convert a file in one of torch's own formats in another process, and copy its tensors."""
        self._check_copy(found, found.source.size)
        folder = self.memory.arena.folder if self.memory.arena is not None else None
        async with self._converting:
            with tempfile.TemporaryDirectory(prefix="lora-", dir=folder) as place:
                target = Path(place) / "converted.safetensors"
                await self._run_converter(found, target)
                return await self._image(found, target)

    async def _run_converter(self, found: FoundLoRA, target: Path) -> None:
        python = str(self.settings.comfyui_python or sys.executable)
        process = await asyncio.create_subprocess_exec(
            python, str(_SCRIPT), str(found.path), str(target), str(self.max_copy),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )  # fmt: skip
        try:
            _, stderr = await asyncio.wait_for(process.communicate(), _CONVERT_S)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise ModelLoadError(
                f"LoRA {found.name!r} could not be converted within {_CONVERT_S:.0f} s", "Save it as .safetensors"
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            lines = stderr.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
            raise ModelLoadError(f"LoRA {found.name!r} cannot be converted: {lines[-1]}", "Save it as .safetensors")

    # --- threads ---

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def keep_cached(self) -> None:
        """Ask the system once a minute to keep the files of the cache in the page cache, where posix_fadvise exists."""
        if hasattr(os, "posix_fadvise") and time.monotonic() - self._page_cache_at > _PAGE_CACHE_S:
            self._page_cache_at = time.monotonic()
            paths = [entry.source.path for entry in self.cache.entries() if entry.kind == "file" and entry.source]
            self._threads.submit(_rewarm, paths)

    def close(self) -> None:
        """Cancel running loads, and empty the cache."""
        for task in self._tasks:
            task.cancel()
        for threads in (self._threads, self._names):
            threads.shutdown(wait=False, cancel_futures=True)
        self.cache.clear()


def _check_and_warm(found: FoundLoRA, warm: bool) -> list[NamedRef]:
    """Check the header; if ``warm``, read the whole file, so that a read error occurs here and not in a client."""
    with found.path.open("rb") as file:
        _check_unchanged(found, os.fstat(file.fileno()))
        refs = _refs(file, found.source.size, found.name)
        if warm:
            read_through(file, None, found.source.size)
    return refs


def _refs(file: BinaryIO, size: int, name: str) -> list[NamedRef]:
    """The tensors of an open safetensors file, in the order of their bytes."""
    refs = list(read_header(file, size, f"LoRA {name!r}").tensors.items())
    for key, ref in refs:
        if ref.dtype not in ITEM_SIZES:
            raise ModelLoadError(f"LoRA {name!r}: tensor {key!r} has dtype {ref.dtype}", "Save it in another dtype")
    return refs


def _check_unchanged(found: FoundLoRA, status: os.stat_result) -> None:
    if not same_file(status, found.source.size, found.source.mtime_ns, found.source.inode):
        raise ModelLoadError(f"LoRA {found.name!r} has just been changed", "Try again once the file is complete")


def _rewarm(paths: list[str]) -> None:
    for path in paths:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError:
            continue
        finally:
            os.close(file)
