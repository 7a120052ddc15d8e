"""LunaDaemon, the control process: listens, serves, stops in order; never imports torch."""

if __name__ == "__main__" and not __package__:
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from luna_daemon.system.script import run_as_module

    run_as_module("luna_daemon.daemon_server")

import asyncio
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
from typing import Any

from pydantic_core import to_json

from .config import Settings, load_settings
from .control.access import Access
from .control.listening import bind, facts_of, tls_of
from .control.service import Service
from .control.state import State
from .core import ConfigError, DaemonConnectionError, LunaError, PortInUse, ServiceType, logger
from .files.resolver import ModelResolver
from .system.gpu import gpu_memory
from .system.runtime import Runtime, dial_host, page_address, runtime_folder
from .system.script import run_command
from .wire.arena import Arena, ArenaUnavailable, open_arena
from .wire.shared_memory import SharedMemory
from .workers import WorkerPool

__all__ = ["LunaDaemon"]

_TIDY_S = 5.0
_GPUS_S = 3.0
_SEND_S = 5.0
_HANDSHAKE_S = 5.0
_AT_ONCE, _BACKLOG = 64, 1024
"""asyncio accepts so many connections before it serves any of them; the system may keep more waiting."""
_LINGER_S = 0.1
"""Time for clients to map the last results before the shared memory is removed."""
_LEGACY_SERVICE = {"full": "full", "vae_only": "vae", "clip_only": "clip", "vae": "vae", "clip": "clip"}


class LunaDaemon:
    """The daemon, as an object: ``start()`` it in a process of its own, or ``run()`` it in this one.

    Args:
        device, clip_precision, vae_precision, service_type: as the predecessor's constructor took them.
        config_file: a ``luna.toml``.
        settings: any field of ``Settings``: ``port=``, ``vae_device=``, ``models=`` ...

    Raises:
        ConfigError: a setting is wrong; nothing has been opened.

    ::

        with LunaDaemon() as daemon:      # serves until the end of the block
            ...
        LunaDaemon().start()              # serves on after this script has ended
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
        given = {
            "host": host, "port": port, "ws_port": ws_port, "clip_precision": clip_precision,
            "vae_precision": vae_precision, "service_type": _service_type(service_type),
            "vae_device": device, "clip_device": device, **settings,
        }  # fmt: skip
        self.overrides = {name: value for name, value in given.items() if value is not None}
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
        """Start a daemon that serves until ``stop()``, and return once it answers.

        Raises:
            PortInUse: another process has the port; the message names it.
            ConfigError: the daemon refused its settings, or ended for another reason.
            DaemonConnectionError: the daemon did not answer in time.
        """
        from .client import DaemonClient

        if self.port == 0:
            raise ConfigError("port 0 cannot be found again by start()", "Name a port, or use run()")
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
            with suppress(LunaError), self._client(DaemonClient) as client:
                # Another daemon may answer on this port: then the started one ends by itself.
                if client.get_daemon_info()["start_id"] == self._start_id:
                    return self
            time.sleep(0.02)
        self.stop()
        raise DaemonConnectionError(f"the daemon did not answer within {timeout_s:g} s", f"Its log is {log}")

    def stop(self, timeout_s: float | None = None) -> None:
        """End the daemon that ``start()`` started, or the ``run()`` in another thread, once its requests are done."""
        from .client import DaemonClient

        if self._stopping is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            return
        if self._process is None:
            return
        with suppress(LunaError), self._client(DaemonClient) as client:
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
        """Number of the started daemon's process."""
        return self._process.pid if self._process is not None else None

    @property
    def exit_code(self) -> int | None:
        """Exit code of the started daemon, negative for a signal; ``None`` while it lives or before its start."""
        return self._process.poll() if self._process is not None else None

    def __enter__(self) -> "LunaDaemon":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _client(self, kind: Any) -> Any:
        return kind(self.settings.host, self.port, runtime_dir=self.settings.runtime_dir, name="LunaDaemon")

    def _environment(self) -> dict[str, str]:
        """Variables that hand the overrides on to the child: not on its command line, which everybody may read."""
        variables = {"LUNA_START_ID": self._start_id, "LUNA_OVERRIDES": to_json(self.overrides).decode()}
        if self.config_file is not None:
            variables["LUNA_CONFIG"] = str(self.config_file.resolve())
        return variables

    # --- in this process ---

    def run(self) -> None:
        """Serve until SIGTERM, Ctrl-C, ``stop()`` or a client's shutdown; then drain.

        Raises:
            PortInUse: another process has the port; the message names it.
        """
        try:
            asyncio.run(self._serve())
        finally:
            self._stopping, self._loop, self._state = None, None, None

    async def _serve(self) -> None:
        # First of all, so that a signal from here on ends everything in order.
        self._stopping, self._loop = asyncio.Event(), asyncio.get_running_loop()
        async with AsyncExitStack() as ends:  # unwound from the last to the first
            ends.callback(self._catch_signals())
            tls = tls_of(self.settings)
            listener = bind(self.settings)
            ends.callback(listener.close)
            self.port = listener.getsockname()[1]
            runtime = Runtime(self.port, self.settings.runtime_dir)
            runtime.open(facts_of(self.settings, self.port))
            ends.callback(runtime.close)
            arena, why = self._open_arena()
            if arena is not None:
                ends.callback(arena.close)
            pool = WorkerPool(self.settings, runtime.folder)
            state = self._make_state(pool, SharedMemory(arena, why), runtime)
            service = Service(state)
            ends.push_async_callback(_close, service)
            server = await self._loop.create_server(
                service.connect,
                sock=listener,
                backlog=_AT_ONCE,
                ssl=tls,
                ssl_handshake_timeout=_HANDSHAKE_S if tls else None,
            )
            listener.listen(_BACKLOG)
            pool.open(*await self._workers_address(service, tls is not None, ends))
            ends.push_async_callback(_drain, pool)
            ends.callback(server.close)
            logger.info("Luna Daemon listens on %s:%d", self.settings.host, self.port)
            ends.callback(_watch_gpus(state))
            for task in (_tidy(service), _monitor(state, tls)):
                ends.push_async_callback(_end, asyncio.create_task(task))
            await self._stopping.wait()
            logger.info("stopping: %d requests in flight", pool.in_flight)
        logger.info("stopped")

    async def _workers_address(self, service: Service, tls: bool, ends: AsyncExitStack) -> tuple[str, int]:
        """Where workers dial: on this machine and with one-time tokens, TLS would only cost time."""
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
        """Read the settings again, as at the start, and apply those that can be.

        Raises:
            ConfigError: a setting is wrong; nothing has changed.
        """
        from .control.reloading import apply

        assert self._state is not None
        taken = apply(self._state, load_settings(self.overrides, self.environ, self.config_file))
        self.settings = self._state.settings
        return taken

    def _open_arena(self) -> tuple[Arena | None, str]:
        if not self.settings.arena:
            return None, "shared memory is switched off (arena = false)"
        try:
            return open_arena(self.settings.arena_dir, self.port, self.settings.arena_mb << 20), ""
        except ArenaUnavailable as error:
            logger.warning("no shared memory: %s; tensors go by TCP", error)
            return None, str(error)

    def _reload_or_log(self) -> None:
        try:
            self._reload()
        except ConfigError as error:
            logger.error("the settings stay as they were: %s", error)

    def _catch_signals(self) -> Callable[[], None]:
        """Drain at the first signal, end at once at the second. Returns what restores the old handlers."""
        loop, stopping = asyncio.get_running_loop(), self._stopping
        assert stopping is not None

        def handle(number: int, frame: object) -> None:
            if stopping.is_set():
                os._exit(128 + number)
            loop.call_soon_threadsafe(stopping.set)

        def reload(number: int, frame: object) -> None:
            loop.call_soon_threadsafe(self._reload_or_log)

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
            if hasattr(signal, "SIGHUP"):  # elsewhere 'luna-daemon reload' does it
                before[signal.SIGHUP] = signal.signal(signal.SIGHUP, reload)
        except ValueError:  # not the main thread, where stop() ends the daemon
            return lambda: None

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        return restore


