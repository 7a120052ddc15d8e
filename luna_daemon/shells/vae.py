"""``DaemonVAE`` inside ComfyUI: ComfyUI's own ``VAE`` without weights, whose calls the daemon computes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..comfyui.attributes import Watch, attributes_set
from ..comfyui.patches import Unsendable
from ..core import BadRequest
from ..wire import messages as m
from ..wire.packing import pack, unpack
from .backing import Backing, Request
from .host import comfy
from .patcher import patcher_class, python_inside

if TYPE_CHECKING:
    import torch


class VAEShell:
    """Methods that override those of ``comfy.sd.VAE``, the other base class of ``DaemonVAE``.

    Scalars, ratios, memory estimates and ``process_*`` are ComfyUI's own. ``copy.copy`` returns an independent object
    on the same network, as with ComfyUI's ``VAE``. ``copy.deepcopy`` returns the shell itself, since nodes deep-copy
    model options that hold a VAE.
    """

    _stock: Any
    first_stage_model: Any
    patcher: Any
    memory_used_encode: Callable[..., float]
    memory_used_decode: Callable[..., float]
    vae_dtype: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def encode(self, pixel_samples: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Encode pixels ``[B,H,W,C]`` float32 in 0..1 to latents ``[B,C,h,w]``, as ``comfy.sd.VAE.encode``."""
        state = self._state()
        if state is None or args or options:
            return self._stock.encode(self, pixel_samples, *args, **options)
        return self._encode(state, None, pixel_samples, lambda vae: vae.encode(pixel_samples))

    def encode_tiled(self, pixel_samples: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Encode in tiles, with the arguments of ``comfy.sd.VAE.encode_tiled``; sizes in pixels."""
        state = self._state()
        if state is None:
            return self._stock.encode_tiled(self, pixel_samples, *args, **options)
        local = lambda vae: vae.encode_tiled(pixel_samples, *args, **options)  # noqa: E731
        return self._encode(state, m.Tiling(*args, **options), pixel_samples, local)

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None, **options: Any) -> Any:
        """Decode latents ``[B,C,h,w]`` to pixels ``[B,H,W,C]`` float32 in 0..1, as ``comfy.sd.VAE.decode``."""
        state = self._state()
        extra: dict[str, Any] = {} if vae_options is None else {"vae_options": vae_options}
        if state is None or options:
            return self._stock.decode(self, samples_in, **extra, **options)
        return self._decode(state, None, vae_options, samples_in, lambda vae: vae.decode(samples_in, **extra))

    def decode_tiled(self, samples: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Decode in tiles, with the arguments of ``comfy.sd.VAE.decode_tiled``; sizes in latent units."""
        state = self._state()
        if state is None:
            return self._stock.decode_tiled(self, samples, *args, **options)
        local = lambda vae: vae.decode_tiled(samples, *args, **options)  # noqa: E731
        return self._decode(state, m.Tiling(*args, **options), None, samples, local)

    def get_sd(self) -> Any:
        """Return the state dict; loads the weights into this process."""
        self.materialize("the state dict is asked for")
        return self._stock.get_sd(self)

    def get_ram_usage(self) -> int:
        """Return the bytes of the weights in this process; 0 for a shell, so ComfyUI's cache does not drop it."""
        return int(self.patcher.model_size())

    model_size = get_ram_usage

    def materialize(self, why: str = "materialize() is called") -> Any:
        """Load the weights into this process, once; this process computes all later calls. Return the object."""
        backing = getattr(self.first_stage_model, "luna", None)
        if backing is not None:
            backing.materialise(why)
        return self

    # --- to the daemon and back ---

    def _state(self) -> _State | None:
        return _state_of(self.first_stage_model, self.patcher)

    def _encode(
        self, state: _State, tiling: m.Tiling | None, pixels: torch.Tensor, local: Callable[[Any], torch.Tensor]
    ) -> torch.Tensor:
        return state.compute(
            lambda: m.VaeEncode(state.backing.model, tiling, attributes=state.attributes), pixels, local,
            lambda: self.memory_used_encode(_channels_first(pixels), self.vae_dtype),
        )  # fmt: skip

    def _decode(
        self,
        state: _State,
        tiling: m.Tiling | None,
        options: dict[str, Any] | None,
        samples: torch.Tensor,
        local: Callable[[Any], torch.Tensor],
    ) -> torch.Tensor:
        def call() -> m.VaeDecode:
            return m.VaeDecode(state.backing.model, tiling, options=_plain(options), attributes=state.attributes)

        return state.compute(call, samples, local, lambda: self.memory_used_decode(samples.shape, self.vae_dtype))


class _State(NamedTuple):
    """The backing of a network, and the plain attributes that nodes have set on its layers."""

    backing: Backing
    attributes: dict[str, dict[str, Any]]

    def compute(
        self,
        call: Callable[[], m.VaeEncode | m.VaeDecode],
        tensor: torch.Tensor,
        local: Callable[[Any], torch.Tensor],
        room_bytes: Callable[[], float] | None = None,
    ) -> torch.Tensor:
        """Call ``Backing.compute`` with one tensor; a local model has the same attributes set for the call."""

        def with_attributes(vae: Any) -> torch.Tensor:
            with attributes_set(vae.first_stage_model, unpack(self.attributes, [])):
                return local(vae)

        result: torch.Tensor = self.backing.compute(
            lambda: Request(call(), [tensor], lambda answer: answer.tensors[0]), with_attributes, room_bytes
        )
        return result


def _state_of(network: Any, patcher: Any) -> _State | None:
    """Return the state to send; ``None`` if the network now has weights and ComfyUI is to compute by itself.

    Loads the weights if a node changed the network in a way that cannot be sent.
    """
    backing: Backing | None = getattr(network, "luna", None)
    if backing is None or backing.local or backing.watch is None:
        return None
    plain, unsendable = backing.watch.changes()
    changed = [*(python_inside(patcher) if patcher is not None else ()), *unsendable]
    if changed:
        backing.current = patcher
        backing.materialise(f"a node changed {changed[0]}")
        return None
    return _State(backing, plain)


def _plain(options: dict[str, Any] | None) -> dict[str, Any]:
    """Pack ``vae_options`` for sending.

    Raises:
        Unsendable: an option is not a plain value.
    """
    try:
        tensors: list[Any] = []
        packed = {key: pack(value, tensors) for key, value in (options or {}).items()}
    except BadRequest as error:
        raise Unsendable(f"vae_options: {error.message}") from error
    if tensors:
        raise Unsendable("vae_options hold a tensor")
    return packed


def _channels_first(pixels: torch.Tensor) -> tuple[int, ...]:
    """Return the shape that ComfyUI's memory estimates expect: channels second, and one frame if not a video."""
    shape = (pixels.shape[0], pixels.shape[-1], *pixels.shape[1:-1])
    return shape if len(shape) != 4 else (*shape, 1)


def _raw(name: str, network: Any) -> Callable[..., Any]:
    """Make ``first_stage_model.encode`` or ``decode``, which nodes call that cut tiles by themselves."""
    kind = m.VaeEncode if name == "encode" else m.VaeDecode
    alive = weakref.ref(network)

    def compute(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        network: Any = alive()
        state = _state_of(network, network.luna.current)
        if state is None:
            return getattr(network, name)(tensor, *args, **options)

        def call() -> m.VaeEncode | m.VaeDecode:
            if args or options:
                raise Unsendable(f"first_stage_model.{name} is called with {[*args, *options]}")
            return kind(state.backing.model, raw=True, attributes=state.attributes)

        def local(vae: Any) -> Any:
            comfy("model_management").load_models_gpu([vae.patcher])
            return getattr(vae.first_stage_model, name)(tensor.to(vae.vae_dtype).to(vae.device), *args, **options)

        # The network itself would return its own dtype, on the device of its input.
        return state.compute(call, tensor, local).to(device=tensor.device, dtype=next(network.parameters()).dtype)

    return compute


@functools.cache
def vae_class() -> Any:
    """Return the class ``DaemonVAE``, derived from the running ComfyUI's ``VAE``."""
    stock = comfy("sd").VAE
    return type("DaemonVAE", (VAEShell, stock), {"_stock": stock, "__doc__": __doc__})


def shell_vae(vae: Any, backing: Backing) -> Any:
    """Turn a ``comfy.sd.VAE`` on meta tensors into a shell."""
    network = vae.first_stage_model
    alive = weakref.ref(network)
    replaced = {name: _raw(name, network) for name in ("encode", "decode")}
    backing.hollow(network, {**replaced, "to": lambda *args, **options: alive()})
    vae.__class__ = vae_class()
    vae.patcher.__class__ = patcher_class()
    backing.current = vae.patcher
    backing.watch = Watch(network)
    return vae
