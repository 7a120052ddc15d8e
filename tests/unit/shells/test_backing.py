"""What a backing does before the local model steps in: without ComfyUI, whose memory management is played here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from luna_daemon.client import Answer
from luna_daemon.comfyui.patches import Unsendable
from luna_daemon.core import DaemonConnectionError, LunaError, ModelLoadError, PoisonRequest
from luna_daemon.shells import backing as comfy_backing
from luna_daemon.shells.backing import Backing, Request
from luna_daemon.wire import messages as m
from luna_daemon.wire.messages import ModelRef

REF = ModelRef("vae", name="sdxl")


class Client:
    """A daemon that computes on ``device``."""

    def __init__(self, device: str) -> None:
        self.device, self.fallbacks = device, 0
        self.unloaded: list[ModelRef] = []
        self.error: LunaError | None = None
        self.failure: LunaError | None = None

    def warm(self, model: ModelRef) -> dict[str, Any]:
        return {"device": self.device}

    def unload(self, model: ModelRef) -> None:
        self.unloaded.append(model)
        if self.error is not None:
            raise self.error

    def call(self, call: m.Call, tensors: Any, **options: Any) -> Answer:
        assert self.failure is not None
        raise self.failure

    def count_materialised(self) -> None: ...


class Local:
    """A local model with so many bytes on the GPU."""

    def __init__(self) -> None:
        self.loaded = 0
        self.patcher = SimpleNamespace(loaded_size=lambda: self.loaded)


def played(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    memory = SimpleNamespace(
        get_torch_device=lambda: SimpleNamespace(type=device), free_memory=lambda *_: None,
        soft_empty_cache=lambda: None, OOM_EXCEPTION=MemoryError, processing_interrupted=lambda: False,
    )  # fmt: skip
    monkeypatch.setattr(comfy_backing, "comfy", lambda name: memory)
    monkeypatch.setattr(comfy_backing, "running_comfyui", lambda: None)


def fall_back(backing: Backing, error: LunaError) -> str:
    """A call that the daemon refuses."""
    backing.client.failure = error  # type: ignore[attr-defined]
    request = Request(m.VaeDecode(REF), [], lambda answer: "daemon", may_draw=False)
    return backing.compute(lambda: request, lambda model: "local", lambda: 0)


CANNOT_LOAD, CANNOT_SEND = ModelLoadError("broken"), Unsendable("a function")


@pytest.mark.parametrize(
    ("here", "there", "error", "asked"),
    [
        ("cuda", "cuda:0", CANNOT_LOAD, 1), ("cuda", "cuda:0", CANNOT_SEND, 1),
        # It does not answer: asking again would only take time.
        ("cuda", "cuda:0", DaemonConnectionError("away"), 0),
        ("cuda", "cpu", CANNOT_LOAD, 0), ("cpu", "cuda:0", CANNOT_LOAD, 0), ("xpu", "cuda:0", CANNOT_LOAD, 0),
    ],
)  # fmt: skip
def test_the_daemon_gives_way_on_a_shared_gpu(
    monkeypatch: pytest.MonkeyPatch, here: str, there: str, error: LunaError, asked: int
) -> None:
    """Asked to unload this model, where both would hold it on one GPU; before the local one is loaded."""
    played(monkeypatch, here)
    client, order = Client(there), []
    source = lambda: order.append(len(client.unloaded)) or Local()  # noqa: E731
    backing = Backing(REF, client, source, lambda vae: vae, "DaemonVAE")  # type: ignore[arg-type]
    assert fall_back(backing, error) == "local" and client.fallbacks == 1
    assert client.unloaded == [REF] * asked and order == [asked]


def test_not_while_the_local_model_is_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may want the daemon's; once ComfyUI has unloaded the local one, there is room to make again."""
    played(monkeypatch, "cuda")
    client, local = Client("cuda:0"), Local()
    backing = Backing(REF, client, local, lambda vae: vae, "DaemonVAE")  # type: ignore[arg-type]
    for loaded, asked in ((0, 1), (1000, 1), (0, 2)):
        local.loaded = loaded
        fall_back(backing, CANNOT_SEND)
        assert len(client.unloaded) == asked


def test_a_daemon_that_refuses_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch, "cuda")
    client = Client("cuda:0")
    client.error = DaemonConnectionError("gone meanwhile")
    backing = Backing(REF, client, Local(), lambda vae: vae, "DaemonVAE")  # type: ignore[arg-type]
    assert fall_back(backing, CANNOT_SEND) == "local"
    with pytest.raises(PoisonRequest):
        fall_back(backing, PoisonRequest("crashed two workers"))
    assert client.unloaded == [REF]
