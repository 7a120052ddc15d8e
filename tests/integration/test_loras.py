"""The LoRA cache with a real daemon, real files and real processes: shared, private when written to, never refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from luna_daemon.core import BadRequest, LimitExceeded, ModelLoadError, ModelMismatchError, ModelNotFound
from tests.integration.conftest import ROOT

MB = 1 << 20


def make(path: Path, seed: int = 0, mb: float = 1.0, tensors: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA file of about this size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    each = int(mb * MB / 2 / tensors / 64)
    state = {f"block.{n}.up": torch.randn(64, each, generator=generator).half() for n in range(tensors)}
    state["block.0.alpha"] = torch.tensor(4.0)
    save_file(state, path)
    return state


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ComfyUI's LoRA folder, of a ComfyUI that is nothing but folders."""
    return tmp_path_factory.mktemp("comfy") / "models" / "loras"


@pytest.fixture(scope="module")
def daemon(start_module_daemon, folder):
    folder.mkdir(parents=True)
    return start_module_daemon(comfyui_path=folder.parents[1], comfyui_python=sys.executable, backend="diffusers")


@pytest.fixture
def client(daemon):
    with daemon.client() as client:
        yield client
        client.evict_lora()


def lora(client: Any, name: str) -> dict[str, Any]:
    """A LoRA's figures."""
    found: dict[str, Any] = client.lora_stats()["loras"][name]
    return found


class Peer:
    """A process of ``lora_peer.py``; one without a daemon is told of it later."""

    def __init__(self, daemon: Any = None) -> None:
        where = (str(daemon.port), str(daemon.runtime_dir)) if daemon else ("1", "")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("lora_peer.py")), *where],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, **order: Any) -> dict[str, Any]:
        self.tell(**order)
        return self.answer()

    def tell(self, **order: Any) -> None:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


# --- what a client gets ------------------------------------------------------------------------------------------


def test_the_same_bits_and_the_figures(client, folder):
    """By name and by path, in folders; hits, misses, bytes, and by how many it is mapped, until it lets go."""
    state = make(folder / "style" / "ink.safetensors")
    found = client.load_lora("style/ink.safetensors")
    assert equal(found, state) and equal(load_file(folder / "style" / "ink.safetensors"), found)
    again = client.load_lora(str(folder / "style" / "ink.safetensors"))
    assert equal(again, state)
    figures = lora(client, "style/ink.safetensors")
    assert (figures["kind"], figures["hits"], figures["misses"], figures["clients"]) == ("file", 1, 1, 1)
    assert figures["bytes"] == (folder / "style" / "ink.safetensors").stat().st_size and figures["load_s"] > 0
    assert figures["tensors"] == 5 and client.get_daemon_info()["caches"]["lora"]["loras"].keys() == {
        "style/ink.safetensors"
    }
    del found, again
    assert lora(client, "style/ink.safetensors")["clients"] == 0


@pytest.mark.parametrize("kind", ["file", "arena"])
def test_a_write_is_seen_by_nobody_else(start_daemon, tmp_path, kind):
    """Not by the same process, not by another, not by the file, not by who comes later; mapped or copied."""
    path = tmp_path / "models" / "loras" / "a.safetensors"
    state = make(path)
    raw = path.read_bytes()
    daemon = start_daemon(comfyui_path=tmp_path, lora_copy="always" if kind == "arena" else "never")
    with daemon.client() as client, Peer(daemon) as peer:
        mine, other = client.load_lora("a.safetensors"), client.load_lora("a.safetensors")
        before = peer.ask(do="load", name="a.safetensors")["sum"]
        assert lora(client, "a.safetensors")["kind"] == kind and lora(client, "a.safetensors")["clients"] == 2
        mine["block.1.up"].mul_(0).add_(7)
        assert peer.ask(do="write", key="block.2.up", value=3.0)["sum"] != before
        assert bool((mine["block.1.up"] == 7).all()) and equal(other, state)
        assert equal({**mine, "block.1.up": state["block.1.up"]}, state)
        assert path.read_bytes() == raw and equal(client.load_lora("a.safetensors"), state)


@pytest.fixture(scope="module")
def ten_peers():
    """Ten processes that have imported what they need; each test tells them of its daemon."""
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer()) for _ in range(10)]
        yield peers
        for peer in peers:  # all end at the same time, not one after the other
            peer.process.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="PSS is Linux' own")
