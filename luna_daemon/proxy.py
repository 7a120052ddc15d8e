"""DaemonVAE and DaemonCLIP: used like a VAE and a CLIP of ComfyUI, computed by the daemon.

While the daemon does not answer, a local model computes instead, with a single warning in the log. Errors that would
occur locally too are raised (``LunaError.local_ok``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .client import Answer, DaemonClient, get_client
from .core import BadRequest, Busy, LunaError, ModelKind, ModelNotFound, RequestCancelled, logger
from .files.identity import file_id
from .wire import messages as m
from .wire.link import IsCancelled, OnProgress

if TYPE_CHECKING:
    import torch

__all__ = ["DaemonCLIP", "DaemonVAE"]

T = TypeVar("T")
_MOST_BUSY_S = 5.0
"""Longest wait in seconds before a request that met a full queue is repeated."""


class Fallback:
    """Decides per call whether the daemon or a local model computes; logs each change, and counts the local calls.

    Args:
        name: name of the calling object for log lines, such as ``DaemonVAE``.
        source: a loaded local model, or a callable that loads one when it is needed; ``None`` for none.
        client: connection to the daemon; the module's default client if ``None``.
    """

    def __init__(self, name: str, source: Any, client: DaemonClient | None) -> None:
        self._name = name
        self._source = source
        self._client = client
        self._lock = threading.RLock()
        self._away = False
        self.loaded: Any = None
        """The local model, once it has been needed."""

    @property
    def client(self) -> DaemonClient:
        """The connection to the daemon."""
        return self._client or get_client()

    @property
    def has_local(self) -> bool:
        """Whether there is a local model, loaded or not."""
        return self._source is not None

    def send(
        self,
        call: m.Call,
        tensors: Sequence[torch.Tensor] = (),
        on_progress: OnProgress | None = None,
        is_cancelled: IsCancelled | None = None,
    ) -> Answer:
        """Call the daemon; while its queue is full, wait and repeat: a local model would use more device memory.

        Raises:
            RequestCancelled: ``is_cancelled`` returned ``True``.
            LunaError: the daemon's error.
        """
        while True:
            try:
                answer = self.client.call(call, tensors, on_progress=on_progress, is_cancelled=is_cancelled)
            except Busy as busy:
                _wait(min(busy.retry_after_s, _MOST_BUSY_S), is_cancelled)
                continue
            for note in answer.notes:
                logger.warning("%s: %s", self._name, note)
            return answer

    def run(
        self,
        remote: Callable[[], T],
        local: Callable[[Any], T],
        before_local: Callable[[LunaError], None] = lambda error: None,
    ) -> T:
        """Compute with the daemon, or with the local model if the daemon's error allows that (``LunaError.local_ok``).

        Args:
            remote: computes with the daemon.
            local: computes the same with the local model.
            before_local: called with the daemon's error before the local model is loaded.

        Raises:
            LunaError: the daemon's error, if the error does not allow the local model or there is none.
        """
        try:
            result = remote()
        except LunaError as error:
            if not error.local_ok or not self.has_local:
                raise
            if not self._away:
                self._away = True
                logger.warning("%s: the local model steps in: %s", self._name, error)
            before_local(error)
            return self.compute_locally(local)
        if self._away:
            self._away = False
            logger.warning("%s: the daemon is back and is used again", self._name)
        self.client.report_pending()
        return result

    def compute_locally(self, local: Callable[[Any], T]) -> T:
        """Compute with the local model, and count it as a call that the daemon did not answer."""
        self.client.fallbacks += 1
        return local(self.local_model())

    def local_model(self) -> Any:
        """The local model, loaded at the first use.

        Raises:
            ModelNotFound: there is no local model.
        """
        with self._lock:
            if self._source is None:
                raise ModelNotFound(f"{self._name} has no local model to step in", "Give source")
            if self.loaded is None:
                loads = callable(self._source) and not hasattr(self._source, "encode")
                self.loaded = self._source() if loads else self._source
            return self.loaded

    def release(self) -> None:
        """Drop the loaded model; the next use loads the model again."""
        with self._lock:
            self.loaded = None


def _wait(seconds: float, is_cancelled: IsCancelled | None) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if is_cancelled is not None and is_cancelled():
            raise RequestCancelled("the caller cancelled the request")
        time.sleep(0.05)


class _Proxy:
    """Base of both proxies: the model's reference, the client and the local model.

    Args:
        source: a loaded local model, or a callable that loads one when it is needed; ``None`` for none.
        kind: VAE or CLIP.
        type_: name of the model in the daemon's configuration, or with ``files`` the model's family.
        files: the model's files, below the daemon's model folders, instead of a configured name.
        client: the module's default client if ``None``.
    """

    def __init__(
        self, source: Any, kind: ModelKind, type_: str, files: Sequence[Path | str], client: DaemonClient | None
    ) -> None:
        self._fallback = Fallback(type(self).__name__, source, client)
        self._properties: dict[str, Any] | None = None
        self.on_progress: OnProgress | None = None
        """Called with the progress of loading and of tiles while a call runs."""
        self.is_cancelled: IsCancelled | None = None
        """Polled while a call waits; ``True`` cancels the call."""
        if files:
            self.model = m.ModelRef(kind.value, files=tuple(file_id(Path(file)) for file in files), type=type_)
        else:
            self.model = m.ModelRef(kind.value, name=type_)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # ComfyUI deep-copies model options that hold a VAE: connection and local model must stay shared.
        return self

    @property
    def client(self) -> DaemonClient:
        """The connection to the daemon."""
        return self._fallback.client

    def properties(self) -> dict[str, Any]:
        """Properties of the model (``latent_channels``, ``downscale_ratio``, ``encoders`` ...); the daemon loads it.

        Raises:
            LunaError: the daemon's error; the local model is not used.
        """
        if self._properties is None:
            self._properties = self._send(m.ModelLoad(self.model)).result
        return self._properties

    def _send(self, call: m.Call, tensors: Sequence[torch.Tensor] = ()) -> Answer:
        return self._fallback.send(call, tensors, self.on_progress, self.is_cancelled)

    def _compute(self, call: m.Call, tensor: torch.Tensor, local: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Make a call with a single input tensor and a single output tensor."""
        return self._fallback.run(lambda: self._send(call, [tensor]).tensors[0], local)


