"""Settings: where they come from, what is refused, and that the page about them is complete."""

from __future__ import annotations

import enum
import json
import logging
import os
import re
from pathlib import Path

import pytest

from luna_daemon.config import CLIP_G_PATH, CLIP_L_PATH, RELOADABLE, VAE_PATH, NamedModel, Settings, load_settings
from luna_daemon.core import ConfigError, ServiceType
from luna_daemon.daemon_server import LunaDaemon

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """A luna.toml of whoever runs the tests must not count."""
    monkeypatch.chdir(tmp_path)


def _toml(folder: Path, text: str) -> Path:
    path = folder / "some.toml"
    path.write_text(text)
    return path


# --- where a value comes from ---


def test_defaults_are_the_constants_users_know():
    """Without any source the constants at the top of config.py count."""
    settings = load_settings({}, {})
    assert (settings.host, settings.port, settings.ws_port) == ("127.0.0.1", 19283, 19284)
    assert settings.vae_path == VAE_PATH
    assert settings.idle_timeout_sec == 30


@pytest.mark.parametrize(
    ("given", "environ", "toml", "expected"),
    [
        ({"port": 1}, {"LUNA_PORT": "2"}, "port = 3", 1),
        ({}, {"LUNA_PORT": "2"}, "port = 3", 2),
        ({"port": None}, {}, "port = 3", 3),
        ({}, {"LUNA_PORT": ""}, "", 19283),
    ],
)
def test_precedence(tmp_path, given, environ, toml, expected):
    """Command line before environment before luna.toml before config.py; what is not given does not count."""
    assert load_settings(given, environ, _toml(tmp_path, toml)).port == expected


def test_sources_add_up(tmp_path):
    """A source that sets one thing leaves what another set alone, and two calls do not see each other's."""
    settings = load_settings({"port": 1}, {"LUNA_WS_PORT": "2"}, _toml(tmp_path, "queue_limit = 3"))
    assert (settings.port, settings.ws_port, settings.queue_limit) == (1, 2, 3)
    assert load_settings({}, {}).queue_limit == 256


def test_toml_of_the_current_folder_is_found(tmp_path):
    """./luna.toml is read without being named, and the settings know where they came from."""
    (tmp_path / "luna.toml").write_text("port = 3")
    settings = load_settings({}, {})
    assert settings.port == 3
    assert settings.toml_path == tmp_path / "luna.toml"


def test_luna_config_names_the_file_and_the_argument_goes_first(tmp_path):
    """LUNA_CONFIG is read; --config beats it."""
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text("port = 1")
    two.write_text("port = 2")
    environ = {"LUNA_CONFIG": str(one)}
    assert load_settings({}, environ).port == 1
    assert load_settings({}, environ, two).port == 2


def test_model_dirs_are_split_like_path(tmp_path):
    """LUNA_MODEL_DIRS holds several folders, separated as in PATH; luna.toml has a list."""
    environ = {"LUNA_MODEL_DIRS": os.pathsep.join(["/a", "/b c", ""])}
    assert load_settings({}, environ).model_dirs == [Path("/a"), Path("/b c")]
    assert load_settings({}, {}, _toml(tmp_path, 'model_dirs = ["/d"]')).model_dirs == [Path("/d")]


def test_comfyui_path_is_read_and_luna_comfyui_path_goes_first():
    """ComfyUI's own variables are understood; ours are the more specific ones."""
    environ = {"COMFYUI_PATH": "/comfy", "COMFYUI_PYTHON": "/python"}
    settings = load_settings({}, environ)
    assert (settings.comfyui_path, settings.comfyui_python) == (Path("/comfy"), Path("/python"))
    assert load_settings({}, {**environ, "LUNA_COMFYUI_PATH": "/mine"}).comfyui_path == Path("/mine")


# --- named models ---


def test_named_models_have_the_default_one_named_after_its_type():
    """VAE_PATH and CLIP_*_PATH make a model called after model_type; an empty path is no file."""
    models = load_settings({"model_type": "sd15", "clip_g_path": ""}, {}).named_models()
    assert models == {"sd15": NamedModel(vae=[VAE_PATH], clip=[CLIP_L_PATH], type="sd15")}
    assert load_settings({}, {}).named_models()["sdxl"].clip == [CLIP_L_PATH, CLIP_G_PATH]