@pytest.mark.parametrize("kind", ["file", "arena"])
def test_ten_processes_hold_it_once(start_daemon, tmp_path, ten_peers, kind):
    """All have read all of it: together they have one copy, and hardly anything of their own."""
    size = 64 * MB
    make(tmp_path / "models" / "loras" / "big.safetensors", mb=64)
    make(tmp_path / "models" / "loras" / "first.safetensors", mb=0.1)
    daemon = start_daemon(comfyui_path=tmp_path, lora_copy="always" if kind == "arena" else "never")
    peers = ten_peers
    for peer in peers:
        peer.ask(do="connect", port=daemon.port, runtime_dir=str(daemon.runtime_dir))
    for peer in peers:  # what a process needs for its first LoRA, code above all, is no part of the next one
        peer.ask(do="load", name="first.safetensors")
    started = psutil.Process(daemon.process.pid).memory_full_info().uss
    before = [peer.ask(do="nothing") for peer in peers]
    for peer in peers:
        peer.tell(do="load", name="big.safetensors")
    sums = {peer.answer()["sum"] for peer in peers}
    after = [peer.ask(do="nothing") for peer in peers]
    assert len(sums) == 1 and sums != {0.0}
    together = sum(a["pss"] - b["pss"] for a, b in zip(after, before))
    assert size * 0.8 < together < size * 1.1
    assert max(a["uss"] - b["uss"] for a, b in zip(after, before)) < size * 0.05
    assert psutil.Process(daemon.process.pid).memory_full_info().uss - started < size * 0.25
    figures = daemon.info()["caches"]["lora"]["loras"]["big.safetensors"]
    assert (figures["clients"], figures["misses"], figures["hits"]) == (10, 1, 9)
    for peer in peers:
        peer.ask(do="drop")


