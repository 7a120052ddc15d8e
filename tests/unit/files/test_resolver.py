"""From names and paths to files: found where ComfyUI's loaders look, never outside the folders, never another file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from luna_daemon.config import load_settings
from luna_daemon.core import BadRequest, ModelMismatchError, ModelNotFound
from luna_daemon.files.identity import file_id, load_bytes
from luna_daemon.files.resolver import DigestUnknown, ModelResolver
from luna_daemon.wire.messages import FileId, LoadSpec, ModelRef


class Place:
    """A ComfyUI folder, another model folder, and a resolver made of settings."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.comfyui = root / "ComfyUI"
        self.models = self.comfyui / "models"
        self.other = root / "other"
        self.config = root / "config" / "luna.toml"
        for folder in ("vae", "text_encoders", "clip", "checkpoints"):
            (self.models / folder).mkdir(parents=True)
        self.other.mkdir()
        self.config.parent.mkdir()
        self.config.touch()

    def file(self, path: str, size: int = 10) -> Path:
        """A file below ``root``."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
        return file

    def resolver(self, **settings) -> ModelResolver:
        given = {"comfyui_path": self.comfyui, "model_dirs": [self.other], **settings}
        return ModelResolver(load_settings(given, {}, self.config), self.config.parent)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path.resolve())


def by_name(name: str, kind: str = "vae", **more) -> ModelRef:
    return ModelRef(kind, name=name, **more)


def by_file(*paths: Path | str, kind: str = "vae", **more) -> ModelRef:
    return ModelRef(kind, files=tuple(FileId(str(path)) for path in paths), **more)


# --- by name -----------------------------------------------------------------------------------------------------


def test_the_default_model_lies_below_comfyui(place):
    """The predecessor's paths, relative to ComfyUI's folder, are the model named after the family."""
    vae = place.file("ComfyUI/models/vae/sdxl_vae.safetensors")
    clip_l, clip_g = (place.file(f"ComfyUI/models/clip/clip_{x}.safetensors") for x in "lg")
    resolver = place.resolver()
    spec = resolver.resolve(by_name("sdxl"))
    assert (spec.kind, spec.type, spec.files) == ("vae", "sdxl", (str(vae),))
    assert resolver.resolve(by_name("sdxl", "clip")).files == (str(clip_l), str(clip_g))


def test_an_empty_clip_g_is_left_out(place):
    """A family with one text encoder has one file."""
    clip_l = place.file("ComfyUI/models/clip/clip_l.safetensors")
    assert place.resolver(clip_g_path="").resolve(by_name("sdxl", "clip")).files == (str(clip_l),)


@pytest.mark.parametrize("asked", ["sdxl", "SDXL", "SdXl"])
def test_names_do_not_depend_on_case(place, asked):
    """A node that says SDXL means sdxl."""
    place.file("ComfyUI/models/vae/sdxl_vae.safetensors")
    assert place.resolver().resolve(by_name(asked)).type == "sdxl"


@pytest.mark.parametrize("asked", ["MyModel", "mymodel"])
def test_configured_names_do_not_depend_on_case(place, asked):
    """A name with capitals in the configuration is found as it is written, and in small letters."""
    place.file("other/a.safetensors")
    resolver = place.resolver(models={"MyModel": {"vae": ["a.safetensors"]}})
    assert resolver.resolve(by_name(asked)).files == (str(place.other / "a.safetensors"),)


def test_an_unknown_name_lists_the_known(place):
    """The error names what was asked and what there is."""
    with pytest.raises(ModelNotFound, match=r"'flux'.*Names: sdxl, mine"):
        place.resolver(models={"mine": {"vae": ["a"]}}).resolve(by_name("flux"))


def test_a_model_without_that_kind(place):
    """A model with a VAE only has no text encoders, and the error says so."""
    with pytest.raises(ModelNotFound, match="'mine' has no clip"):
        place.resolver(models={"mine": {"vae": ["a"]}}).resolve(by_name("mine", "clip"))


@pytest.mark.parametrize(
    "kind, written, lies",
    [
        ("vae", "a.safetensors", "ComfyUI/models/vae/a.safetensors"),
        ("vae", "sub/a.safetensors", "ComfyUI/models/vae/sub/a.safetensors"),
        ("vae", "a.safetensors", "ComfyUI/models/checkpoints/a.safetensors"),
        ("vae", "a.safetensors", "other/a.safetensors"),
        ("vae", "a.safetensors", "other/vae/a.safetensors"),
        ("vae", "models/vae/a.safetensors", "ComfyUI/models/vae/a.safetensors"),
        ("vae", "a.safetensors", "config/a.safetensors"),
        ("clip", "a.safetensors", "ComfyUI/models/text_encoders/a.safetensors"),
        ("clip", "a.safetensors", "ComfyUI/models/clip/a.safetensors"),
        ("clip", "a.safetensors", "ComfyUI/models/checkpoints/a.safetensors"),
    ],
)
def test_where_configured_files_are_looked_for(place, kind, written, lies):
    """In the loaders' folders of each kind, in every model folder, below ComfyUI, and beside the configuration."""
    file = place.file(lies)
    spec = place.resolver(models={"mine": {kind: [written]}}).resolve(by_name("mine", kind))
    assert spec.files == (str(file),)


