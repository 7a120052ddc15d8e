"""Daemon or ComfyUI: who loads text encoders, checkpoints and the tunnel's objects, and if a mode can be kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luna_daemon.core import DaemonConnectionError, ModelLoadError

EMBEDDINGS = "embeddings"


class Shells:
    """Stands in for the module that makes shells: notes what was made, and gives the local loader as the shell."""

    def __init__(self, error=None, carried=("clip", "vae")):
        self.error, self.carried, self.made = error, carried, []

    def _shell(self, made, source):
        self.made.append(made)
        if self.error:
            raise self.error
        return source

    def make_vae(self, files, source=None):
        return self._shell(("vae", *files), source or "shell")

    def make_clip(self, paths, family, source=None, embedding_directory=None):
        return self._shell(("clip", *paths, family, embedding_directory[0]), source or "shell")

    def make_from_checkpoint(self, path, embedding_directory=None, source=None):
        made = self._shell(("checkpoint", path, embedding_directory[0]), source)
        return made or self.carried

    def load_local_clip(self, paths, family, embeddings):
        return "local", *paths, family, embeddings[0]

    def load_local_checkpoint(self, path, embeddings):
        return f"local clip of {path}", f"local vae of {path}"


@pytest.fixture
def loading(part, comfyui, monkeypatch):
    """The module with stand-ins for shells, and the stand-in."""

    def prepare(**options):
        shells, models = Shells(**options), part("models")
        monkeypatch.setattr(models, "_shells", lambda: shells)
        monkeypatch.setattr(models.host, "embeddings", lambda: [EMBEDDINGS])
        return models, shells

    return prepare


LOADS = {
    "clip": (lambda models, mode: models.load_clip(["a", "b"], "sdxl", mode), ("local", "a", "b", "sdxl", EMBEDDINGS)),
    "checkpoint": (lambda models, mode: models.load_from_checkpoint("c", mode), ("local clip of c", "local vae of c")),
}


@pytest.mark.parametrize("what", LOADS)
def test_the_daemons_object_falls_back_to_comfyuis_loader(loading, what):
    """Automatically; with force_daemon the object refuses instead; with force_local no such object is made."""
    load, local = LOADS[what]
    models, shells = loading()
    assert load(models, "auto")() == local
    with pytest.raises(DaemonConnectionError, match="no local model may step in"):
        load(models, "force_daemon")()
    made = len(shells.made)
    assert load(models, "force_local") == local and len(shells.made) == made


@pytest.mark.parametrize("what", LOADS)
def test_a_file_that_the_daemon_cannot_serve(loading, caplog, what):
    """Is loaded by ComfyUI, with a warning; with force_daemon it is an error."""
    load, local = LOADS[what]
    models, _ = loading(error=ModelLoadError("an odd file"))
    assert load(models, "auto") == local and "without the daemon: an odd file" in caplog.text
    with pytest.raises(ModelLoadError, match="an odd file"):
        load(models, "force_daemon")


def test_the_counterpart_of_a_loaded_object(loading):
    """From the object's own files, or from the checkpoint that carries the part; a part that is not there is named."""
    models, shells = loading()
    assert models.vae_of(["v"], False) == models.clip_of(["t"], "flux", False) == "shell"
    assert shells.made == [("vae", "v"), ("clip", "t", "flux", EMBEDDINGS)]
    assert (models.clip_of(["c"], "", True), models.vae_of(["c"], True)) == ("clip", "vae")
    models, _ = loading(carried=(None, None))
    with pytest.raises(ModelLoadError, match="c carries no text encoders"):
        models.clip_of(["c"], "", True)
    with pytest.raises(ModelLoadError, match="c carries no VAE"):
        models.vae_of(["c"], True)


@pytest.mark.parametrize("running", [True, False])
def test_whether_a_mode_can_be_kept(part, monkeypatch, running):
    """Only force_daemon needs a daemon now; force_local does not even ask."""
    models, asked = part("models"), []
    client = SimpleNamespace(host="h", port=7, is_running=lambda: asked.append(1) or running)
    monkeypatch.setattr(models, "get_client", lambda: client)
    assert models.check_mode("force_local") is False and not asked
    assert models.check_mode("auto") is running
    if running:
        assert models.check_mode("force_daemon") is True
    else:
        with pytest.raises(DaemonConnectionError, match="no Luna Daemon answers at h:7"):
            models.check_mode("force_daemon")