def test_what_is_asked_for_at_once_is_loaded_once(client, daemon, folder):
    """Twelve clients, one read: the others wait for it."""
    state = make(folder / "many.safetensors", mb=48)
    results: list[bool] = []
    start = threading.Barrier(12)

    def load() -> None:
        with daemon.client() as own:
            own.ping()
            start.wait()
            results.append(equal(own.load_lora("many.safetensors"), state))

    threads = [threading.Thread(target=load) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = lora(client, "many.safetensors")
    assert results == [True] * 12 and (figures["misses"], figures["hits"]) == (1, 11)


def test_by_the_socket(client, daemon, folder):
    """A client that shares nothing with the daemon gets the same bits, its own."""
    state = make(folder / "remote.safetensors")
    with daemon.client(use_arena=False) as remote:
        found = remote.load_lora("remote.safetensors")
        assert equal(found, state)
        found["block.0.up"].zero_()
        assert equal(remote.load_lora("remote.safetensors"), state)
    assert equal(client.load_lora("remote.safetensors"), state)


def test_a_file_that_the_client_cannot_open_comes_as_bytes(client, folder, monkeypatch):
    """Another container's file: seen to differ, asked for again, and mapped from shared memory."""
    from luna_daemon.files import mapping

    state = make(folder / "elsewhere.safetensors")
    monkeypatch.setattr(mapping, "same_file", lambda *facts: False)
    assert equal(client.load_lora("elsewhere.safetensors"), state)
    assert lora(client, "elsewhere.safetensors")["kind"] == "arena"


def test_tensors_outlive_client_and_daemon(start_daemon, tmp_path):
    """A daemon that is stopped takes nothing away from who holds a LoRA."""
    state = make(tmp_path / "models" / "loras" / "a.safetensors")
    for copy in ("never", "always"):
        daemon = start_daemon(comfyui_path=tmp_path, lora_copy=copy)
        client = daemon.client()
        found = client.load_lora("a.safetensors")
        client.close()
        assert daemon.info()["caches"]["lora"]["loras"]["a.safetensors"]["clients"] == 1
        daemon.stop()
        assert equal(found, state)


def test_what_clients_put(client, daemon):
    """Under a name of their own, for every client; replaced by the next of that name."""
    state = {"up": torch.randn(300, 300), "alpha": torch.tensor(2.0), "turned": torch.randn(4, 5).t()}
    assert client.put_lora("mine", state) == 300 * 300 * 4 + 4 + 80
    with daemon.client() as other:
        found = other.load_lora("mine")
        assert equal(found, state) and found["turned"].stride() == (1, 5)
        found["up"].zero_()
        assert equal(other.lora_cache_get("mine"), state) and other.has_lora("mine")
    client.put_lora("mine", {"up": torch.ones(3)})
    assert equal(client.load_lora("mine"), {"up": torch.ones(3)}) and lora(client, "mine")["kind"] == "put"


def test_the_old_names_reach_files_too(client, folder):
    """``lora_cache_check`` and ``lora_cache_get`` of a LoRA that was loaded from its file."""
    state = make(folder / "old.safetensors")
    assert not client.lora_cache_check("old.safetensors") and client.lora_cache_get("old.safetensors") is None
    client.warm_lora("old.safetensors")
    assert client.lora_cache_check("old.safetensors") and equal(client.lora_cache_get("old.safetensors"), state)


# --- which file --------------------------------------------------------------------------------------------------


def test_an_unknown_name(client, folder):
    """Says what is close, and where it was looked for."""
    make(folder / "watercolour.safetensors")
    with pytest.raises(ModelNotFound, match=r"'watercolor\.safetensors'.*loras.*watercolour\.safetensors"):
        client.load_lora("watercolor.safetensors")
    for name in ("", "a\0b", "x" * 5000):
        with pytest.raises(BadRequest, match="is empty, too long"):
            client.load_lora(name)


def test_outside_the_folders(client, folder, tmp_path):
    """By dots, by a full path, by a link: refused without a word about what is in it."""
    make(tmp_path / "secret.safetensors")
    make(folder.parent / "checkpoint.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "inside.safetensors").unlink(missing_ok=True)
    for name in (str(tmp_path / "secret.safetensors"), "../checkpoint.safetensors", "link.safetensors"):
        with pytest.raises(ModelNotFound, match="outside the LoRA folders"):
            client.load_lora(name)
    with pytest.raises(ModelNotFound, match="not a file"):
        client.load_lora(".")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(BadRequest, match="not a LoRA file"):
        client.load_lora("notes.txt")


def test_extra_model_paths(start_daemon, tmp_path):
    """``extra_model_paths.yaml`` and the file that a flag names, as ComfyUI reads them; its own folder comes first."""
    own, extra, more = tmp_path / "ui" / "models" / "loras", tmp_path / "extra" / "lora", tmp_path / "more"
    first, second = make(own / "both.safetensors", 1), make(extra / "both.safetensors", 2)
    third, fourth = make(extra / "third.safetensors", 3), make(more / "fourth.safetensors", 4)
    (tmp_path / "ui" / "extra_model_paths.yaml").write_text(
        f"a1111:\n    base_path: {tmp_path / 'extra'}\n    loras: |\n        nothing\n        lora\n"
        "    vae: x\nempty:\n"
    )
    (tmp_path / "more.yaml").write_text("other:\n    loras: more\n")
    daemon = start_daemon(
        comfyui_path=tmp_path / "ui", comfyui_args=f"--extra-model-paths-config {tmp_path / 'more.yaml'}"
    )
    with daemon.client() as client:
        assert equal(client.load_lora("both.safetensors"), first)
        assert equal(client.load_lora("third.safetensors"), third)
        assert equal(client.load_lora("fourth.safetensors"), fourth)
        assert equal(client.load_lora(str(extra / "both.safetensors")), second)
        assert client.lora_stats()["loras"].keys() == {
            "both.safetensors", "third.safetensors", "fourth.safetensors", str(extra / "both.safetensors"),
        }  # fmt: skip


def test_a_file_that_was_replaced_is_loaded_anew(client, folder):
    """By another file or in place; who holds the old one keeps it."""
    path = folder / "changing.safetensors"
    old = make(path, 1)
    held = client.load_lora("changing.safetensors")
    new = make(folder / "new.tmp", 2)
    os.replace(folder / "new.tmp", path)
    assert equal(client.load_lora("changing.safetensors"), new) and equal(held, old)
    figures = lora(client, "changing.safetensors")
    assert (figures["misses"], figures["hits"]) == (2, 0)


def test_another_file_of_that_path_is_never_taken_for_it(client, folder, monkeypatch):
    """A client's own file that differs from the daemon's: refused, not answered with other weights."""
    from luna_daemon.files import mapping
    from luna_daemon.wire.messages import FileId

    path = folder / "twin.safetensors"
    make(path)
    facts = path.stat()
    for theirs in (FileId(str(path), facts.st_size + 1), FileId(str(path), 0, 5), FileId(str(path), 0, 0, 1)):
        monkeypatch.setattr(mapping, "_own_file", lambda name, theirs=theirs: theirs)
        with pytest.raises(ModelMismatchError, match=r"twin\.safetensors"):
            client.load_lora(str(path))


# --- bad files ---------------------------------------------------------------------------------------------------


def test_a_dtype_that_cannot_be_sent(client, folder):
    """A valid file whose tensors cannot reach a client is refused as such, and not as broken."""
    save_file({"a": torch.zeros(2, dtype=torch.uint16)}, folder / "wide.safetensors")
    with pytest.raises(ModelLoadError, match=r"'wide.safetensors': tensor 'a' has dtype uint16"):
        client.load_lora("wide.safetensors")


def test_a_corrupt_file(client, daemon, folder):
    """Cut, empty, lying: a typed error that names it; the daemon serves on, and nothing is kept."""
    whole = folder / "whole.safetensors"
    state = make(whole)
    data = whole.read_bytes()
    for number, broken in enumerate((b"", data[:7], data[:1000], data[:-1], data + b"x", b"\xff" * 100)):
        (folder / f"broken{number}.safetensors").write_bytes(broken)
        for _ in range(2):
            with pytest.raises(ModelLoadError, match=f"'broken{number}.safetensors' is not a valid safetensors file"):
                client.load_lora(f"broken{number}.safetensors")
    with daemon.client(use_arena=False) as remote, pytest.raises(ModelLoadError, match="broken2"):
        remote.load_lora("broken2.safetensors")
    assert equal(client.load_lora("whole.safetensors"), state) and client.lora_stats()["loras"].keys() == {
        "whole.safetensors"
    }


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".bin"])
def test_torchs_own_formats_are_converted_once(client, folder, ending):
    """What ComfyUI finds in the file, also below ``state_dict``; views and transposed tensors are equal too."""
    base = torch.randn(40, 6)
    state = {"up": base, "view": base[3:9], "down": torch.randn(6, 40).t().half(), "alpha": torch.tensor(4)}
    path = folder / f"old{ending}"
    torch.save({"state_dict": state, "epoch": 3} if ending == ".ckpt" else state, path)
    assert equal(client.load_lora(path.name), state) and equal(client.load_lora(path.name), state)
    figures = lora(client, path.name)
    assert (figures["kind"], figures["misses"], figures["hits"]) == ("arena", 1, 1) and figures["load_s"] > 0


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def test_a_malicious_pickle_is_refused(client, folder, tmp_path):
    """Nothing of it is executed, in both of torch's formats; and no file is left over."""
    for zipped in (True, False):
        path = folder / f"evil{zipped}.pt"
        torch.save({"up": Malicious(tmp_path / "pwned")}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            ModelLoadError, match=r"evil.*\.pt' cannot be converted: the file cannot be loaded as weights only"
        ):
            client.load_lora(path.name)
    torch.save({"up": torch.ones(1), "step": 3}, folder / "mixed.pt")
    with pytest.raises(ModelLoadError, match="more than tensors"):
        client.load_lora("mixed.pt")
    (folder / "text.pt").write_text("not a pickle")
    with pytest.raises(ModelLoadError, match=r"text\.pt"):
        client.load_lora("text.pt")
    torch.save({"up": torch.ones(1).expand(1 << 40)}, folder / "endless.pt")
    with pytest.raises(ModelLoadError, match="the limit is"):
        client.load_lora("endless.pt")
    assert not (tmp_path / "pwned").exists()
    arena = Path(client.get_daemon_info()["arena"]["folder"])
    assert not list(arena.glob("lora-*"))