def test_absolute_paths_of_the_configuration_are_taken(place):
    """The user may name any file of the machine."""
    file = place.file("anywhere/a.safetensors")
    assert place.resolver(models={"mine": {"vae": [str(file)]}}).resolve(by_name("mine")).files == (str(file),)


def test_the_folder_of_a_configured_file_is_trusted(place, monkeypatch):
    """However the configuration writes it: a client may name the file, and its neighbours, by path."""
    monkeypatch.setenv("HOME", str(place.root))
    monkeypatch.setenv("USERPROFILE", str(place.root))
    file, neighbour = place.file("anywhere/a.safetensors"), place.file("anywhere/b.safetensors")
    for written in (str(file), "~/anywhere/a.safetensors"):
        resolver = place.resolver(models={"mine": {"vae": [written]}})
        assert resolver.resolve(by_name("mine")).files == (str(file),)
        assert resolver.resolve(by_file(neighbour)).files == (str(neighbour),)


def test_a_kind_has_its_own_folders(place):
    """A text encoder of the same name is not taken for a VAE."""
    place.file("ComfyUI/models/text_encoders/a.safetensors")
    with pytest.raises(ModelNotFound):
        place.resolver(models={"mine": {"vae": ["a.safetensors"]}}).resolve(by_name("mine"))


def test_the_error_lists_every_place_tried(place):
    """Nothing found: every folder that was looked in is named."""
    with pytest.raises(ModelNotFound) as caught:
        place.resolver(models={"mine": {"vae": ["a.safetensors"]}}).resolve(by_name("mine"))
    for tried in ("models/vae/", "models/checkpoints/", "models/", "../other/vae/", "../other/", "../config/"):
        assert str((place.comfyui / tried / "a.safetensors").resolve()) in str(caught.value), tried


def test_without_any_folder_the_error_says_what_to_set(tmp_path):
    """A client's file name with nowhere to look names the settings."""
    (tmp_path / "luna.toml").touch()
    resolver = ModelResolver(load_settings({}, {}, tmp_path / "luna.toml"))
    with pytest.raises(ModelNotFound, match="comfyui_path or model_dirs"):
        resolver.resolve(by_file("a.safetensors"))


# --- by file -----------------------------------------------------------------------------------------------------


def test_a_clients_file_in_a_model_folder(place):
    """Absolute or as a loader lists it, the same file is found, named after itself."""
    file = place.file("ComfyUI/models/vae/sub/a.safetensors")
    resolver = place.resolver()
    specs = {resolver.resolve(by_file(path)) for path in (file, "sub/a.safetensors", "vae/sub/a.safetensors")}
    (spec,) = specs
    assert spec.files == (str(file),) and spec.key.startswith("vae:a:")


def test_the_family_is_the_clients_or_the_default(place):
    """A file says nothing of its family: the client does, else ``model_type``."""
    file = place.file("other/a.safetensors")
    resolver = place.resolver(model_type="flux")
    assert resolver.resolve(by_file(file)).type == "flux"
    assert resolver.resolve(by_file(file, type="sd15")).type == "sd15"


