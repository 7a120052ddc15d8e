"""The package as a whole: documented, importable without torch, layered as designed, nothing in it executes input."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import grimp
import pytest

from benchmarks import sizes
from benchmarks.sizes import PACKAGE, ROOT, files, module_name

FILES = files()
LIGHT_BACKENDS = {"luna_daemon.backends", "luna_daemon.backends.base", "luna_daemon.backends.echo"}
CONTROL = sorted(
    {name for name in map(module_name, FILES) if ".backends" not in name and not name.endswith("__main__")}
    | LIGHT_BACKENDS
)
"""What control process, clients without tensors, and workers before their backend import: every new module too."""


def top_level(tree: ast.Module) -> set[str]:
    """Names that a module defines or imports at its top level, conditional blocks included."""
    found: set[str] = set()
    blocks: list[ast.stmt] = list(tree.body)
    while blocks:
        node = blocks.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.If, ast.Try)):
            blocks += [*node.body, *node.orelse]
    return found


def exported(tree: ast.Module) -> list[str] | None:
    """A module's ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return None


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_says_what_it_is(path):
    """A docstring, and in the modules that users import an ``__all__`` whose names exist, once each."""
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    names = exported(tree)
    if path.parent == PACKAGE and path.name != "__main__.py":
        assert names is not None, "no __all__"
    assert set(names or []) <= top_level(tree), "__all__ names what is not there"
    assert len(set(names or [])) == len(names or []), "__all__ names something twice"


def test_the_package_has_few_rooms_and_many_tenants():
    """Beside the modules that users import, everything lies in a package named after its role."""
    named = "client config core daemon_server inference_wrapper lora_cache monitoring proxy server tray_app workers"
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*named.split(), "wavespeed_utils", "__init__", "__main__"}
    assert not {path.name for path in PACKAGE.iterdir() if path.is_dir()} & set(sys.stdlib_module_names)


def test_the_control_process_needs_no_torch():
    """With torch, ComfyUI, diffusers and transformers impossible to import, everything outside the backends imports.

    So do the stand-ins of the unit tests.
    """
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "comfy", "diffusers", "transformers", "folder_paths", "nodes", "server"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import importlib
for name in {[*CONTROL, "tests.unit.fakes"]!r}:
    importlib.import_module(name)
assert "torch" not in sys.modules
try:
    import torch
except ImportError:
    print("done")
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "done\n", ran.stderr


def test_the_modules_that_users_import_are_among_them():
    """The list above holds what the promise is about."""
    promised = "client proxy config daemon_server workers monitoring lora_cache commands.cli control.service wire.link"
    assert {f"luna_daemon.{name}" for name in promised.split()} <= set(CONTROL)


def test_imports_flow_one_way():
    """The contracts in ``.importlinter`` hold: layers, client side, backends."""
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " kept, 0 broken" in ran.stdout


# --- shape ---------------------------------------------------------------------------------------------------------


def test_every_module_has_one_role():
    """The sums of ``benchmarks/sizes.py`` leave nothing out; a module that it does not know is named."""
    assert {sizes.role_of(path) for path in FILES} == set(sizes.ROLES)
    with pytest.raises(LookupError, match="'attic' has 0 roles"):
        sizes.role_of(PACKAGE / "attic" / "things.py")


def test_circles_are_found():
    """Of any length, and nothing else."""
    graph = grimp.ImportGraph()
    for importer, imported in ("ab", "bc", "ca", "cd", "de", "fa"):
        graph.add_import(importer=importer, imported=imported)
    assert sizes.circles(graph) == [["a", "b", "c"]]
    graph.add_import(importer="e", imported="d")
    assert sizes.circles(graph) == [["a", "b", "c"], ["d", "e"]]


def test_upward_imports_are_found():
    """Into a higher layer, and into a neighbour of the same; not downward, nor within one package."""
    graph = grimp.ImportGraph()
    for importer, imported in ("top", "core"), ("top.a", "top.b"), ("core", "top.a"), ("left.a", "right"):
        graph.add_import(importer=f"luna_daemon.{importer}", imported=f"luna_daemon.{imported}")
    assert sizes.upward(graph, [{"top"}, {"left", "right"}, {"core"}]) == [
        "luna_daemon.core imports luna_daemon.top.a", "luna_daemon.left.a imports luna_daemon.right",
    ]  # fmt: skip


def test_the_layers_are_those_of_the_contract():
    """Read from ``.importlinter``: highest first, every name of the package once."""
    order = sizes.layers()
    assert order[0] == {"__main__"} and order[-1] == {"core"} and {"lora", "shells"} in order
    names = [name for layer in order for name in layer]
    assert sorted([*names, "__init__"]) == sorted(path.stem for path in PACKAGE.iterdir() if path.name[:3] != "__p")


