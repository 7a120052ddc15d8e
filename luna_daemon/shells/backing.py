"""Computation for a shell: by the daemon's model, or by a local model.

One ``Backing`` belongs to one weightless network (the *skeleton*), which all clones of a shell share. A call is
computed in one of three ways: by the daemon; by the local model, for this call only, while the daemon is away; or by
the skeleton itself, once some code needed the weights and they were loaded into the skeleton (*materialised*).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec

from ..client import Answer, DaemonClient
from ..comfyui.attributes import Watch
from ..comfyui.patches import PatchSet, Unsendable
from ..core import (
    DaemonConnectionError,
    LimitExceeded,
    LunaError,
    ModelError,
    OutOfMemory,
    PatchMissing,
    RequestCancelled,
    logger,
)
from ..proxy import Fallback
from ..wire import messages as m
from ..wire import rng
from .host import ProgressBar, calling_line, comfy, forget_loaded, placed, running_comfyui
from .skeleton import Skeleton

if TYPE_CHECKING:
    import torch


@dataclass
class Request:
    """One call of a shell, ready to be sent."""

    call: m.VaeEncode | m.VaeDecode | m.ClipEncode
    tensors: list[torch.Tensor]
    read: Callable[[Answer], Any]
    """Converts the daemon's answer to what ComfyUI's own method returns."""
    may_draw: bool = True
    """Whether to assume that the call draws random numbers, until a first answer reports whether it did."""
    patch_sets: Sequence[PatchSet] = ()
    """The weight patches that the call names."""


class Backing:
    """The daemon's model and the local one, for all clones of one shell.

    Args:
        ref: the model in the daemon.
        client: connection to the daemon; the default connection if ``None``.
        source: the local ``VAE`` or ``CLIP``, or a callable that loads it.
        network_of: returns the network inside a local model.
        kind: how log lines name the shell: ``DaemonVAE`` or ``DaemonCLIP``.
    """

    def __init__(
        self, ref: m.ModelRef, client: DaemonClient | None, source: Any, network_of: Callable[[Any], Any], kind: str
    ) -> None:
        self.model = msgspec.structs.replace(ref, comfy=running_comfyui())
        self.kind = kind
        self.skeleton: Skeleton | None = None
        self.watch: Watch | None = None
        """Detects attributes that nodes set on the skeleton."""
        self.local = False
        """Whether the skeleton holds the weights: no call goes to the daemon any more."""
        self.fallback = Fallback(kind, source, client)
        """Holds the local model, and decides when to use it instead of the daemon."""
        self._network_of = network_of
        self._lock = threading.RLock()
        self._device: str | None = None
        """Where the daemon computes this model: ``cpu``, ``cuda:0`` ...; ``None`` until known."""
        self._counted = False
        self._warned: set[str] = set()
        self._draws: dict[tuple[type, bool], bool] = {}
        """Whether the last call drew random numbers, by type of call and whether that call was raw."""
        self._current: Callable[[], Any] = lambda: None

    def __deepcopy__(self, memo: dict[int, Any]) -> Backing:
        # A node may deep-copy a part of the network; the connection and the lock cannot be copied.
        return self

    @property
    def client(self) -> DaemonClient:
        """The connection to the daemon."""
        return self.fallback.client

    @property
    def current(self) -> Any:
        """The patcher that was loaded last: its patches and hooks are the state of the network."""
        return self._current()

    @current.setter
    def current(self, patcher: Any) -> None:
        self._current = weakref.ref(patcher)

    def hollow(self, network: Any, replaced: dict[str, Callable[..., Any]]) -> None:
        """Replace the compute of a network on ``meta`` tensors, and set this object as the network's ``luna``.

        Args:
            network: torch module.
            replaced: see ``Skeleton``.
        """
        self.skeleton = Skeleton(network, replaced, self.materialise)
        network.luna = self

    # --- a call ---

    def compute(
        self, prepare: Callable[[], Request], local: Callable[[Any], Any], room_bytes: Callable[[], float] | None = None
    ) -> Any:
        """Compute one call of the shell: in the daemon, else with the local model.

        Args:
            prepare: makes the request; raises ``Unsendable`` if the call holds something that cannot be sent.
            local: computes the same with the local model.
            room_bytes: returns the bytes to free on a shared GPU before the call; ``None`` frees nothing.

        Returns:
            What ComfyUI's own method would return. The daemon's tensors are moved to ComfyUI's device for intermediate
            results.

        Raises:
            InterruptProcessingException: ComfyUI was interrupted while waiting for the daemon.
            OOM_EXCEPTION: ComfyUI's own exception, when the daemon's device ran out of memory.
            LunaError: the daemon's error, where the local model may not be used instead.
        """
        memory = comfy("model_management")

        def remote() -> Any:
            if room_bytes is not None:
                self._make_room(room_bytes)
            request = prepare()
            return placed(request.read(self._send_with_patches(request)))

        try:
            return self.fallback.run(remote, local, self._before_local)
        except Unsendable as error:
            self.warn_once(f"the local model computes: {error}")
            self._count_materialised()
            self._unload_in_daemon()
            return self.fallback.compute_locally(local)
        except RequestCancelled:
            memory.throw_exception_if_processing_interrupted()
            raise
        except OutOfMemory as error:
            raise memory.OOM_EXCEPTION(str(error)) from error

    def _send_with_patches(self, request: Request) -> Answer:
        """Send a request; if the daemon lacks one of its patch sets, upload the sets and send again."""
        try:
            return self._send_with_rng_state(request)
        except PatchMissing:
            self._upload(request.patch_sets)
        try:
            return self._send_with_rng_state(request)
        except PatchMissing as error:
            raise Unsendable("the daemon cannot keep patches of this size") from error

    def _upload(self, patch_sets: Sequence[PatchSet]) -> None:
        for patch_set in patch_sets:
            try:
                self.send(*patch_set.put())
            except LimitExceeded as error:
                raise Unsendable(f"the daemon does not accept patches of this size: {error.message}") from error
            except ModelError as error:
                raise Unsendable(f"the daemon does not have the other CLIP of a merge: {error}") from error

    def _send_with_rng_state(self, request: Request) -> Answer:
        """Send so that the daemon draws the random numbers that this process would have drawn.

        The states of this process' random generators are sent only while calls of this type draw, since they make
        equal requests differ. A call that drew although no states were sent is sent again, with the states. The new
        states are set here afterwards.
        """
        call, tensors = request.call, request.tensors
        variant = type(call), getattr(call, "raw", False)
        if not self._draws.get(variant, request.may_draw):
            answer = self.send(call, tensors)
            self._draws[variant] = bool(_drawn(answer))
            if not self._draws[variant]:
                return answer
        names, states = rng.states(comfy("model_management").get_torch_device().type)
        answer = self.send(msgspec.structs.replace(call, generators=names), [*tensors, *states])
        self._draws[variant] = bool(_drawn(answer))
        drew = [name for name in names if name in _drawn(answer)]
        if drew:
            rng.put_states(drew, answer.tensors[-len(drew) :])
            del answer.tensors[-len(drew) :]
        return answer

    def send(self, call: m.Call, tensors: Sequence[torch.Tensor] = ()) -> Answer:
        """Call ``Fallback.send`` with ComfyUI's progress bar; cancel when ComfyUI is interrupted."""
        interrupted = comfy("model_management").processing_interrupted
        return self.fallback.send(call, tensors, ProgressBar(), interrupted)

    # --- memory on a GPU that this process and the daemon share ---

    def _make_room(self, nbytes: Callable[[], float]) -> None:
        """Free the memory that a call needs, if the daemon computes on a GPU of this process.

        ComfyUI does not free it, since a shell has size 0. Runs on the calling thread: a ControlNet may encode in the
        middle of sampling.
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

    def _shares(self, device: Any) -> bool:
        """Whether the daemon is known to compute on a GPU of this process' type; asks nothing."""
        return bool(device.type != "cpu" and (self._device or "").partition(":")[0] == device.type)

    def _before_local(self, error: LunaError) -> None:
        if not isinstance(error, DaemonConnectionError):  # away: another request to the daemon would only take time
            self._unload_in_daemon()

    def _unload_in_daemon(self) -> None:
        """Ask the daemon to unload the model from a shared GPU, before the local model is loaded there too."""
        if not self._shares(comfy("model_management").get_torch_device()):
            return
        loaded = self.fallback.loaded
        if loaded is not None and loaded.patcher.loaded_size() > 0:
            return  # the local model is on the GPU already; other clients may use the daemon's
        with contextlib.suppress(LunaError):
            self.client.unload(self.model)

    # --- weights in this process ---

    def materialise(self, why: str, load: bool = True) -> None:
        """Load the weights into the skeleton, once: from now on the skeleton computes by itself.

        Args:
            why: what needs the weights, for the warning.
            load: whether ComfyUI then loads the current patcher, as code that runs a layer expects.

        Raises:
            ModelNotFound: there is no local model.
            ModelError: the local model is of another family.
        """
        with self._lock:
            if self.local or self.skeleton is None:
                return
            self._warn(f"{why} ({calling_line()}): its weights are loaded here, and used from now on")
            real, patcher = self.fallback.local_model(), self.current
            real.patcher.detach()
            forget_loaded(real.patcher)
            if patcher is not None and load:
                forget_loaded(patcher)
            self.skeleton.adopt(self._network_of(real))
            self.local = True
            self.fallback.release()
            self._count_materialised()
        if patcher is not None and load:
            comfy("model_management").load_models_gpu([patcher])

    def weight(self, key: str) -> torch.Tensor:
        """Return one weight without patches, from the local model; the skeleton stays without weights.

        Args:
            key: the weight's name in the network's state dict.
        """
        with self._lock:
            if not self.local:
                self.warn_once(f"a node reads the values of weights ({calling_line()}): the model is loaded here too")
                self._count_materialised()
                entries = self.fallback.local_model().patcher.get_key_patches(filter_prefix=key)
                return cast("torch.Tensor", entries[key][0][0].data)
        network = self.skeleton.network if self.skeleton is not None else None
        return cast("torch.Tensor", comfy("utils").get_attr(network, key).data)

    def _count_materialised(self) -> None:
        """Report to the daemon, once, that this process has loaded the model's weights."""
        if not self._counted:
            self._counted = True
            self.client.count_materialised()

    # --- log ---

    def warn_once(self, text: str) -> None:
        """Log a warning, unless this object has logged the same text before."""
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)

    def _warn(self, text: str) -> None:
        logger.warning("%s: %s", self.kind, text)


def _drawn(answer: Answer) -> list[str]:
    """Names of the random generators that the daemon drew from."""
    return list((answer.result or {}).get("drew") or ())
