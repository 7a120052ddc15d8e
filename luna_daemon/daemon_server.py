"""``LunaDaemon``, the control process: listens, serves and stops in order. Never imports torch."""

if __name__ == "__main__" and not __package__:
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from luna_daemon.system.script import run_as_module

    run_as_module("luna_daemon.daemon_server")

import asyncio
import importlib
import os
import secrets
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from .config import Settings, load_settings
from .control.access import Access
from .control.listening import bind, runtime_document, tls_context
from .control.service import Service
from .control.state import State
from .core import ConfigError, DaemonConnectionError, LunaError, PortInUse, logger
from .files.resolver import ModelResolver
from .system.gpu import gpu_memory
from .system.runtime import Runtime, dial_host, page_address, runtime_folder
from .system.script import run_command
from .wire.arena import Arena, ArenaUnavailable, open_arena
from .wire.shared_memory import SharedMemory
from .workers import WorkerPool

if TYPE_CHECKING:
    from .client import DaemonClient

__all__ = ["LunaDaemon"]

_MAINTENANCE_S = 5.0
_GPUS_S = 3.0
_SEND_S = 5.0
_HANDSHAKE_S = 5.0
_ACCEPT_BATCH, _BACKLOG = 64, 1024
"""Connections that asyncio accepts before it serves any of them, and those that wait in the kernel's backlog."""
_LINGER_S = 0.1
"""Time for clients to map the last results before the shared memory is removed."""


