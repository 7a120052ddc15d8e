"""Local models with the proxies' methods, over a backend that only records."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from luna_daemon import backends  # noqa: E402
from luna_daemon.backends.local import LocalCLIP, LocalVAE  # noqa: E402
from luna_daemon.wire.messages import LoadSpec, Tiling  # noqa: E402


class Recorder:
    """Backend and model at once."""

    def __init__(self) -> None:
        self.specs: list[LoadSpec] = []
        self.calls: list[tuple[Any, ...]] = []

    def load(self, spec: LoadSpec) -> Recorder:
        self.specs.append(spec)
        return self

    def decode(self, tensor: Any, tiling: Tiling | None, step: Any) -> tuple[Any, list[str]]:
        step(0, 1)
        self.calls.append((tensor, tiling))
        return tensor, ["a note"]

    def tokenize(self, text: str) -> dict[str, Any]:
        return {"l": text}

    def encode(self, tokens: Any, layer: int | None, unprojected: bool) -> dict[str, Any]:
        self.calls.append((tokens, layer, unprojected, torch.is_inference_mode_enabled()))
        return {"cond": "c", "pooled_output": "p"}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(backends, "make_backend", lambda name: recorder)
    return recorder


def test_a_vae(recorder):
    vae = LocalVAE("a", "b", device="cpu", precision="fp16")
    assert recorder.specs == [LoadSpec("local", "vae", "", ("a", "b"), "cpu", "fp16")]
    assert vae.decode("latents") == "latents" and vae.decode_tiled("latents", tile_x=4, overlap=1) == "latents"
    assert recorder.calls == [("latents", None), ("latents", Tiling(tile_x=4, overlap=1))]


def test_a_layer_belongs_to_one_clone(recorder):
    clip = LocalCLIP("a", type="sd15")
    skipped = clip.clone()
    skipped.clip_layer(-2)
    assert clip.encode("cat") == skipped.encode("cat") == "c"
    assert recorder.calls == [({"l": "cat"}, None, False, True), ({"l": "cat"}, -2, False, True)]
    assert len(recorder.specs) == 1 and recorder.specs[0].type == "sd15"


def test_forms_of_a_result(recorder):
    clip = LocalCLIP("a")
    assert clip.encode_from_tokens({}) == "c"
    assert clip.encode_from_tokens({}, return_pooled=True) == ("c", "p")
    assert clip.encode_from_tokens({}, return_dict=True) == {"cond": "c", "pooled_output": "p"}
    clip.encode_from_tokens({}, return_pooled="unprojected")
    assert [call[2] for call in recorder.calls] == [False, False, False, True]
