"""What stands behind a shell: the daemon's model, and the local one that steps in or takes over.

One ``Backing`` belongs to one weightless network (the *skeleton*), which all clones of a shell share. Three things
may happen to a call: the daemon answers; the daemon is away and the local model steps in for this call; or some code
needed true weights, the skeleton took them over, and from then on it is an ordinary ComfyUI model.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from ..client import Answer, DaemonClient, get_client
from ..comfyui.attributes import Watch
from ..comfyui.flags import rendered
from ..comfyui.patches import Unsendable
from ..core import (
    Busy,
    DaemonConnectionError,
    LunaError,
    ModelError,
    ModelNotFound,
    OutOfMemory,
    RequestCancelled,
    logger,
)
from ..wire import messages as m
from ..wire import rng

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_MOST_BUSY_S = 5.0
_NOT_CALLERS = ("luna_daemon.", "comfy.", "torch.")
"""Modules between a node and us: a warning names the node."""

_untold: weakref.WeakKeyDictionary[DaemonClient, int] = weakref.WeakKeyDictionary()
"""Weights loaded locally of which a daemon has not heard yet."""


def comfy(name: str) -> Any:
    """A module of the ComfyUI that this process runs."""
    return importlib.import_module(f"comfy.{name}")


def running_comfyui() -> m.ComfyId:
    """The ComfyUI that this process runs, for the daemon to run the same."""
    import torch

    cli = comfy("cli_args")
    try:
        version = str(importlib.import_module("comfyui_version").__version__)
    except (ImportError, AttributeError):  # older than its first release with a version
        version = ""
    root = Path(cli.__file__).resolve().parents[1]
    return m.ComfyId(str(root), sys.executable, version, str(torch.__version__), rendered(cli.args))


class Skeleton:
    """A weightless ComfyUI network whose compute is replaced, and the way back.

    Args:
        network: the module on ``meta`` tensors.
        backing: what stands behind it.
        replaced: methods by dotted name (``decode``, ``clip_l.encode_token_weights``), set on the instances.
    """

    def __init__(self, network: Any, backing: Backing, replaced: dict[str, Callable[..., Any]]) -> None:
        self._network = weakref.ref(network)
        self._replaced = list(replaced)
        for name, method in replaced.items():
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, method)
        # Whoever runs a layer by itself gets true weights: they are put into these very modules just before.
        self._hooks = [module.register_forward_pre_hook(self._needs_weights) for module in network.modules()]
        self._backing = weakref.ref(backing)
        network.luna = backing

    def __deepcopy__(self, memo: dict[int, Any]) -> Skeleton:
        return self

    @property
    def network(self) -> Any:
        return self._network()

    def _needs_weights(self, module: Any, inputs: Any) -> None:
        backing = self._backing()
        if backing is not None:
            backing.materialise(f"{type(module).__name__} runs")
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise ModelError(
                f"a copy of {type(module).__name__} was made before its weights were loaded",
                "Call materialize() on the DaemonVAE or DaemonCLIP first, or load it with ComfyUI's own loader",
            )

    def adopt(self, real: Any) -> None:
        """Take over the tensors of an equal, real network, and its compute: the modules stay the same objects."""
        for hook in self._hooks:
            hook.remove()
        network = self.network
        for name in self._replaced:
            owner, _, attribute = name.rpartition(".")
            network.get_submodule(owner).__dict__.pop(attribute, None)
        theirs = dict(real.named_modules())
        for name, module in network.named_modules():
            if name not in theirs:
                raise ModelError(f"the local model has no {name!r}: it is of another family", "Give the same model")
            source = theirs[name]
            module._parameters.update(source._parameters)
            module._buffers.update(source._buffers)
            for attribute, value in source.__dict__.items():
                mine = module.__dict__.get(attribute)
                if hasattr(mine, "untyped_storage") and mine.is_meta:
                    module.__dict__[attribute] = value


class Backing:
    """The daemon's model and the local one, for all clones of one shell.

    Args:
        ref: the model in the daemon.
        client: connection; the default one if ``None``.
        source: a local model, or a callable that loads one: same class of object as the shell.
        network_of: the network inside a local model.
        kind: how warnings name it: ``DaemonVAE`` or ``DaemonCLIP``.
    """

    def __init__(
        self, ref: m.ModelRef, client: DaemonClient | None, source: Any, network_of: Callable[[Any], Any], kind: str
    ) -> None:
        self.model = msgspec.structs.replace(ref, comfy=running_comfyui())
        self.kind = kind
        self.skeleton: Skeleton | None = None
        self.watch: Watch | None = None
        """Notices what nodes set on the skeleton."""
        self.local = False
        """Whether the skeleton holds true weights: nothing goes to the daemon any more."""
        self._client = client
        self._source = source
        self._network_of = network_of
        self._real: Any = None
        self._lock = threading.RLock()
        self._device: str | None = None
        self._away = False
        self._counted = False
        self._said: set[str] = set()
        self._draws: dict[tuple[type, bool], bool] = {}
        """Per kind of call whether the last one drew random numbers."""
        self._current: Callable[[], Any] = lambda: None

    def __deepcopy__(self, memo: dict[int, Any]) -> Backing:
        # A node that deep-copies a part of the network copies no connection and no lock.
        return self

    @property
    def client(self) -> DaemonClient:
        return self._client or get_client()

    @property
    def current(self) -> Any:
        """The patcher that was loaded last: ComfyUI's network has one state, and it is this patcher's."""
        return self._current()

    @current.setter
    def current(self, patcher: Any) -> None:
        self._current = weakref.ref(patcher)

    # --- the daemon ---

    def send(self, call: m.Call, tensors: Sequence[torch.Tensor] = ()) -> Answer:
        """Call the daemon, waiting for a place in its queue, until ComfyUI is interrupted."""
        memory = comfy("model_management")
        bar = _Bar()
        while True:
            try:
                answer = self.client.call(call, tensors, on_progress=bar, is_cancelled=memory.processing_interrupted)
            except Busy as busy:
                _wait(min(busy.retry_after_s, _MOST_BUSY_S), memory.processing_interrupted)
                continue
            for note in answer.notes:
                logger.warning("%s: %s", self.kind, note)
            return answer

    def send_drawing(self, call: m.Call, tensors: Sequence[torch.Tensor], likely: bool) -> Answer:
        """``send`` for what may draw random numbers: those that it would have drawn here, and the next draw goes on.

        Args:
            likely: whether the states of this process' generators go along until it is known that nothing draws. They
                keep identical requests apart; but what draws without them has to be computed twice, the first time.
        """
        way = type(call), getattr(call, "raw", False)
        if not self._draws.get(way, likely):
            answer = self.send(call, tensors)
            self._draws[way] = _drew(answer)
            if not self._draws[way]:
                return answer
        names, states = rng.states(comfy("model_management").get_torch_device().type)
        answer = self.send(msgspec.structs.replace(call, generators=names), [*tensors, *states])
        self._draws[way] = _drew(answer)
        drew = [name for name in names if self._draws[way] and name in answer.result["drew"]]
        if drew:
            rng.put_states(drew, answer.tensors[-len(drew) :])
            del answer.tensors[-len(drew) :]
        return answer

    def either(self, remote: Callable[[], T], local: Callable[[Any], T]) -> T:
        """The daemon's answer, or the local model's where that may step in.

        Raises:
            InterruptProcessingException: ComfyUI was interrupted while it waited.
            OOM_EXCEPTION: ComfyUI's, when the daemon's device had no room.
        """
        memory = comfy("model_management")
        try:
            result = remote()
        except RequestCancelled:
            memory.throw_exception_if_processing_interrupted()
            raise
        except OutOfMemory as error:
            raise memory.OOM_EXCEPTION(str(error)) from error
        except Unsendable as error:
            self.say(f"the local model computes: {error}")
            self._count_materialised()
            return self._locally(local, True)
        except LunaError as error:
            if not error.local_ok:
                raise
            if not self._away:
                self._away = True
                logger.warning("%s: the local model steps in: %s", self.kind, error)
            return self._locally(local, not isinstance(error, DaemonConnectionError))
        if self._away:
            self._away = False
            logger.warning("%s: the daemon is back and is used again", self.kind)
        self._tell()
        return result

    def say(self, text: str) -> None:
        """A warning, once for this model."""
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s: %s", self.kind, text)

    def _locally(self, local: Callable[[Any], T], answers: bool) -> T:
        self.client.fallbacks += 1
        if answers:
            self._ask_for_room()
        return local(self.real())

    def _ask_for_room(self) -> None:
        """Have the daemon unload the model from a GPU of this process, before the local one is loaded beside it."""
        if not self._shares(comfy("model_management").get_torch_device()):
            return
        if self._real is not None and self._real.patcher.loaded_size() > 0:
            return  # it is there already; others may want the daemon's
        with contextlib.suppress(LunaError):
            self.client.unload(self.model)

    def _shares(self, device: Any) -> bool:
        """Whether the daemon computes on this process' GPU; as far as is known without asking."""
        return bool(device.type != "cpu" and (self._device or "").partition(":")[0] == device.type)

    def make_room(self, nbytes: Callable[[], float]) -> None:
        """Free what a call needs where the daemon computes on a GPU of this process.

        A shell has size 0, so nobody else does. On the calling thread: a ControlNet encodes in the middle of sampling.
        """
        memory = comfy("model_management")
        device = memory.get_torch_device()
        if device.type == "cpu":
            return
        if self._device is None:
            try:
                self._device = str(self.client.warm(self.model).get("device", "cpu"))
            except LunaError:
                return
        if self._shares(device):
            memory.free_memory(nbytes(), device)
            memory.soft_empty_cache()

    # --- the local model ---

    def real(self) -> Any:
        """The local model, loaded once.

        Raises:
            ModelNotFound: there is none.
        """
        with self._lock:
            if self._real is None:
                if self._source is None:
                    raise ModelNotFound(f"{self.kind} has no local model to step in", "Give source")
                loads = callable(self._source) and not hasattr(self._source, "patcher")
                self._real = self._source() if loads else self._source
            return self._real

    def materialise(self, why: str, load: bool = True) -> None:
        """Put true weights into the skeleton, once: it computes by itself from now on.

        Args:
            why: what needs them, for the warning.
            load: have ComfyUI load the current patcher, as whoever runs a layer expects it to have happened.
        """
        with self._lock:
            if self.local or self.skeleton is None:
                return
            where = _caller()
            logger.warning("%s: %s (%s): its weights are loaded here, and used from now on", self.kind, why, where)
            real, patcher = self.real(), self.current
            real.patcher.detach()
            _forget(real.patcher)
            if patcher is not None and load:
                _forget(patcher)
            self.skeleton.adopt(self._network_of(real))
            self.local = True
            self._real = None
            self._count_materialised()
        if patcher is not None and load:
            comfy("model_management").load_models_gpu([patcher])

    def weight(self, key: str) -> torch.Tensor:
        """A weight of the model as the file has it, for code that reads single values; the shell stays one."""
        with self._lock:
            if not self.local:
                self.say(f"the values of weights are read ({_caller()}): the model is loaded here too")
                self._count_materialised()
                found = self.real().patcher.get_key_patches(filter_prefix=key)
                return cast("torch.Tensor", found[key][0][0].data)
        network = self.skeleton.network if self.skeleton is not None else None
        return cast("torch.Tensor", comfy("utils").get_attr(network, key).data)

    def _count_materialised(self) -> None:
        """That true weights are here, once."""
        if not self._counted:
            self._counted = True
            _untold[self.client] = _untold.get(self.client, 0) + 1
            self._tell()

    def _tell(self) -> None:
        """Tell the daemon what was done without it, now if it answers, else with a later answer."""
        count = _untold.pop(self.client, 0)
        if count:
            try:
                self.client.report(materialised=count)
            except LunaError:
                _untold[self.client] = _untold.get(self.client, 0) + count
                return
        self.client.tell_fallbacks()


def _drew(answer: Answer) -> bool:
    return bool(answer.result and answer.result.get("drew"))


class _Bar:
    """The daemon's tiles on ComfyUI's progress bar."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, progress: m.Progress) -> None:
        if progress.stage != "tile" or not progress.total:
            return
        if self._bar is None:
            self._bar = comfy("utils").ProgressBar(progress.total)
        self._bar.update_absolute(progress.step, progress.total)


def _wait(seconds: float, stopped: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if stopped():
            raise RequestCancelled("ComfyUI was interrupted")
        time.sleep(0.05)


def _caller() -> str:
    """The line outside of ComfyUI's and our own code that led here."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(_NOT_CALLERS):
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return "ComfyUI itself"


def _forget(patcher: Any) -> None:
    """Have ComfyUI's memory management see a model anew: it keeps device and size of what it loaded."""
    loaded = comfy("model_management").current_loaded_models
    for entry in list(loaded):
        if entry.model is not None and patcher.is_clone(entry.model):
            loaded.remove(entry)
            if entry.model_finalizer is not None:
                entry.model_finalizer.detach()