class LunaDaemon:
    """A daemon: ``start()`` runs the daemon in a process of its own, ``run()`` in this process.

    Args:
        device: sets both ``vae_device`` and ``clip_device``, as the predecessor's constructor did.
        service_type: a ``ServiceType``, its value, or the predecessor's ``vae_only`` and ``clip_only``.
        config_file: path of a ``luna.toml``.
        environ: environment variables; ``os.environ`` by default.
        settings: any field of ``Settings``: ``port=``, ``vae_device=``, ``models=`` ...

    Raises:
        ConfigError: a setting is wrong; no socket or file has been opened.

    ::

        with LunaDaemon() as daemon:      # serves until the end of the block
            ...
        LunaDaemon().start()              # keeps serving after this script has ended
    """

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        ws_port: int | None = None,
        *,
        device: str | None = None,
        clip_precision: str | None = None,
        vae_precision: str | None = None,
        service_type: Any = None,
        config_file: Path | str | None = None,
        environ: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        named = {
            "host": host, "port": port, "ws_port": ws_port, "clip_precision": clip_precision,
            "vae_precision": vae_precision, "service_type": _service_type(service_type),
            "vae_device": device, "clip_device": device, **settings,
        }  # fmt: skip
        self.overrides = {name: value for name, value in named.items() if value is not None}
        self.config_file = Path(config_file) if config_file else None
        self.environ = environ
        self.settings: Settings = load_settings(self.overrides, environ, self.config_file)
        self.port = self.settings.port
        self.ws_port = self.settings.ws_port
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state: State | None = None
        self._start_id = ""

    # --- in a process of its own ---

    def start(self, timeout_s: float = 20.0) -> "LunaDaemon":
        """Start a daemon process that serves until ``stop()``, and return once the daemon answers.

        Raises:
            PortInUse: another process listens on the port; the message names the process.
            ConfigError: the daemon refused its settings, or ended for another reason.
            DaemonConnectionError: the daemon did not answer in time.
        """
        if self.port == 0:
            raise ConfigError("start() cannot connect to port 0", "Name a port, or use run()")
        self._start_id = secrets.token_hex(8)
        log = runtime_folder(self.port, self.settings.runtime_dir).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())],
                env={**(os.environ if self.environ is None else self.environ), **self._environment()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self._process.poll() is not None:
                lines = log.read_text(errors="replace").strip().splitlines() or ["the daemon ended and printed nothing"]
                last = lines[-1].removeprefix("luna-daemon: ")
                raise PortInUse(last) if self._process.returncode == PortInUse.exit_code else ConfigError(last)
            with suppress(LunaError), self._client() as client:
                # Another daemon may answer on this port: then the started daemon ends by itself.
                if client.get_daemon_info()["start_id"] == self._start_id:
                    return self
            time.sleep(0.02)
        self.stop()
        raise DaemonConnectionError(f"the daemon did not answer within {timeout_s:g} s", f"Its log is {log}")

    def stop(self, timeout_s: float | None = None) -> None:
        """End the daemon of ``start()``, or of ``run()`` in another thread, once its requests are answered."""
        if self._stopping is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            return
        if self._process is None:
            return
        with suppress(LunaError), self._client() as client:
            if client.get_daemon_info()["start_id"] == self._start_id:
                client.shutdown()
        try:
            self._process.wait(timeout_s if timeout_s is not None else self.settings.drain_timeout_sec + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def pid(self) -> int | None:
        """Process id of the started daemon."""
        return self._process.pid if self._process is not None else None

    @property
    def exit_code(self) -> int | None:
        """Exit code of the started daemon, negative for a signal; ``None`` while it runs or before its start."""
        return self._process.poll() if self._process is not None else None

    def __enter__(self) -> "LunaDaemon":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _client(self) -> "DaemonClient":
        from .client import DaemonClient

        return DaemonClient(self.settings.host, self.port, runtime_dir=self.settings.runtime_dir, name="LunaDaemon")

    def _environment(self) -> dict[str, str]:
        """Environment variables that pass the overrides to the child; a command line could be read by other users."""
        variables = {"LUNA_START_ID": self._start_id, "LUNA_OVERRIDES": to_json(self.overrides).decode()}
        if self.config_file is not None:
            variables["LUNA_CONFIG"] = str(self.config_file.resolve())
        return variables

    # --- in this process ---

    def run(self) -> None:
        """Serve until SIGTERM, Ctrl-C, ``stop()`` or a client's shutdown; then drain.

        Raises:
            PortInUse: another process listens on the port; the message names the process.
        """
        try:
            asyncio.run(self._serve())
        finally:
            self._stopping, self._loop, self._state = None, None, None

    async def _serve(self) -> None:
        # Before anything is opened, so that a signal from here on closes everything in order.
        self._stopping, self._loop = asyncio.Event(), asyncio.get_running_loop()
        async with AsyncExitStack() as ends:  # unwound from the last to the first
            ends.callback(_catch_signals(self._stopping, self._reload))
            tls = tls_context(self.settings)
            listener = bind(self.settings)
            ends.callback(listener.close)
            self.port = listener.getsockname()[1]
            runtime = Runtime(self.port, self.settings.runtime_dir)
            runtime.open(runtime_document(self.settings, self.port))
            ends.callback(runtime.close)
            arena, why = _open_arena(self.settings, self.port)
            if arena is not None:
                ends.callback(arena.close)
            pool = WorkerPool(self.settings, runtime.folder)
            state = self._make_state(pool, SharedMemory(arena, why), runtime)
            service = Service(state)
            ends.push_async_callback(_close, service)
            server = await self._loop.create_server(
                service.connect,
                sock=listener,
                backlog=_ACCEPT_BATCH,
                ssl=tls,
                ssl_handshake_timeout=_HANDSHAKE_S if tls else None,
            )
            listener.listen(_BACKLOG)
            pool.open(*await self._workers_address(service, tls is not None, ends))
            ends.push_async_callback(lambda: pool.close(pool.settings.drain_timeout_sec))
            ends.callback(server.close)
            logger.info("Luna Daemon listens on %s:%d", self.settings.host, self.port)
            ends.callback(_watch_gpus(state))
            for task in (_maintain(service), _monitor(state, tls)):
                ends.push_async_callback(_end, asyncio.create_task(task))
            await self._stopping.wait()
            logger.info("stopping: %d requests in flight", pool.in_flight)
        logger.info("stopped")

    async def _workers_address(self, service: Service, tls: bool, ends: AsyncExitStack) -> tuple[str, int]:
        """Host and port for workers, without TLS: workers run on this machine and use one-time tokens."""
        if not tls:
            return dial_host(self.settings.host), self.port
        assert self._loop is not None
        plain = await self._loop.create_server(service.connect, "127.0.0.1", 0)
        ends.callback(plain.close)
        return "127.0.0.1", int(plain.sockets[0].getsockname()[1])

    def _make_state(self, pool: WorkerPool, memory: SharedMemory, runtime: Runtime) -> State:
        from .monitoring import collect_info

        base = self.settings.toml_path.parent if self.settings.toml_path else None
        access = Access(runtime.token, str(runtime.folder / "token"), runtime.renew)
        assert self._stopping is not None
        self._state = State(
            self.settings, pool, ModelResolver(self.settings, base), memory, access, collect_info,
            self._stopping.set, self._reload,
        )  # fmt: skip
        return self._state

    def _reload(self) -> dict[str, Any]:
        """Read the settings again from all sources, and apply those that a running daemon can change.

        Raises:
            ConfigError: a setting is wrong; no setting has changed.
        """
        from .control.reloading import apply

        assert self._state is not None
        report = apply(self._state, load_settings(self.overrides, self.environ, self.config_file))
        self.settings = self._state.settings
        return report


def _service_type(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value)).lower().removesuffix("_only")


def _open_arena(settings: Settings, port: int) -> tuple[Arena | None, str]:
    """Open the shared memory; ``None`` and the reason if there is none."""
    if not settings.arena:
        return None, "shared memory is switched off (arena = false)"
    try:
        return open_arena(settings.arena_dir, port, settings.arena_mb << 20), ""
    except ArenaUnavailable as error:
        logger.warning("shared memory is not available: %s; tensors travel by TCP", error)
        return None, str(error)


def _catch_signals(stopping: asyncio.Event, reload: Callable[[], object]) -> Callable[[], None]:
    """Drain at the first SIGINT or SIGTERM, exit at once at the second, reload at SIGHUP.

    Returns:
        A function that restores the previous handlers.
    """
    loop = asyncio.get_running_loop()

    def on_stop(number: int, frame: object) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        loop.call_soon_threadsafe(stopping.set)

    def reload_or_log() -> None:
        try:
            reload()
        except ConfigError as error:
            logger.error("settings not reloaded: %s", error)

    try:
        before = {number: signal.signal(number, on_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGHUP"):  # Windows has 'luna-daemon reload'
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(reload_or_log))
    except ValueError:  # not the main thread: stop() ends the daemon
        return lambda: None

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore


async def _maintain(service: Service) -> None:
    while True:
        await asyncio.sleep(_MAINTENANCE_S)
        service.maintain()


def _watch_gpus(state: State) -> Callable[[], None]:
    """Read the GPUs' memory from the driver every few seconds, in a thread.

    The thread is never joined: a driver whose GPU has failed may not return.

    Returns:
        A function that ends the thread after its current reading.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            state.gpus = gpu_memory()
            ended.wait(_GPUS_S)

    threading.Thread(target=watch, name="gpus", daemon=True).start()
    return ended.set


async def _monitor(state: State, tls: ssl.SSLContext | None) -> None:
    """Serve the status page; without the page if its port is in use or a package is missing."""
    # Imported in a thread: the import takes longer than the rest of the start, and must not hold up requests.
    try:
        await asyncio.get_running_loop().run_in_executor(None, importlib.import_module, "luna_daemon.status.app")
    except ImportError as error:
        logger.warning("no status page: %s; 'luna-daemon doctor' says what to install", error)
        return
    from .monitoring import Monitor

    monitor = Monitor(state, state.settings.host, state.settings.ws_port, tls)
    try:
        await monitor.start()
        state.ws_port = monitor.port
        logger.info("status page on %s/", page_address(tls is not None, monitor.host, monitor.port))
        await asyncio.Event().wait()
    except OSError as error:
        logger.warning("no status page: port %d: %s", monitor.port, error.strerror or error)
    finally:
        await monitor.stop()


async def _close(service: Service) -> None:
    """Close all connections once their answers are sent; large answers take a while by TCP."""
    end = time.monotonic() + _SEND_S
    while service.unsent and time.monotonic() < end:
        await asyncio.sleep(0.01)
    service.close()
    await asyncio.sleep(_LINGER_S)


async def _end(task: "asyncio.Task[None]") -> None:
    """Cancel a background task; log an error of the task instead of raising, so that the shutdown continues."""
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
    except Exception:
        logger.exception("a background task failed")


def main() -> None:
    """Run ``luna-daemon serve`` with this process' arguments."""
    run_command("serve", *sys.argv[1:])


if __name__ == "__main__":
    main()
