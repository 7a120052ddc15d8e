"""DaemonClient: one synchronous, thread-safe client; and the predecessor's functions on a default one.

torch is imported only when a tensor is sent or received.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core import (
    AuthenticationError,
    BadRequest,
    DaemonConnectionError,
    LunaError,
    ModelKind,
    ModelMismatchError,
    Priority,
)
from .system.runtime import dial_host
from .wire import messages as m
from .wire.link import Answer, IsCancelled, Link, OnProgress

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


class DaemonClient:
    """A connection to the daemon, made at the first call and made anew after it broke.

    Args:
        host, port: where the daemon listens; by default from the settings (``LUNA_HOST``, ``LUNA_PORT``).
        runtime_dir: where its token is, if the daemon was started with ``--runtime-dir``.
        use_arena: take tensors through shared memory where both sides see it.
        name: how ``info`` names this client.
        tls_ca: for a daemon of another user or machine that has TLS: the PEM file of its authority, or ``system``;
            ``LUNA_TLS_CA`` by default.

    Every method raises ``DaemonConnectionError`` when no daemon answers and the daemon's own errors otherwise.
    Model names (``vae_type``, ``clip_type``) are those of the daemon's configuration, ``sdxl`` by default.
    """

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        *,
        runtime_dir: Path | str | None = None,
        use_arena: bool = True,
        name: str = "",
        tls_ca: Path | str = "",
    ) -> None:
        if host is None or port is None:
            from .config import load_settings

            settings = load_settings()
            host = host or settings.host
            port = port or settings.port
            runtime_dir = runtime_dir or settings.runtime_dir
        self.host = dial_host(host)
        self.port = port
        self.runtime_dir = Path(runtime_dir) if runtime_dir else None
        self.use_arena = use_arena
        self.name = name or Path(sys.argv[0] or "python").name
        self.tls_ca = str(tls_ca) or os.environ.get("LUNA_TLS_CA", "")
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.fallbacks = 0
        """Calls that a local model answered, not yet reported to the daemon."""
        self._materialised = 0
        """Models of shells whose weights were loaded in this process, not yet reported to the daemon."""

    def link(self) -> Link:
        """The live connection."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid = os.getpid()
                if self._link is not None:  # a forked child's copy of its parent's connection
                    self._link.close()
                self._link = None
            if self._link is None or self._link.broken is not None:
                self._link = Link(self.host, self.port, self.runtime_dir, self.name, self.use_arena, self.tls_ca)
            return self._link

    def call(
        self,
        call: m.Call,
        tensors: Sequence[torch.Tensor] = (),
        *,
        deadline_s: float | None = None,
        priority: int = Priority.NORMAL,
        on_progress: OnProgress | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Answer:
        """Make a call and wait for its answer.

        Args:
            call: what to do; its type is the op.
            tensors: its inputs, on any device.
            priority: who goes first when a queue forms; lower is sooner.
            deadline_s: seconds within which it must be started.
            on_progress: told of queueing, loading and tiles, on the calling thread.
            is_cancelled: asked ten times a second; ``True`` stops the call with ``RequestCancelled``.
        """
        how = (deadline_s, priority, on_progress, is_cancelled)
        link = self.link()
        try:
            return link.call(call, tensors, *how)
        except AuthenticationError:  # the token was renewed meanwhile: nothing has been done
            with self._lock:
                if self._link is link:
                    self._link = None
        return self.link().call(call, tensors, *how)

    def close(self) -> None:
        """Close the connection; the next call makes a new one."""
        with self._lock:
            if self._link is not None:
                self._link.close()
                self._link = None

    def __enter__(self) -> DaemonClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- the daemon ---

    def ping(self) -> float:
        """Seconds of a round trip."""
        start = time.perf_counter()
        self.call(m.Ping())
        return time.perf_counter() - start

    def is_running(self) -> bool:
        """Whether a daemon answers and lets us in."""
        try:
            self.ping()
        except LunaError:
            return False
        return True

    def get_daemon_info(self) -> dict[str, Any]:
        """Everything the daemon knows about itself, and how this client reaches it (``transport``)."""
        link = self.link()
        info: dict[str, Any] = self.call(m.Info()).result
        return {**info, "transport": link.transport, "transport_why": link.transport_why}

    get_info = get_daemon_info

    def shutdown(self) -> dict[str, Any]:
        """Drain the daemon and end it; how many requests it still finishes (``in_flight``)."""
        return self._plain(m.Shutdown())

    def report(self, fallbacks: int = 0, materialised: int = 0) -> None:
        """Have the daemon add to its statistics what was done without it.

        Args:
            fallbacks: calls that a local model answered.
            materialised: models of shells whose weights were loaded in a client.
        """
        self.call(m.Report(fallbacks, materialised))

    def count_materialised(self) -> None:
        """Count a model of a shell whose weights were loaded in this process, and report it as soon as possible."""
        self._materialised += 1
        self.report_pending()

    def report_pending(self) -> None:
        """Report what was done without the daemon; if it cannot take that now, a later call reports it."""
        fallbacks, materialised = self.fallbacks, self._materialised
        if fallbacks or materialised:
            self.fallbacks = self._materialised = 0
            try:
                self.report(fallbacks, materialised)
            except LunaError:  # whoever calls this has an answer, which must not be lost
                self.fallbacks += fallbacks
                self._materialised += materialised

    def _plain(self, call: m.Call) -> dict[str, Any]:
        result: dict[str, Any] = self.call(call).result
        return result

    # --- models ---

    def models(self) -> dict[str, Any]:
        """Models by name (``named``), and which are loaded (``loaded``: key to bytes)."""
        return self._plain(m.ModelsList())

    def warm(self, model: m.ModelRef, pin: bool = False, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Load a model now; its properties."""
        properties: dict[str, Any] = self.call(m.ModelLoad(model, pin), on_progress=on_progress).result
        return properties

    def unload(self, model: m.ModelRef | None = None) -> None:
        """Give the memory of one model, or of all, back."""
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
        """Both prompts: ``cond, pooled, uncond, pooled_negative``; ``[1,T,D]`` and ``[1,P]`` float32."""
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
        """Positive and negative conditioning with SDXL's size embeddings, ready for a sampler."""
        cond, pooled, uncond, pooled_negative = self.clip_encode(positive, negative, clip_type, lora_stack)
        size = {
            "width": width, "height": height, "crop_w": crop_w, "crop_h": crop_h,
            "target_width": target_width, "target_height": target_height,
        }  # fmt: skip
        return [[cond, {"pooled_output": pooled, **size}]], [[uncond, {"pooled_output": pooled_negative, **size}]]

    def clip_tokenize(self, text: str, clip_type: str = "sdxl", return_word_ids: bool = False) -> dict[str, Any]:
        """Tokens as ComfyUI's tokenizers make them: per encoder, chunks of ``(token, weight)``.

        Raises:
            BadRequest: word ids are asked for; the daemon's tokenizer does not make them.
        """
        if return_word_ids:
            raise BadRequest("return_word_ids=True is not served by the daemon", "Tokenize with a local tokenizer")
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
        """Encode tokens: ``cond``, or ``(cond, pooled)``, or ``{"cond", "pooled_output"}``."""
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
        """The state dict kept under that name, the caller's own; ``None`` if there is none."""
        answer = self.call(m.LoraGet(lora_name))
        keys = answer.result["keys"]
        return None if keys is None else dict(zip(keys, answer.tensors))

    def lora_cache_check(self, lora_name: str) -> bool:
        """Whether that LoRA is kept."""
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
        """A LoRA file's tensors, which the daemon keeps in RAM for all: mapped, copied only where they are written to.

        Args:
            name: as ComfyUI lists it, or a full path; then this very file is meant.

        Raises:
            ModelNotFound, ModelMismatchError, ModelLoadError: no such file, not the daemon's, or corrupt.
        """
        from .files import mapping

        return mapping.load(self.link(), name, on_progress, is_cancelled)

    def put_lora(self, name: str, state_dict: StateDict) -> int:
        """Keep a state dict under a name of your own, for ``load_lora`` of every client; its bytes."""
        answer = self.call(m.LoraPut(name, list(state_dict)), list(state_dict.values()))
        nbytes: int = answer.result["bytes"]
        return nbytes

    def warm_lora(self, name: str, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Load a LoRA file into the daemon's cache: ``name, kind, bytes, load_s, kept, was_kept``."""
        result: dict[str, Any] = self.call(m.LoraWarm(name), on_progress=on_progress).result
        return result

    def pin_lora(self, name: str, pinned: bool = True) -> str:
        """Keep a LoRA until it is unpinned or evicted by name; the name by which the cache has it."""
        return str(self._plain(m.LoraPin(name, pinned))["name"])

    def evict_lora(self, name: str | None = None) -> list[str]:
        """Forget one LoRA, or all that are not pinned; which. Tensors that clients hold stay theirs."""
        return list(self._plain(m.LoraEvict(name))["evicted"])

    def lora_stats(self) -> dict[str, Any]:
        """Figures of the LoRA cache: totals, and per LoRA in ``loras``."""
        return self._plain(m.LoraStats())


def _named(kind: ModelKind, name: str) -> m.ModelRef:
    return m.ModelRef(kind.value, name=name)


def _no_loras(lora_stack: Sequence[Any] | None) -> None:
    if lora_stack:
        raise BadRequest(
            f"lora_stack with {len(lora_stack)} entries: this client call encodes without LoRA",
            "Apply the LoRA to a DaemonCLIP, as a LoRA loader does",
        )


# --- the predecessor's functions, on one default client ---------------------------------------------------------

_default: DaemonClient | None = None
_default_lock = threading.Lock()


def get_client() -> DaemonClient:
    """The client that the functions of this module use."""
    global _default
    with _default_lock:
        if _default is None:
            _default = DaemonClient()
        return _default


def reset_clients() -> None:
    """Close the default client; the next function call reads the settings anew."""
    global _default
    with _default_lock:
        if _default is not None:
            _default.close()
        _default = None


def is_daemon_running() -> bool:
    """Whether a daemon answers."""
    return get_client().is_running()


def get_daemon_info() -> dict[str, Any]:
    """Everything the daemon knows about itself."""
    return get_client().get_daemon_info()


get_info = get_daemon_info


def vae_encode(
    pixels: torch.Tensor, vae_type: str = "sdxl", tiled: bool = False, tile_size: int = 512, overlap: int = 64
) -> torch.Tensor:
    """See ``DaemonClient.vae_encode``."""
    return get_client().vae_encode(pixels, vae_type, tiled, tile_size, overlap)


def vae_decode(
    latents: torch.Tensor, vae_type: str = "sdxl", tiled: bool = False, tile_size: int = 64, overlap: int = 16
) -> torch.Tensor:
    """See ``DaemonClient.vae_decode``."""
    return get_client().vae_decode(latents, vae_type, tiled, tile_size, overlap)


def clip_encode(
    positive: str, negative: str = "", clip_type: str = "sdxl", lora_stack: Sequence[Any] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``DaemonClient.clip_encode``."""
    return get_client().clip_encode(positive, negative, clip_type, lora_stack)


def clip_encode_sdxl(
    positive: str, negative: str = "", clip_type: str = "sdxl", **size: Any
) -> tuple[Conditioning, Conditioning]:
    """See ``DaemonClient.clip_encode_sdxl``."""
    return get_client().clip_encode_sdxl(positive, negative, clip_type, **size)


def clip_tokenize(text: str, clip_type: str = "sdxl", return_word_ids: bool = False) -> dict[str, Any]:
    """See ``DaemonClient.clip_tokenize``."""
    return get_client().clip_tokenize(text, clip_type, return_word_ids)


def clip_encode_from_tokens(tokens: Any, clip_type: str = "sdxl", **options: Any) -> Any:
    """See ``DaemonClient.clip_encode_from_tokens``."""
    return get_client().clip_encode_from_tokens(tokens, clip_type, **options)


def lora_cache_get(lora_name: str) -> StateDict | None:
    """See ``DaemonClient.lora_cache_get``."""
    return get_client().lora_cache_get(lora_name)


def lora_cache_put(lora_name: str, state_dict: StateDict) -> bool:
    """See ``DaemonClient.lora_cache_put``."""
    return get_client().lora_cache_put(lora_name, state_dict)


def lora_cache_check(lora_name: str) -> bool:
    """See ``DaemonClient.lora_cache_check``."""
    return get_client().lora_cache_check(lora_name)


def lora_cache_stats() -> dict[str, Any]:
    """See ``DaemonClient.lora_cache_stats``."""
    return get_client().lora_cache_stats()


def has_lora(lora_hash: str) -> bool:
    """See ``DaemonClient.has_lora``."""
    return get_client().has_lora(lora_hash)


def upload_lora(lora_hash: str, weights: StateDict) -> dict[str, Any]:
    """See ``DaemonClient.upload_lora``."""
    return get_client().upload_lora(lora_hash, weights)


def register_vae(vae: Any = None, vae_type: str = "sdxl") -> dict[str, Any]:
    """See ``DaemonClient.register_vae``."""
    return get_client().register_vae(vae, vae_type)


def register_clip(clip: Any = None, clip_type: str = "sdxl") -> dict[str, Any]:
    """See ``DaemonClient.register_clip``."""
    return get_client().register_clip(clip, clip_type)