def test_a_conversion_is_not_waited_for_for_ever(start_daemon, tmp_path):
    """An interpreter that hangs is ended when the daemon stops; meanwhile the daemon answers others."""
    (tmp_path / "models" / "loras").mkdir(parents=True)
    torch.save({"up": torch.ones(1)}, tmp_path / "models" / "loras" / "slow.pt")
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(100)\n")
    python.chmod(0o755)
    daemon = start_daemon(comfyui_path=tmp_path, comfyui_python=python, backend="diffusers")
    client = daemon.client()
    signs: list[str] = []
    failed: list[BaseException] = []

    def load() -> None:
        try:
            client.load_lora("slow.pt", on_progress=lambda progress: signs.append(progress.stage))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    daemon.wait_for(lambda info: signs == ["loading"])
    (hanging,) = daemon.workers()
    daemon.stop()
    thread.join(10)
    assert failed and not hanging.is_running()


# --- room --------------------------------------------------------------------------------------------------------


def test_larger_than_the_cache(start_daemon, tmp_path):
    """Served all the same, uncached: mapped, converted, by the socket."""
    loras = tmp_path / "models" / "loras"
    state = make(loras / "big.safetensors", mb=4)
    torch.save(state, loras / "big.pt")
    daemon = start_daemon(comfyui_path=tmp_path, comfyui_python=sys.executable, lora_cache_gb=0.001)
    with daemon.client() as client, daemon.client(use_arena=False) as remote:
        for name in ("big.safetensors", "big.pt"):
            assert equal(client.load_lora(name), state) and equal(remote.load_lora(name), state)
        stats = client.lora_stats()
        assert (stats["entries"], stats["uncached"]) == (0, 4)
        assert not client.warm_lora("big.safetensors")["kept"]
        with pytest.raises(LimitExceeded, match=r"'big\.safetensors' cannot be pinned"):
            client.pin_lora("big.safetensors")
        with pytest.raises(LimitExceeded, match=r"'mine' has .* finds no room"):
            client.put_lora("mine", state)
        used = client.get_daemon_info()["arena"]["used"]
        assert used < MB, f"{used} bytes of the arena were not given back"