def test_type_checking_imports_count(tmp_path):
    """An import that only type checkers see closes a circle too."""
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "__init__.py").touch()
    (tmp_path / "ring" / "a.py").write_text("from . import b")
    (tmp_path / "ring" / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a")
    assert sizes.circles(sizes.import_graph("ring", tmp_path)) == [["ring.a", "ring.b"]]


def test_public_names_are_found():
    """Functions, classes and their methods; not overloads, setters, nested functions, nor what has an underscore."""
    source = '''
def one():
    """Told."""
    def within(): ...
async def two(): ...
def _three(): ...
class Four:
    """Told."""
    def five(self): ...
    def _six(self): ...
    def __len__(self): ...
    @property
    def seven(self): ...
    @seven.setter
    def seven(self, value): ...
    @overload
    def eight(self): ...
class _Nine:
    def ten(self): ...
'''
    told = {part.name: part.documented for part in sizes.public(source, "m")}
    assert told == {"m.one": True, "m.two": False, "m.Four": True, "m.Four.five": False, "m.Four.seven": False}
    assert [(part.name, part.lines) for part in sizes.functions(source, "m")][:2] == [("m.one", 3), ("m.two", 1)]
    assert [(part.name, part.lines) for part in sizes.classes(source, "m")] == [("m.Four", 11), ("m._Nine", 2)]


def test_what_is_too_large_is_named():
    """Each kind beyond its limit; of the two classes that may be large, one."""
    link, pool = sorted(sizes.LARGE_CLASSES)

    def too_large(**parts):
        kinds = {"modules": [], "functions": [], "classes": [], "public": [], "circles": [], "upward": []}
        return sizes.Shape({}, **{**kinds, **parts}).too_large

    assert too_large(modules=[sizes.Part("m", 450), sizes.Part("n", 451)]) == ["n has 451 lines"]
    assert too_large(functions=[sizes.Part("f", 50), sizes.Part("g", 51)]) == ["g has 51 lines"]
    assert too_large(classes=[sizes.Part("c", 250), sizes.Part("d", 251)]) == ["d has 251 lines"]
    assert too_large(classes=[sizes.Part(link, 300), sizes.Part(pool, 250)]) == []
    assert len(too_large(classes=[sizes.Part(link, 300), sizes.Part(pool, 251)])) == 2


@pytest.fixture(scope="module")
def shape():
    """The package as it is."""
    return sizes.measure()


def test_no_module_imports_itself_by_a_detour(shape):
    """No circles, those that only type checkers walk included."""
    assert shape.circles == []


def test_no_import_goes_upward(shape):
    """Not against the layers of ``.importlinter``, not even for type checkers."""
    assert shape.upward == []


def test_nothing_is_too_large(shape):
    """Functions, classes and modules stay readable on one or two screens; one class may be larger."""
    assert shape.too_large == []


def test_what_is_public_is_documented(shape):
    """Nearly all public functions, classes and methods have a docstring."""
    assert shape.documented >= sizes.LEAST_DOCSTRINGS, shape.undocumented


# --- nothing executable ------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib", "multiprocessing"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def called(node: ast.Call) -> str:
    """Dotted name of what is called."""
    return ast.unparse(node.func)


def findings(tree: ast.AST) -> list[str]:
    """What must not be in the package."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"import of {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            if called(node) in FORBIDDEN_CALLS:
                found.append(f"{called(node)}()")
            weights_only = any(
                key.arg == "weights_only" and isinstance(key.value, ast.Constant) and key.value.value is True
                for key in node.keywords
            )
            if called(node).endswith("torch.load") and not weights_only:
                found.append("torch.load() without weights_only=True")
            if any(key.arg == "allow_pickle" for key in node.keywords):
                found.append(f"pickle in {called(node)}")
            if any(key.arg == "shell" for key in node.keywords) or called(node) in ("os.system", "os.popen", "os.fork"):
                found.append(f"shell or fork: {called(node)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_that_comes_in_is_executed(path):
    """No pickle, no marshal, no eval, no unsafe ``torch.load``, no shell, no fork, anywhere in the package."""
    assert findings(ast.parse(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from multiprocessing import shared_memory", "eval('1')", "torch.load(f)",
        "torch.load(f, weights_only=False)", "subprocess.run('x', shell=True)", "numpy.load(f, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code):
    """The test above would see each of these."""
    assert findings(ast.parse(code))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_the_command_line_prints(path):
    """Everything else logs: a host process' output is not ours."""
    if path.stem in ("cli", "doctor"):
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if called(node) == "print"] == []


def test_one_version():
    """The package has a version of the usual form, and ``pyproject.toml`` takes it from there."""
    package = importlib.import_module("luna_daemon")
    assert [part.isdigit() for part in package.__version__.split(".")] == [True, True, True]
    assert 'path = "luna_daemon/__init__.py"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_old_imports_work():
    """``luna_daemon.server`` offers what the predecessor's users import."""
    from luna_daemon.daemon_server import LunaDaemon
    from luna_daemon.server import LunaDaemon as Old

    assert Old is LunaDaemon
