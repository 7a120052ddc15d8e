"""One example of every message and call of the protocol, for tests of the framing and for the fuzzer's first inputs."""

from __future__ import annotations

from luna_daemon.wire import messages as m
from luna_daemon.wire.frame import encode_call

__all__ = ["CALLS", "MESSAGES"]

MODEL = m.ModelRef("vae", files=(m.FileId("/m/a.safetensors", 5, 6, 7, "sha256:00"),), type="sdxl")
TILING = m.Tiling(1, None, 3, 4, None)
SPEC = m.LoadSpec("vae:sdxl:0", "vae", "sdxl", ("/m/a",), "cuda:1", "bf16")
REF = m.TensorRef("bfloat16", (1, 2, 3), 12, 4096, 9, "seg-1", True)
RAW = encode_call(m.VaeDecode(MODEL, TILING))

CALLS: list[m.Call] = [
    m.Ping(), m.Info(), m.ArenaProof("ab"), m.Alloc(1 << 40),
    m.PatchPut("ab12", {"w": [1.0]}), m.Echo(8, 0.5), m.VaeEncode(MODEL),
    m.VaeDecode(MODEL, TILING), m.ClipTokenize(MODEL, "a (cat:1.3), ein Käfer, 猫"),
    m.ClipEncode(MODEL, None, {"l": [[(49406, 1.0), (320, 1.3)]], "g": []}, -2, True), m.ModelsList(),
    m.ModelLoad(MODEL, True), m.ModelUnload(None), m.LoraPut("x", ["a.weight"]), m.LoraGet("x"), m.LoraCheck("x"),
    m.LoraStats(), m.LoraLoad("x", m.FileId("/l", 1)), m.LoraWarm("x"), m.LoraPin("x", False), m.LoraEvict(None),
    m.Register("vae", "sdxl"), m.Report(1, 2), m.Reload(),
    m.TokenRenew(), m.Drain(), m.Shutdown(),
]  # fmt: skip
MESSAGES: list[m.Message] = [
    m.Hello(1, "token", "client", "me", 1, "0.1"), m.Request(1 << 40, RAW, [REF, REF], 0.5, 0), m.Cancel(3),
    m.Release([1, 2, 3]), m.Bye(), m.WorkerReady("echo", {"torch": "2"}, ["cuda:0", "cpu"], True),
    m.WorkerStatus({"vae:sdxl:0": 1 << 35}, 5), m.Welcome(1, "0.1", m.Limits(1, 2, 3, 4, 5), m.ArenaInfo("/f", "n")),
    m.Reply(1, {"a": [1, 2.5, None, "x", b"y", True]}, [REF], ["tiled"]), m.Failure(1, "busy", "full", "wait", 1.5),
    m.Progress(1, "tile", 3, 9), m.Job(1, RAW, SPEC, [REF], ["vae:old:1"]), m.Unload(["vae:old:1"]),
]  # fmt: skip
