"""``DaemonVAE`` inside ComfyUI: ComfyUI's own ``VAE`` around a network without weights, computed by the daemon."""

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
    """What differs from ``comfy.sd.VAE``, which comes after it in the class' bases.

    Scalars, ratios, memory estimates and ``process_*`` are ComfyUI's own. ``copy.copy`` gives an independent object on
    the same network, as ComfyUI's; a deep copy is the shell itself: nodes deep-copy model options that hold a VAE.
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
        """Pixels ``[B,H,W,C]`` float32 in 0..1 to latents ``[B,C,h,w]``, as ``comfy.sd.VAE.encode``."""
        state = self._state()
        if state is None or args or options:
            return self._stock.encode(self, pixel_samples, *args, **options)
        return self._encode(state, None, pixel_samples, lambda vae: vae.encode(pixel_samples))

    def encode_tiled(self, pixel_samples: torch.Tensor, *args: Any, **options: Any) -> Any:
        """``encode`` in tiles, with the arguments of ``comfy.sd.VAE.encode_tiled``; sizes in pixels."""
        state = self._state()
        if state is None:
            return self._stock.encode_tiled(self, pixel_samples, *args, **options)
        local = lambda vae: vae.encode_tiled(pixel_samples, *args, **options)  # noqa: E731
        return self._encode(state, m.Tiling(*args, **options), pixel_samples, local)

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None, **options: Any) -> Any:
        """Latents ``[B,C,h,w]`` to pixels ``[B,H,W,C]`` float32 in 0..1, as ``comfy.sd.VAE.decode``."""
        state = self._state()
        given: dict[str, Any] = {} if vae_options is None else {"vae_options": vae_options}
        if state is None or options:
            return self._stock.decode(self, samples_in, **given, **options)
        return self._decode(state, None, vae_options, samples_in, lambda vae: vae.decode(samples_in, **given))

    def decode_tiled(self, samples: torch.Tensor, *args: Any, **options: Any) -> Any:
        """``decode`` in tiles, with the arguments of ``comfy.sd.VAE.decode_tiled``; sizes in latent units."""
        state = self._state()
        if state is None:
            return self._stock.decode_tiled(self, samples, *args, **options)
        local = lambda vae: vae.decode_tiled(samples, *args, **options)  # noqa: E731
        return self._decode(state, m.Tiling(*args, **options), None, samples, local)

    def get_sd(self) -> Any:
        """The state dict, for which the true weights are loaded here."""
        self.materialize("the state dict is asked for")
        return self._stock.get_sd(self)

    def get_ram_usage(self) -> int:
        """For ComfyUI's cache under memory pressure: nothing is gained by dropping a shell."""
        return int(self.patcher.model_size())

    model_size = get_ram_usage

    def materialize(self, why: str = "materialize() is called") -> Any:
        """Load the true weights here, once; everything on this network is computed locally afterwards."""
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
    """What computes for a network, and the plain attributes that nodes have set on its layers."""

    backing: Backing
    attributes: dict[str, dict[str, Any]]

    def compute(
        self,
        call: Callable[[], m.VaeEncode | m.VaeDecode],
        tensor: torch.Tensor,
        local: Callable[[Any], torch.Tensor],
        room_bytes: Callable[[], float] | None = None,
    ) -> torch.Tensor:
        """``Backing.compute`` with one tensor in and one out; the local model gets the same attributes for the call."""

        def with_attributes(vae: Any) -> torch.Tensor:
            with attributes_set(vae.first_stage_model, unpack(self.attributes, [])):
                return local(vae)

        result: torch.Tensor = self.backing.compute(
            lambda: Request(call(), [tensor], lambda answer: answer.tensors[0]), with_attributes, room_bytes
        )
        return result


def _state_of(network: Any, patcher: Any) -> _State | None:
    """``None`` if ComfyUI is to compute by itself: a node changed the network in a way that cannot be sent.

    The network has its weights then.
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
    """``vae_options`` as they travel.

    Raises:
        Unsendable: something other than plain values.
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
    """The shape that ComfyUI's memory estimates are about; frames without a batch are one video."""
    shape = (pixels.shape[0], pixels.shape[-1], *pixels.shape[1:-1])
    return shape if len(shape) != 4 else (*shape, 1)


def _raw(name: str, network: Any) -> Callable[..., Any]:
    """``first_stage_model.encode`` or ``decode``: the network alone, as nodes call it that slice by themselves."""
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

        # As the network itself would answer: in its own dtype, beside its input.
        return state.compute(call, tensor, local).to(device=tensor.device, dtype=next(network.parameters()).dtype)

    return compute


@functools.cache
def vae_class() -> Any:
    """``comfy.sd.VAE`` of the running ComfyUI, as a shell has it."""
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
