"""The pack as a whole: importable anywhere, one ``luna_daemon``, nothing of ComfyUI's shadowed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def run(code: str, cwd: Path) -> str:
    """Output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loading(name: str, folder: Path) -> str:
    """Code that loads the pack as ComfyUI does."""
    return (
        "import sys, importlib.util as u\n"
        f"s = u.spec_from_file_location({name!r}, {str(folder / '__init__.py')!r})\n"
        f"m = u.module_from_spec(s); sys.modules[{name!r}] = m; s.loader.exec_module(m)\n"
    )


def test_it_needs_neither_comfyui_nor_torch(tmp_path):
    """Loaded under a path with a hyphen, as ComfyUI does; without torch, comfy, folder_paths."""
    block = (
        "class B:\n def find_spec(self, n, *a):\n"
        "  if n.split('.')[0] in ('torch', 'comfy', 'folder_paths'): raise ImportError(n)\n"
    )
    code = f"import sys\n{block}sys.meta_path.insert(0, B())\n{loading('/packs/luna-daemon', ROOT)}"
    code += "print(len(m.NODE_CLASS_MAPPINGS), *[c.INPUT_TYPES() and 1 for c in m.NODE_CLASS_MAPPINGS.values()])"
    assert run(code, tmp_path).split() == ["9"] + ["1"] * 9


def test_the_folder_is_appended_only_where_the_package_is_not_found(tmp_path):
    """Last on the path, never first: ComfyUI has a module named nodes, and so have we."""
    code = loading("/packs/luna-daemon", ROOT) + (
        "print(sys.path[-1], 'nodes' in sys.modules, sum(n.endswith('luna_daemon') for n in sys.modules))"
    )
    hidden = f"import sys\nsys.path[:] = [p for p in sys.path if 'site-packages' in p or 'lib' in p]\n{code}"
    found = run(hidden, tmp_path).split()
    assert found[1:] == ["False", "1"]
    (tmp_path / "lib" / "luna_daemon" / "web").mkdir(parents=True)  # a folder that is no package
    bare = f"import sys\nsys.path.append({str(tmp_path / 'lib')!r})\n{hidden}"
    assert run(bare, tmp_path).split()[1:] == ["False", "1"]
    known = run(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); n = len(sys.path)\n{code}; print(len(sys.path) - n)", tmp_path
    )
    assert known.split()[-1] == "0"


def test_a_checkout_named_like_the_package_is_the_package(tmp_path):
    """``import luna_daemon`` from the folder around such a checkout gives the package inside."""
    (tmp_path / "luna_daemon").symlink_to(ROOT)
    code = "import sys; sys.path.insert(0, '.'); import luna_daemon, luna_daemon.core; print(luna_daemon.__version__)"
    assert run(code, tmp_path) == run("import luna_daemon; print(luna_daemon.__version__)", ROOT)


def test_loaded_as_a_plain_module_it_has_no_nodes(tmp_path):
    """Test runners load it under the name ``__init__``: no error."""
    assert run(loading("__init__", ROOT) + "print(m.NODE_CLASS_MAPPINGS)", tmp_path) == "{}"


def test_every_node_has_a_name_and_a_help_page(pack):
    """What users see: a display name, and a page that ComfyUI shows for the class id."""
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert pack.WEB_DIRECTORY == "./web"
    for name in pack.NODE_CLASS_MAPPINGS:
        assert (ROOT / "web" / "docs" / f"{name}.md").read_text("utf-8").startswith("# Luna ")


def test_requirements_are_the_packages_own():
    """Each line of requirements.txt is one of the package's dependencies, with the same bound."""
    given = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    plain = {re.sub(r"[\s'\"]", "", one) for one in given}
    lines = [line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert {re.sub(r"[\s'\"]", "", line) for line in lines} <= plain


@pytest.mark.parametrize("file", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda file: file.stem)
def test_example_workflows_hold_together(file):
    """Every link leads from an output to an input that knows it."""
    graph = json.loads(file.read_text("utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    for number, source, slot, target, place, kind in graph["links"]:
        assert nodes[source]["outputs"][slot]["type"] == kind and number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == number