def test_named_models_of_toml_and_environment(tmp_path):
    """[models.NAME] adds a model; LUNA_MODELS is the same in JSON; one named like the default replaces it."""
    text = '[models.flux]\nvae = ["ae.safetensors"]\ntype = "flux"\n[models.sdxl]\nvae = ["x"]'
    models = load_settings({}, {}, _toml(tmp_path, text)).named_models()
    assert models["flux"] == NamedModel(vae=["ae.safetensors"], type="flux")
    assert models["sdxl"].vae == ["x"]
    environ = {"LUNA_MODELS": json.dumps({"mine": {"clip": ["t5"]}})}
    assert load_settings({}, environ).named_models()["mine"].clip == ["t5"]


def test_allowed_origins(tmp_path):
    """A list in luna.toml, separated by spaces or commas in the environment."""
    here, there = "https://pictures.example", "http://10.0.0.1:8188"
    text = 'allowed_origins = ["HTTPS://Pictures.example", "http://10.0.0.1:8188"]'
    assert load_settings({}, {}, _toml(tmp_path, text)).allowed_origins == [here, there]
    for value in (f"{here} {there}", f"{here},{there}", f" {here}, {there} "):
        assert load_settings({}, {"LUNA_ALLOWED_ORIGINS": value}).allowed_origins == [here, there]


def test_settings_reach_a_daemon_in_another_process_as_they_are(tmp_path):
    """What ``LunaDaemon`` was given beats the environment of the child, whose command line goes first."""
    given = {
        "allowed_origins": ["https://pictures.example", "http://10.0.0.1:8188"],
        "comfyui_args": ["--fp32-vae", "a b"],
        "model_dirs": [tmp_path, Path("here")],
        "models": {"mine": NamedModel(vae=["a, b"]), "other": {"clip": ["t5"]}},
        "service_type": ServiceType.VAE_ONLY,
        "vae_path": "",
        "idle_timeout_sec": 0.25,
        "arena": False,
    }
    daemon = LunaDaemon(environ={}, **given)
    environ = {"LUNA_SERVICE_TYPE": "clip", "LUNA_QUEUE_LIMIT": "7", **daemon._environment()}
    child = load_settings({}, environ)
    assert {name: getattr(child, name) for name in given} == {name: getattr(daemon.settings, name) for name in given}
    assert child.model_dirs == [tmp_path, Path.cwd() / "here"] and child.vae_path == "" and child.queue_limit == 7
    assert load_settings({"vae_path": "mine"}, environ).vae_path == "mine"


@pytest.mark.parametrize("text", ["not JSON", '{"port": "x"}', '{"prot": 1}'])
def test_overrides_of_another_process_that_cannot_be_taken(text):
    """Refused like any other source."""
    with pytest.raises(ConfigError):
        load_settings({}, {"LUNA_OVERRIDES": text})


def test_a_field_says_whether_a_running_daemon_takes_it():
    """What sockets, shared memory and clients were told is bound needs a new start."""
    live = {name for name, field in Settings.model_fields.items() if RELOADABLE in field.metadata}
    assert {"queue_limit", "models", "model_dirs", "lora_copy", "log_level"} <= live
    assert live.isdisjoint({"host", "port", "tls_cert", "arena_mb", "max_tensor_mb", "vae_device", "backend"})


# --- what is refused ---


@pytest.mark.parametrize("origin", ["pictures.example", "https://", "https://x/path", "ftp://x", "*", "http://a@b"])
def test_origins_that_are_none(origin):
    """Names setting and value, and shows the form."""
    with pytest.raises(ConfigError, match="allowed_origins") as caught:
        load_settings({"allowed_origins": [origin]}, {})
    assert repr(origin) in caught.value.message and "http://host:port" in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("port", "99999", "65535"),
        ("port", "abc", "integer"),
        ("vae_device", "gpu7", "cuda"),
        ("backend", "fast", "'auto', 'comfy' or 'diffusers'"),
        ("service_type", "both", "'full', 'vae' or 'clip'"),
        ("max_vae_workers", "0", "greater than or equal to 1"),
        ("idle_timeout_sec", "-1", "greater than or equal to 0.1"),
        ("arena", "maybe", "boolean"),
        ("log_level", "LOUD", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ],
)
def test_bad_values_name_setting_value_and_what_is_allowed(name, value, allowed):
    """The error has all three, whether the value comes from the command line or the environment."""
    for given, environ in (({name: value}, {}), ({}, {f"LUNA_{name.upper()}": value})):
        with pytest.raises(ConfigError) as caught:
            load_settings(given, environ)
        assert f"setting '{name}' is '{value}'" in caught.value.message
        assert allowed in caught.value.message
        assert "configuration.md" in caught.value.hint