class DaemonVAE(_Proxy):
    """A VAE that the daemon runs.

    Args:
        source_vae: local VAE, or a callable that loads a VAE, used while the daemon does not answer.
        vae_type: name of the model in the daemon's configuration; with ``files`` its family.
        use_existing: legacy; the daemon's own model is always used.
        files: the VAE's file (or the two of a split TAESD) instead of a configured name.
        client: connection to use; the default one if ``None``.

    ::

        vae = DaemonVAE(vae_type="sdxl")
        latents = vae.encode(pixels)       # [B,H,W,C] float32 in 0..1 -> [B,C,h,w] float32
        pixels = vae.decode(latents)
    """

    def __init__(
        self,
        source_vae: Any = None,
        vae_type: str = "sdxl",
        use_existing: bool = False,
        *,
        files: Sequence[Path | str] = (),
        client: DaemonClient | None = None,
    ) -> None:
        super().__init__(source_vae, ModelKind.VAE, vae_type, files, client)
        self.vae_type = vae_type

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.properties()["latent_channels"])

    @property
    def downscale_ratio(self) -> int:
        """Pixels per latent, along each side."""
        return int(self.properties()["downscale_ratio"])

    @property
    def upscale_ratio(self) -> int:
        """Pixels per latent, along each side."""
        return int(self.properties()["upscale_ratio"])

    def spacial_compression_encode(self) -> int:
        """ComfyUI's name of ``downscale_ratio``."""
        return self.downscale_ratio

    def spacial_compression_decode(self) -> int:
        """ComfyUI's name of ``upscale_ratio``."""
        return self.upscale_ratio

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels ``[B,H,W,C]`` float32 in 0..1 to latents ``[B,C,h,w]`` float32."""
        return self._compute(m.VaeEncode(self.model), pixels, lambda vae: vae.encode(pixels))

    def decode(self, samples: torch.Tensor, vae_options: dict[str, Any] | None = None) -> torch.Tensor:
        """Latents ``[B,C,h,w]`` to pixels ``[B,H,W,C]`` float32 in 0..1, writable and the caller's own."""
        call = m.VaeDecode(self.model, options=vae_options or {})
        more = {"vae_options": vae_options} if vae_options else {}
        return self._compute(call, samples, lambda vae: vae.decode(samples, **more))

    def encode_tiled(
        self,
        pixels: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """``encode`` in tiles; sizes in pixels, ``None`` is ComfyUI's default (512, 512, 64)."""
        tiling = m.Tiling(tile_x, tile_y, overlap, tile_t, overlap_t)
        return self._compute(
            m.VaeEncode(self.model, tiling), pixels, lambda vae: vae.encode_tiled(pixels, **tiling.given())
        )

    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """``decode`` in tiles; sizes in latent units, ``None`` is ComfyUI's default (64, 64, 16)."""
        tiling = m.Tiling(tile_x, tile_y, overlap, tile_t, overlap_t)
        return self._compute(
            m.VaeDecode(self.model, tiling), samples, lambda vae: vae.decode_tiled(samples, **tiling.given())
        )


class DaemonCLIP(_Proxy):
    """Text encoders that the daemon runs.

    Args:
        source_clip: local CLIP, or a callable that loads a CLIP, used while the daemon does not answer.
        clip_type: name of the model in the daemon's configuration; with ``files`` its family.
        use_existing: legacy; the daemon's own model is always used.
        files: the encoders' files in the loader's order, instead of a configured name.
        client: connection to use; the default one if ``None``.

    ::

        clip = DaemonCLIP(clip_type="sdxl")
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a cat, (sunset:1.2)"))
    """

    def __init__(
        self,
        source_clip: Any = None,
        clip_type: str = "sdxl",
        use_existing: bool = False,
        *,
        files: Sequence[Path | str] = (),
        client: DaemonClient | None = None,
    ) -> None:
        super().__init__(source_clip, ModelKind.CLIP, clip_type, files, client)
        self.clip_type = clip_type
        self.layer_idx: int | None = None

    def clone(self) -> DaemonCLIP:
        """A copy with its own clip skip; model, connection and local model are shared."""
        other = DaemonCLIP.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def clip_layer(self, layer_idx: int) -> None:
        """Clip skip: -1 is the last layer, -2 the penultimate."""
        self.layer_idx = layer_idx

    def tokenize(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, Any]:
        """Per encoder, 77-token chunks of ``(token, weight)``; plain data that may be edited.

        Raises:
            BadRequest: word ids or other options are requested and there is no local tokenizer.
        """
        if return_word_ids or options:
            asked = ["return_word_ids"] * return_word_ids + list(options)
            if not self._fallback.has_local:
                raise BadRequest(f"tokenize({', '.join(asked)}) is not served by the daemon", "Give source_clip")
            return dict(self._fallback.local_model().tokenize(text, return_word_ids=return_word_ids, **options))

        def remote() -> dict[str, Any]:
            tokens = self._send(m.ClipTokenize(self.model, text)).result["tokens"]
            return {name: [[tuple(pair) for pair in chunk] for chunk in chunks] for name, chunks in tokens.items()}

        return self._fallback.run(remote, lambda clip: dict(clip.tokenize(text)))

    def encode_from_tokens(
        self, tokens: dict[str, Any], return_pooled: bool | str = False, return_dict: bool = False
    ) -> Any:
        """Encode: ``cond``, ``(cond, pooled)``, or ``{"cond", "pooled_output"}``; ``[1,T,D]`` and ``[1,P]`` float32.

        Args:
            tokens: from ``tokenize``.
            return_pooled: ``"unprojected"`` leaves the text projection out.
            return_dict: return the dict.
        """
        call = m.ClipEncode(
            self.model, tokens=_pairs(tokens), layer=self.layer_idx, unprojected=return_pooled == "unprojected"
        )

        def remote() -> Any:
            answer = self._send(call)
            named = dict(zip(answer.result["names"], answer.tensors))
            if return_dict:
                return named
            return (named["cond"], named["pooled_output"]) if return_pooled else named["cond"]

        return self._fallback.run(
            remote,
            lambda clip: self._layered(clip).encode_from_tokens(
                tokens, return_pooled=return_pooled, return_dict=return_dict
            ),
        )

    def encode_from_tokens_scheduled(
        self,
        tokens: dict[str, Any],
        unprojected: bool = False,
        add_dict: dict[str, Any] | None = None,
        show_pbar: bool = True,
    ) -> list[list[Any]]:
        """Conditioning for a sampler: ``[[cond, {"pooled_output": pooled, **add_dict}]]``."""
        named = self.encode_from_tokens(tokens, return_pooled="unprojected" if unprojected else True, return_dict=True)
        rest = {name: value for name, value in named.items() if name != "cond"}
        return [[named["cond"], {**rest, **(add_dict or {})}]]

    def encode(self, text: str) -> Any:
        """Encode a prompt to ``cond`` in a single call, without the model if the daemon's cache has the prompt."""

        def remote() -> Any:
            answer = self._send(m.ClipEncode(self.model, text=text, layer=self.layer_idx))
            return dict(zip(answer.result["names"], answer.tensors))["cond"]

        return self._fallback.run(remote, lambda clip: self._layered(clip).encode_from_tokens(clip.tokenize(text)))

    def _layered(self, clip: Any) -> Any:
        """The local model with this proxy's clip skip."""
        if self.layer_idx is None:
            return clip
        clone = clip.clone()
        clone.clip_layer(self.layer_idx)
        return clone


def _pairs(tokens: dict[str, Any]) -> m.Tokens:
    """Convert tokens for the wire: pairs without word ids, which do not change the encoding.

    Raises:
        BadRequest: the tokens contain an embedding, which the daemon does not accept.
    """
    try:
        return {
            name: [[(int(item[0]), float(item[1])) for item in chunk] for chunk in chunks]
            for name, chunks in tokens.items()
        }
    except (TypeError, ValueError, IndexError) as error:
        raise BadRequest(f"tokens are not chunks of (id, weight): {error}", "Use what tokenize() returned") from error