def _service_type(value: Any) -> ServiceType | str | None:
    if value is None or isinstance(value, ServiceType):
        return value
    text = str(getattr(value, "value", value)).lower()
    return _LEGACY_SERVICE.get(text, text)


async def _drain(pool: WorkerPool) -> None:
    await pool.close(pool.settings.drain_timeout_sec)


async def _tidy(service: Service) -> None:
    while True:
        await asyncio.sleep(_TIDY_S)
        service.tidy()


def _watch_gpus(state: State) -> Callable[[], None]:
    """Ask the driver for the GPUs' memory every few seconds. Returns what ends this.

    Runs in a thread that nobody waits for: a driver whose GPU has failed may never answer.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            state.gpus = gpu_memory()
            over.wait(_GPUS_S)

    threading.Thread(target=watch, name="gpus", daemon=True).start()
    return over.set


async def _monitor(state: State, tls: ssl.SSLContext | None) -> None:
    """Serve the status page. Where its port is taken, or a package is missing, the daemon serves without the page."""
    # Imported in a thread: it takes longer than everything before it, and requests must not wait for it.
    try:
        await asyncio.get_running_loop().run_in_executor(None, _import_web)
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
    """Close connections once their answers are sent: large ones take a while by TCP."""
    end = time.monotonic() + _SEND_S
    while service.unsent and time.monotonic() < end:
        await asyncio.sleep(0.01)
    service.close()
    await asyncio.sleep(_LINGER_S)


async def _end(task: "asyncio.Task[None]") -> None:
    """Cancel a background task; an error of the task is logged, and the daemon goes on stopping."""
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
    except Exception:
        logger.exception("a background task failed")


def _import_web() -> None:
    from .status import app  # noqa: F401


def main() -> None:
    """``python -m luna_daemon.daemon_server``: the same as ``luna-daemon serve``."""
    run_command("serve", *sys.argv[1:])


if __name__ == "__main__":
    main()
