"""What a backing does before the local model steps in: without ComfyUI, whose memory management is played here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luna_daemon.client import Answer
from luna_daemon.comfyui.patches import PatchSet, Unsendable
from luna_daemon.core import (
    DaemonConnectionError,
    LimitExceeded,
    LunaError,
    ModelLoadError,
    ModelNotFound,
    OutOfMemory,
    PatchMissing,
    PoisonRequest,
)
from luna_daemon.shells import backing as comfy_backing
from luna_daemon.shells.backing import Backing, Request
from luna_daemon.wire import messages as m
from luna_daemon.wire.messages import ModelRef

REF = ModelRef("vae", name="sdxl")
LATENT = torch.ones(1)


class Client:
    """A daemon that computes on ``device``."""

    def __init__(self, device: str) -> None:
        self.device, self.fallbacks = device, 0
        self.unloaded: list[ModelRef] = []
        self.error: LunaError | None = None
        self.failure: LunaError | None = None
        self.answers: list[Answer | LunaError] = []
        self.calls: list[m.Call] = []
        self.tensors: list[list[torch.Tensor]] = []

    def warm(self, model: ModelRef) -> dict[str, Any]:
        return {"device": self.device}

    def unload(self, model: ModelRef) -> None:
        self.unloaded.append(model)
        if self.error is not None:
            raise self.error

    def call(self, call: m.Call, tensors: Any, **options: Any) -> Answer:
        self.calls.append(call)
        self.tensors.append(list(tensors))
        if self.failure is not None:
            raise self.failure
        answer = self.answers.pop(0)
        if isinstance(answer, LunaError):
            raise answer
        return answer

    def count_materialised(self) -> None: ...

    def report_pending(self) -> None: ...


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


# --- what is sent ------------------------------------------------------------------------------------------------


@pytest.fixture
def backing(monkeypatch: pytest.MonkeyPatch) -> Backing:
    """On a CPU, without a local model."""
    played(monkeypatch, "cpu")
    monkeypatch.setattr(comfy_backing, "placed", lambda value: value)
    return Backing(REF, Client("cpu"), None, lambda vae: vae, "DaemonVAE")  # type: ignore[arg-type]


def drew(*tensors: torch.Tensor) -> Answer:
    """An answer to a call that drew random numbers."""
    return Answer({"drew": ["cpu"]}, [LATENT, *tensors], [])


def ask(backing: Backing, may_draw: bool) -> Any:
    """One call with one tensor."""
    request = Request(m.VaeEncode(REF), [LATENT], lambda answer: answer.tensors, may_draw)
    return backing.compute(lambda: request, lambda model: pytest.fail("computed locally"))


def test_states_go_along_until_nothing_is_drawn(backing: Backing) -> None:
    """What may draw sends its generators' states; once an answer tells that nothing was drawn, the next does not."""
    client: Any = backing.client
    client.answers = [Answer(None, [LATENT], []), Answer(None, [LATENT], [])]
    assert ask(backing, True) == ask(backing, True) == [LATENT]
    assert [call.generators for call in client.calls] == [["cpu"], []]
    assert [len(tensors) for tensors in client.tensors] == [2, 1]


def test_a_draw_that_was_not_expected_is_repeated_with_states(backing: Backing) -> None:
    """The first answer drew other numbers than this process would have: it is not used, and its successor is."""
    client: Any = backing.client
    before = torch.get_rng_state()
    torch.rand(5)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    client.answers = [drew(), drew(after), drew(after)]
    assert ask(backing, False) == [LATENT]
    assert [call.generators for call in client.calls] == [[], ["cpu"]]
    assert torch.equal(client.tensors[1][1], before) and torch.equal(torch.get_rng_state(), after)
    ask(backing, False)
    assert len(client.calls) == 3 and client.calls[2].generators == ["cpu"]


PATCHES = PatchSet({"layer.weight": ("diff", (torch.ones(2),))})


def encode(backing: Backing) -> Any:
    """A call that names a patch set."""
    call = m.ClipEncode(REF, packed=[], patches=[PATCHES.use()])
    request = Request(call, [], lambda answer: answer.result, may_draw=False, patch_sets=[PATCHES])
    return backing.compute(lambda: request, lambda model: "local")


def test_patches_are_uploaded_when_they_are_missed(backing: Backing) -> None:
    client: Any = backing.client
    client.answers = [PatchMissing("not kept"), Answer(None, [], []), Answer({"packed": 1}, [], [])]
    assert encode(backing) == {"packed": 1}
    assert [type(call) for call in client.calls] == [m.ClipEncode, m.PatchPut, m.ClipEncode]
    client.answers = [Answer({"packed": 1}, [], [])]
    assert encode(backing) == {"packed": 1} and len(client.calls) == 4


@pytest.mark.parametrize(
    "answers",
    [
        [PatchMissing("not kept"), LimitExceeded("too large")],
        [PatchMissing("not kept"), ModelNotFound("the other CLIP")],
        [PatchMissing("not kept"), Answer(None, [], []), PatchMissing("evicted at once")],
    ],
)
def test_patches_that_the_daemon_does_not_take_are_applied_here(
    monkeypatch: pytest.MonkeyPatch, answers: list[Answer | LunaError]
) -> None:
    """Counted as a call that the daemon did not answer."""
    played(monkeypatch, "cpu")
    client: Any = Client("cpu")
    client.answers = list(answers)
    assert encode(Backing(REF, client, Local(), lambda clip: clip, "DaemonCLIP")) == "local"
    assert client.fallbacks == 1 and client.answers == []


def test_room_is_made_before_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many bytes on this process' GPU if the daemon computes there; where it does not, none."""
    for there, expected in (("cuda:0", [("free", 5), "prepare"]), ("cpu", ["prepare"])):
        played(monkeypatch, "cuda")
        order: list[Any] = []
        memory = comfy_backing.comfy("model_management")
        monkeypatch.setattr(memory, "free_memory", lambda nbytes, device, order=order: order.append(("free", nbytes)))
        backing = Backing(REF, Client(there), Local(), lambda vae: vae, "DaemonVAE")  # type: ignore[arg-type]

        def prepare(order: list[Any] = order) -> Request:
            order.append("prepare")
            raise Unsendable("a function")

        assert backing.compute(prepare, lambda model: "local", lambda: 5) == "local" and order == expected


def test_the_end_of_memory_is_comfyuis_own_error(backing: Backing) -> None:
    backing.client.failure = OutOfMemory("no room")  # type: ignore[attr-defined]
    with pytest.raises(MemoryError, match="no room"):
        ask(backing, False)