def test_all_in_use(start_daemon, tmp_path):
    """A further LoRA is served uncached; once the first is let go, it takes its place."""
    loras = tmp_path / "models" / "loras"
    states = {name: make(loras / name, seed) for seed, name in enumerate(["a.safetensors", "b.safetensors"])}
    daemon = start_daemon(comfyui_path=tmp_path, lora_cache_entries=1)
    with daemon.client() as client, daemon.client() as other:
        held = client.load_lora("a.safetensors")
        assert equal(other.load_lora("b.safetensors"), states["b.safetensors"])
        assert client.lora_stats()["loras"].keys() == {"a.safetensors"} and client.lora_stats()["uncached"] == 1
        del held
        client.ping()
        other.load_lora("b.safetensors")
        assert client.lora_stats()["loras"].keys() == {"b.safetensors"}


def test_a_killed_client_gives_up_what_it_used(start_daemon, tmp_path):
    """Its pins are gone with its process."""
    loras = tmp_path / "models" / "loras"
    make(loras / "a.safetensors"), make(loras / "b.safetensors", 2)
    daemon = start_daemon(comfyui_path=tmp_path, lora_cache_entries=1)
    with daemon.client() as client, Peer(daemon) as peer:
        peer.ask(do="load", name="a.safetensors")
        client.warm_lora("b.safetensors")
        assert lora(client, "a.safetensors")["clients"] == 1 and len(client.lora_stats()["loras"]) == 1
        peer.process.kill()
        daemon.wait_for(lambda info: info["caches"]["lora"]["loras"]["a.safetensors"]["clients"] == 0)
        client.warm_lora("b.safetensors")
        assert client.lora_stats()["loras"].keys() == {"b.safetensors"}


def test_pin_unpin_evict(client, folder):
    """A pinned LoRA is loaded and stays when all go; evicted by name it goes, and who holds it keeps its bits."""
    state = make(folder / "kept.safetensors")
    make(folder / "other.safetensors")
    assert client.pin_lora(str(folder / "kept.safetensors")) == "kept.safetensors"
    assert lora(client, "kept.safetensors")["pinned"]
    client.warm_lora("other.safetensors")
    assert client.evict_lora() == ["other.safetensors"]
    held = client.load_lora("kept.safetensors")
    assert client.pin_lora("kept.safetensors", False) == "kept.safetensors"
    assert not lora(client, "kept.safetensors")["pinned"]
    assert client.evict_lora("kept.safetensors") == ["kept.safetensors"] and equal(held, state)
    for call in (client.evict_lora, lambda name: client.pin_lora(name, False)):
        with pytest.raises(ModelNotFound, match=r"'kept\.safetensors' is not in the cache"):
            call("kept.safetensors")
    with pytest.raises(ModelNotFound, match=r"'absent\.safetensors'"):
        client.pin_lora("absent.safetensors")


def test_without_shared_memory(start_daemon, tmp_path):
    """Files are mapped all the same; copies go by the socket."""
    loras = tmp_path / "models" / "loras"
    state = make(loras / "a.safetensors")
    torch.save(state, loras / "a.pt")
    daemon = start_daemon(comfyui_path=tmp_path, comfyui_python=sys.executable, arena="false")
    with daemon.client() as client:
        held = [client.load_lora(name) for name in ("a.safetensors", "a.pt")]
        assert all(equal(one, state) for one in held)
        assert lora(client, "a.safetensors")["clients"] == 1
        client.put_lora("mine", state)
        assert equal(client.load_lora("mine"), state)