@pytest.mark.parametrize(
    "path", ["{root}/secret", "../secret", "../../secret", "{root}/other/../secret", "/etc/passwd"]
)
def test_outside_the_folders_nothing_is_read(place, path):
    """Absolute paths, ``..``, and both together: not found, whether the file is there or not."""
    place.file("secret")
    with pytest.raises(ModelNotFound):
        place.resolver().resolve(by_file(path.format(root=place.root)))


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("target", ["secret", "private/secret"])
def test_a_link_that_leads_outside_is_refused(place, target):
    """A link in a model folder, to a file or through a folder, is followed before it is judged."""
    secret = place.file(target)
    (place.other / "link").symlink_to(secret if target == "secret" else secret.parent)
    asked = place.other / "link" if target == "secret" else place.other / "link" / "secret"
    with pytest.raises(ModelNotFound, match="outside the model folders"):
        place.resolver().resolve(by_file(asked))


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_model_folder_that_is_a_link(place):
    """Users link their model folders to another disk: what lies behind the folder itself is inside."""
    file = place.file("disk/a.safetensors")
    (place.root / "linked").symlink_to(place.root / "disk")
    resolver = place.resolver(model_dirs=[place.root / "linked"])
    assert resolver.resolve(by_file(place.root / "linked" / "a.safetensors")).files == (str(file),)


def test_folders_of_configured_files_are_trusted(place):
    """Where the user keeps one named model, clients may use others."""
    place.file("anywhere/named.safetensors")
    file = place.file("anywhere/b.safetensors")
    resolver = place.resolver(models={"mine": {"vae": [str(place.root / "anywhere" / "named.safetensors")]}})
    assert resolver.resolve(by_file(file)).files == (str(file),)


def test_a_folder_with_a_similar_name_is_outside(place):
    """``other-private`` is not below ``other``."""
    file = place.file("other-private/a.safetensors")
    with pytest.raises(ModelNotFound, match="outside"):
        place.resolver().resolve(by_file(file))


@pytest.mark.parametrize("path", ["", "a\0b", "/\0"])
def test_what_is_no_path(place, path):
    """Empty names and NULs are bad requests, not errors of the system."""
    with pytest.raises(BadRequest, match="not a path"):
        place.resolver().resolve(by_file(path))


@pytest.mark.parametrize("path", ["x" * 5000, "a" * 300 + "/b", "~root/x", "nul", "*"])
def test_odd_paths_are_simply_not_found(place, path):
    """Names too long for the system and names with a meaning elsewhere raise nothing else."""
    with pytest.raises(ModelNotFound):
        place.resolver().resolve(by_file(path))


def test_the_same_file_is_accepted(place):
    """What ``file_id`` says on the client's side agrees on the daemon's."""
    file = place.file("other/a.safetensors")
    assert place.resolver().resolve(ModelRef("vae", files=(file_id(file),))).files == (str(file),)


@pytest.mark.parametrize("change", [{"size": 11}, {"mtime_ns": 12345}])
def test_another_file_is_refused(place, change):
    """Another size or time is another file: never answered with other weights, and the error shows both."""
    file = place.file("other/a.safetensors")
    mine = file_id(file)
    facts = {"path": str(file), "size": mine.size, "mtime_ns": mine.mtime_ns, **change}
    (field,) = change
    both = f"client's {field} is {change[field]}, the daemon's {getattr(mine, field)}"
    with pytest.raises(ModelMismatchError, match=both):
        place.resolver().resolve(ModelRef("vae", files=(FileId(**facts),)))


def test_another_content_is_refused(place):
    """A client that does not share our disk gives a digest: a wrong one is a mismatch."""
    file = place.file("other/a.safetensors")
    resolver = place.resolver()
    right = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()

    def resolve(digest):
        return resolver.resolve(ModelRef("vae", files=(FileId(str(file), size=7, digest=digest),)))

    with pytest.raises(DigestUnknown):
        resolve(right)
    resolver.hash(file)
    assert resolve(right).files == (str(file),)
    with pytest.raises(ModelMismatchError, match="digest"):
        resolve("sha256:" + "0" * 64)
    file.write_bytes(b"changed")
    with pytest.raises(DigestUnknown):
        resolve(right)