def test_all_bad_values_are_named_at_once():
    """Two mistakes give one error that names both."""
    with pytest.raises(ConfigError, match=r"'port' is 'x'.*'ws_port' is 'y'"):
        load_settings({}, {"LUNA_PORT": "x", "LUNA_WS_PORT": "y"})


def test_unknown_key_in_toml_is_refused_with_a_suggestion(tmp_path):
    """A slip in luna.toml is an error that says what was probably meant."""
    with pytest.raises(ConfigError, match=r"unknown setting 'vae_devise' \(did you mean 'vae_device'\?\)"):
        load_settings({}, {}, _toml(tmp_path, 'vae_devise = "cpu"'))


def test_unknown_key_of_a_model_is_refused(tmp_path):
    """A slip inside [models.NAME] names the model and the key."""
    with pytest.raises(ConfigError, match=r"models\.flux\.vea"):
        load_settings({}, {}, _toml(tmp_path, '[models.flux]\nvea = ["x"]'))


def test_broken_toml_names_the_file(tmp_path):
    """Text that is not TOML is an error with the file's name."""
    path = _toml(tmp_path, "port = = 3")
    with pytest.raises(ConfigError) as caught:
        load_settings({}, {}, path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_a_named_file_must_exist(tmp_path, how):
    """--config and LUNA_CONFIG with a file that is not there are errors, never ignored."""
    missing = tmp_path / "nowhere.toml"
    given = (missing, {}) if how == "argument" else (None, {"LUNA_CONFIG": str(missing)})
    with pytest.raises(ConfigError, match=r"nowhere\.toml' does not exist"):
        load_settings({}, given[1], given[0])


@pytest.mark.parametrize(
    ("variable", "text", "why"),
    [("LUNA_MODELS", "flux=ae", "Expecting value"), ("LUNA_COMFYUI_ARGS", "--x 'y", "No closing quotation")],
)
def test_variables_that_cannot_be_parsed(tmp_path, variable, text, why):
    """The error names the variable and its value, not luna.toml."""
    with pytest.raises(ConfigError, match=f"^{variable} is .*{why}"):
        load_settings({}, {variable: text}, _toml(tmp_path, "queue_limit = 3"))


def test_unknown_variable_is_warned_about(caplog):
    """A slip in a variable's name is ignored, but said, with what was probably meant."""
    with caplog.at_level(logging.WARNING, "luna_daemon"):
        assert load_settings({}, {"LUNA_PROT": "3"}).port == 19283
    assert caplog.messages == ["LUNA_PROT is not a setting and is ignored; did you mean LUNA_PORT?"]


def test_variables_that_are_no_settings_are_not_warned_about(caplog):
    """The variables of the token and the file itself, and everybody else's, are none of our settings."""
    environ = {"LUNA_TOKEN": "x", "LUNA_TOKEN_FILE": "/x", "LUNARVIM": "1", "PATH": "/bin"}
    load_settings({}, environ)
    assert not caplog.messages


def test_settings_cannot_be_changed():
    """What was checked stays as it was checked."""
    with pytest.raises(ValueError, match="frozen"):
        load_settings({}, {}).port = 1


def test_service_type_is_an_enum_member():
    """Text becomes the enum, so that the daemon compares members."""
    assert load_settings({"service_type": "vae"}, {}).service_type is ServiceType.VAE_ONLY


# --- the page ---


def _rows() -> dict[str, tuple[str, ...]]:
    """Setting to (environment variable, default, meaning), as the page has them."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(.*?)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    return {row[0]: row[1:] for row in rows}


def _written(default: object) -> str:
    value = default.value if isinstance(default, enum.Enum) else default
    return "none" if value is None else json.dumps(value)


def test_the_page_has_every_setting_with_its_default():
    """docs/configuration.md lists exactly the settings there are, their variables, defaults and descriptions."""
    assert _rows() == {
        name: (f"LUNA_{name.upper()}", _written(field.default), field.description)
        for name, field in Settings.model_fields.items()
    }


def test_the_page_s_example_is_valid(tmp_path):
    """The example luna.toml of the page loads."""
    example = re.search(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example is not None
    settings = load_settings({}, {}, _toml(tmp_path, example[1]))
    assert settings.named_models()["flux"].type == "flux"
