"""DaemonClient, a synchronous, thread-safe client; and functions that call a default DaemonClient.

torch is imported only when a tensor is sent or received.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from .core import (
    BadRequest,
    DaemonConnectionError,
    LunaError,
    ModelKind,
    ModelMismatchError,
)
from .wire import messages as m
from .wire.caller import Caller
from .wire.link import Answer, IsCancelled, OnProgress

if TYPE_CHECKING:
    import torch

__all__ = [
    "Answer", "DaemonClient", "DaemonConnectionError", "ModelMismatchError", "clip_encode", "clip_encode_from_tokens",
    "clip_encode_sdxl", "clip_tokenize", "get_client", "get_daemon_info", "get_info", "has_lora", "is_daemon_running",
    "lora_cache_check", "lora_cache_get", "lora_cache_put", "lora_cache_stats", "register_clip", "register_vae",
    "reset_clients", "upload_lora", "vae_decode", "vae_encode",
]  # fmt: skip

StateDict = dict[str, "torch.Tensor"]
Conditioning = list[list[Any]]
P = ParamSpec("P")
R = TypeVar("R")


class DaemonClient(Caller):
    """A connection to the daemon, opened at the first call and reopened after a failure.

    Args:
        host, port: where the daemon listens; by default from the settings (``LUNA_HOST``, ``LUNA_PORT``).
        runtime_dir: the daemon's ``--runtime-dir``, which contains its token; by default from the settings.
        use_arena: send and receive tensors through shared memory where possible.
        name: this client's name in ``info``; by default the program's.
        tls_ca: for a TLS daemon of another user or machine: PEM file of its certificate authority, or ``system``;
            by default ``LUNA_TLS_CA``.

    Every method raises ``DaemonConnectionError`` when no daemon answers and the daemon's own errors otherwise.
    Model names (``vae_type``, ``clip_type``) are those of the daemon's configuration, ``sdxl`` by default.
    """

    # --- the daemon ---

    def ping(self) -> float:
        """Round-trip time of an empty call in seconds."""
        start = time.perf_counter()
        self.call(m.Ping())
        return time.perf_counter() - start

    def is_running(self) -> bool:
        """Whether a daemon answers and accepts this client."""
        try:
            self.ping()
        except LunaError:
            return False
        return True

    def get_daemon_info(self) -> dict[str, Any]:
        """The daemon's state and statistics, and this client's ``transport`` to the daemon."""
        link = self.link()
        info: dict[str, Any] = self.call(m.Info()).result
        return {**info, "transport": link.transport, "transport_why": link.transport_why}

    get_info = get_daemon_info

    def shutdown(self) -> dict[str, Any]:
        """Make the daemon finish its requests and exit; ``in_flight`` in the result is their number."""
        return self._plain(m.Shutdown())

    # --- models ---

    def models(self) -> dict[str, Any]:
        """Configured models (``named``), and loaded models (``loaded``: key to bytes)."""
        return self._plain(m.ModelsList())

    def warm(self, model: m.ModelRef, pin: bool = False, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Load a model in the daemon now, and return its properties.

        Args:
            model: by name or by files.
            pin: keep the model loaded: neither unloaded when idle nor evicted.
            on_progress: called on queueing and loading.
        """
        properties: dict[str, Any] = self.call(m.ModelLoad(model, pin), on_progress=on_progress).result
        return properties

    def unload(self, model: m.ModelRef | None = None) -> None:
        """Free the daemon's memory of a model, or of all models if ``None``."""
        self.call(m.ModelUnload(model))

    def register_vae(self, vae: Any = None, vae_type: str = "sdxl") -> dict[str, Any]:
        """Legacy: succeeds and does nothing; models come from the daemon's configuration."""
        return self._plain(m.Register(ModelKind.VAE, vae_type))

    def register_clip(self, clip: Any = None, clip_type: str = "sdxl") -> dict[str, Any]:
        """Legacy: succeeds and does nothing; models come from the daemon's configuration."""
        return self._plain(m.Register(ModelKind.CLIP, clip_type))

    # --- VAE ---

    def vae_encode(
        self, pixels: torch.Tensor, vae_type: str = "sdxl", tiled: bool = False, tile_size: int = 512, overlap: int = 64
    ) -> torch.Tensor:
        """Pixels ``[B,H,W,C]`` float32 in 0..1 to latents ``[B,C,h,w]``; tile sizes in pixels."""
        tiling = m.Tiling(tile_size, tile_size, overlap) if tiled else None
        return self.call(m.VaeEncode(_named(ModelKind.VAE, vae_type), tiling), [pixels]).tensors[0]

    def vae_decode(
        self, latents: torch.Tensor, vae_type: str = "sdxl", tiled: bool = False, tile_size: int = 64, overlap: int = 16
    ) -> torch.Tensor:
        """Latents ``[B,C,h,w]`` to pixels ``[B,H,W,C]`` float32 in 0..1; tile sizes in latent units."""
        tiling = m.Tiling(tile_size, tile_size, overlap) if tiled else None
        return self.call(m.VaeDecode(_named(ModelKind.VAE, vae_type), tiling), [latents]).tensors[0]

    # --- text encoders ---

    def clip_encode(
        self, positive: str, negative: str = "", clip_type: str = "sdxl", lora_stack: Sequence[Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode both prompts: ``cond, pooled, uncond, pooled_negative``; ``[1,T,D]`` and ``[1,P]`` float32.

        Raises:
            BadRequest: ``lora_stack`` is not empty.
        """
        _no_loras(lora_stack)
        cond, pooled = self._encode(m.ClipEncode(_named(ModelKind.CLIP, clip_type), text=positive))
        uncond, pooled_negative = self._encode(m.ClipEncode(_named(ModelKind.CLIP, clip_type), text=negative))
        return cond, pooled, uncond, pooled_negative

    def clip_encode_sdxl(
        self,
        positive: str,
        negative: str = "",
        clip_type: str = "sdxl",
        width: int = 1024,
        height: int = 1024,
        crop_w: int = 0,
        crop_h: int = 0,
        target_width: int = 1024,
        target_height: int = 1024,
        lora_stack: Sequence[Any] | None = None,
    ) -> tuple[Conditioning, Conditioning]:
        """Positive and negative conditioning with SDXL's size embeddings, ready for a sampler.

        Raises:
            BadRequest: ``lora_stack`` is not empty.
        """
        cond, pooled, uncond, pooled_negative = self.clip_encode(positive, negative, clip_type, lora_stack)
        size = {
            "width": width, "height": height, "crop_w": crop_w, "crop_h": crop_h,
            "target_width": target_width, "target_height": target_height,
        }  # fmt: skip
        return [[cond, {"pooled_output": pooled, **size}]], [[uncond, {"pooled_output": pooled_negative, **size}]]

    def clip_tokenize(self, text: str, clip_type: str = "sdxl", return_word_ids: bool = False) -> dict[str, Any]:
        """Tokens as ComfyUI's tokenizers make them: per encoder, chunks of ``(token, weight)``.

        Raises:
            BadRequest: ``return_word_ids`` is set; the daemon's tokenizer does not make word ids.
        """
        if return_word_ids:
            raise BadRequest("the daemon does not support return_word_ids=True", "Tokenize with a local tokenizer")
        tokens = self._plain(m.ClipTokenize(_named(ModelKind.CLIP, clip_type), text))["tokens"]
        return {name: [[tuple(pair) for pair in chunk] for chunk in chunks] for name, chunks in tokens.items()}

    def clip_encode_from_tokens(
        self,
        tokens: Any,
        clip_type: str = "sdxl",
        return_pooled: bool = False,
        return_dict: bool = False,
        lora_stack: Sequence[Any] | None = None,
    ) -> Any:
        """Encode tokens: ``cond``, or ``(cond, pooled)``, or ``{"cond", "pooled_output"}``, all float32.

        Args:
            tokens: from ``clip_tokenize``.

        Raises:
            BadRequest: ``lora_stack`` is not empty.
        """
        _no_loras(lora_stack)
        cond, pooled = self._encode(m.ClipEncode(_named(ModelKind.CLIP, clip_type), tokens=tokens))
        if return_dict:
            return {"cond": cond, "pooled_output": pooled}
        return (cond, pooled) if return_pooled else cond

    def _encode(self, call: m.ClipEncode) -> tuple[torch.Tensor, torch.Tensor]:
        answer = self.call(call)
        named = dict(zip(answer.result["names"], answer.tensors))
        return named["cond"], named["pooled_output"]

    # --- LoRA cache ---

    def lora_cache_put(self, lora_name: str, state_dict: StateDict) -> bool:
        """Keep a LoRA's state dict in the daemon's RAM for every client."""
        self.call(m.LoraPut(lora_name, list(state_dict)), list(state_dict.values()))
        return True

    def lora_cache_get(self, lora_name: str) -> StateDict | None:
        """The state dict kept under this name, in tensors that belong to the caller; ``None`` if there is none."""
        answer = self.call(m.LoraGet(lora_name))
        keys = answer.result["keys"]
        return None if keys is None else dict(zip(keys, answer.tensors))

    def lora_cache_check(self, lora_name: str) -> bool:
        """Whether the daemon keeps a LoRA under this name."""
        return bool(self._plain(m.LoraCheck(lora_name))["exists"])

    def lora_cache_stats(self) -> dict[str, Any]:
        """Legacy name of ``lora_stats``."""
        return self.lora_stats()

    def has_lora(self, lora_hash: str) -> bool:
        """Legacy name of ``lora_cache_check``."""
        return self.lora_cache_check(lora_hash)

    def upload_lora(self, lora_hash: str, weights: StateDict) -> dict[str, Any]:
        """Legacy name of ``lora_cache_put``."""
        return {"success": self.lora_cache_put(lora_hash, weights)}

    def load_lora(
        self, name: str, on_progress: OnProgress | None = None, is_cancelled: IsCancelled | None = None
    ) -> StateDict:
        """A LoRA file's tensors, mapped copy-on-write from memory that all clients share.

        Args:
            name: name in ComfyUI's list, or the full path of a file, which must be the daemon's file too.

        Raises:
            ModelNotFound, ModelMismatchError, ModelLoadError: the file does not exist, differs from the daemon's, or
                is corrupt.
        """
        from .files import mapping

        return mapping.load(self.link(), name, on_progress, is_cancelled)

    def put_lora(self, name: str, state_dict: StateDict) -> int:
        """Keep a state dict under a name, for every client's ``load_lora``; returns its size in bytes."""
        answer = self.call(m.LoraPut(name, list(state_dict)), list(state_dict.values()))
        nbytes: int = answer.result["bytes"]
        return nbytes

    def warm_lora(self, name: str, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Load a LoRA file into the daemon's cache; returns ``name, kind, bytes, load_s, kept, was_kept``."""
        result: dict[str, Any] = self.call(m.LoraWarm(name), on_progress=on_progress).result
        return result

    def pin_lora(self, name: str, pinned: bool = True) -> str:
        """Keep a LoRA until it is unpinned or evicted by name; returns the cache's name for the LoRA."""
        return str(self._plain(m.LoraPin(name, pinned))["name"])

    def evict_lora(self, name: str | None = None) -> list[str]:
        """Remove a LoRA, or all that are not pinned; returns their names. Tensors that clients hold stay valid."""
        return list(self._plain(m.LoraEvict(name))["evicted"])

    def lora_stats(self) -> dict[str, Any]:
        """Statistics of the LoRA cache: totals, and per LoRA in ``loras``."""
        return self._plain(m.LoraStats())


def _named(kind: ModelKind, name: str) -> m.ModelRef:
    return m.ModelRef(kind.value, name=name)


def _no_loras(lora_stack: Sequence[Any] | None) -> None:
    if lora_stack:
        raise BadRequest(
            f"lora_stack with {len(lora_stack)} entries is not supported by this call",
            "Apply the LoRA to a DaemonCLIP, as a LoRA loader does",
        )


# --- functions on one default client -----------------------------------------------------------------------------

_default: DaemonClient | None = None
_default_lock = threading.Lock()


def get_client() -> DaemonClient:
    """The default client, which the functions of this module use."""
    global _default
    with _default_lock:
        if _default is None:
            _default = DaemonClient()
        return _default


def reset_clients() -> None:
    """Close the default client; the next function call reads the settings again."""
    global _default
    with _default_lock:
        if _default is not None:
            _default.close()
        _default = None


def _on_default(method: Callable[Concatenate[DaemonClient, P], R]) -> Callable[P, R]:
    """Make a function that calls ``method`` of the default client, with its docstring and parameters."""
    name = method.__name__

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = getattr(get_client(), name)(*args, **kwargs)
        return result

    signature = inspect.signature(method)
    own = list(signature.parameters.values())[1:]
    call.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return call


is_daemon_running = _on_default(DaemonClient.is_running)
get_info = get_daemon_info = _on_default(DaemonClient.get_daemon_info)
register_vae = _on_default(DaemonClient.register_vae)
register_clip = _on_default(DaemonClient.register_clip)
vae_encode = _on_default(DaemonClient.vae_encode)
vae_decode = _on_default(DaemonClient.vae_decode)
clip_encode = _on_default(DaemonClient.clip_encode)
clip_encode_sdxl = _on_default(DaemonClient.clip_encode_sdxl)
clip_tokenize = _on_default(DaemonClient.clip_tokenize)
clip_encode_from_tokens = _on_default(DaemonClient.clip_encode_from_tokens)
lora_cache_get = _on_default(DaemonClient.lora_cache_get)
lora_cache_put = _on_default(DaemonClient.lora_cache_put)
lora_cache_check = _on_default(DaemonClient.lora_cache_check)
lora_cache_stats = _on_default(DaemonClient.lora_cache_stats)
has_lora = _on_default(DaemonClient.has_lora)
upload_lora = _on_default(DaemonClient.upload_lora)