def test_config_only_takes_no_files(place):
    """With ``config_only`` only names are served."""
    file = place.file("other/a.safetensors")
    with pytest.raises(ModelNotFound, match="config_only"):
        place.resolver(config_only=True).resolve(by_file(file))


# --- what is neither ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ref, says",
    [
        (ModelRef("vae"), "either by name or by files"),
        (ModelRef("vae", name="sdxl", files=(FileId("a"),)), "either by name or by files"),
        (ModelRef("unet", name="sdxl"), "'unet'"),
        (ModelRef("", name="sdxl"), "kind"),
    ],
)
def test_contradictions_are_bad_requests(place, ref, says):
    """Both or neither of name and files, or an unknown kind, is the caller's mistake."""
    with pytest.raises(BadRequest, match=says):
        place.resolver().resolve(ref)


def test_echo_needs_no_files(place):
    """The diagnostic model exists everywhere."""
    assert place.resolver().resolve(ModelRef("echo")) == LoadSpec("echo", "echo", "", (), "cpu", "auto")


# --- identity ----------------------------------------------------------------------------------------------------


def test_devices_and_precisions_are_the_kinds_own(place):
    """VAE and text encoder settings do not mix."""
    file = place.file("other/a.safetensors")
    resolver = place.resolver(vae_device="cuda:1", vae_precision="bf16", clip_device="cpu", clip_precision="fp16")
    vae, clip = resolver.resolve(by_file(file)), resolver.resolve(by_file(file, kind="clip"))
    assert (vae.device, vae.precision, clip.device, clip.precision) == ("cuda:1", "bf16", "cpu", "fp16")


def test_the_key_changes_with_everything_that_decides_bits(place):
    """Family, precision, device, kind, further files and content each make another key; nothing else does."""
    file, second = place.file("other/a.safetensors"), place.file("other/b.safetensors")
    base = place.resolver()
    keys = [
        base.resolve(by_file(file)).key,
        base.resolve(by_file(file, type="flux")).key,
        base.resolve(by_file(file, kind="clip")).key,
        base.resolve(by_file(file, second)).key,
        place.resolver(vae_precision="bf16").resolve(by_file(file)).key,
        place.resolver(vae_device="cpu").resolve(by_file(file)).key,
    ]
    assert place.resolver(clip_device="cpu").resolve(by_file(file)).key == keys[0]
    os.utime(file, ns=(1, 1))
    keys.append(base.resolve(by_file(file)).key)
    file.write_bytes(bytes(11))
    os.utime(file, ns=(1, 1))
    keys.append(base.resolve(by_file(file)).key)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("other", [by_name("SDXL"), by_file("sdxl_vae.safetensors", type="sdxl")], ids=["case", "file"])
def test_one_model_has_one_key(place, other):
    """However a client names it, the same file is loaded once, not once per spelling."""
    place.file("ComfyUI/models/vae/sdxl_vae.safetensors")
    resolver = place.resolver()
    assert resolver.resolve(other).key == resolver.resolve(by_name("sdxl")).key


def test_the_order_of_files_is_part_of_the_key(place):
    """Text encoders in another order are another model."""
    first, second = place.file("other/a.safetensors"), place.file("other/b.safetensors")
    resolver = place.resolver()
    one, two = (resolver.resolve(by_file(*files, kind="clip")) for files in ((first, second), (second, first)))
    assert one.key != two.key and one.files == two.files[::-1]


def test_file_id_of_nothing(tmp_path):
    """A missing file is a typed error that names it."""
    with pytest.raises(ModelNotFound, match=r"nothing\.safetensors"):
        file_id(tmp_path / "nothing.safetensors")


def test_load_bytes_counts_files_and_folders(place):
    """Single files, and the weights of a folder, whatever else lies in it."""
    single = place.file("other/a.safetensors", 10)
    for name, size in (("vae/x.safetensors", 100), ("vae/config.json", 7), ("te/y.safetensors", 1000)):
        place.file(f"other/folder/{name}", size)
    spec = LoadSpec("k", "vae", "sdxl", (str(single), str(place.other / "folder")), "cpu", "auto")
    assert load_bytes(spec) == 1110
