"""Measure the package: lines of each role, shape of modules, functions and classes, docstrings, import circles.

What is printed fills in the table of the layout; the limits are those that ``tests/unit/test_package.py`` checks.
"""

from __future__ import annotations

import ast
import configparser
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "luna_daemon"

ROLES = {
    "core and settings": ("__init__", "__main__", "core", "config"),
    "client": ("client",),
    "proxy and shells": ("proxy", "shells"),
    "sampling helpers": ("inference_wrapper", "wavespeed_utils"),
    "LoRA": ("lora", "lora_cache"),
    "monitoring": ("monitoring", "status"),
    "workers": ("workers", "pool"),
    "server": ("daemon_server", "server", "control"),
    "backends": ("backends",),
    "ComfyUI as data": ("comfyui",),
    "files": ("files",),
    "wire": ("wire",),
    "commands": ("commands",),
    "tray": ("tray_app", "tray"),
    "system": ("system",),
}
"""Modules and packages of each role; every one has exactly one."""

AIM = {
    "core": 130, "inference_wrapper": 140, "lora_cache": 330, "monitoring": 325, "workers": 850,
    "daemon_server": 350, "proxy": 460, "client": 350,
}  # fmt: skip
"""Lines per module after the predecessor's refactoring: 2,935 together."""

MOST_FUNCTION, MOST_CLASS, MOST_MODULE, LEAST_DOCSTRINGS = 50, 250, 450, 97.0
LARGE_CLASSES = {"luna_daemon.wire.link.Link", "luna_daemon.workers.WorkerPool"}
"""Either may have more than ``MOST_CLASS`` lines, not both: one life of one thing with one state, told in one place."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Part:
    """A module, class or function: its dotted name, its lines, and whether it has a docstring."""

    name: str
    lines: int
    documented: bool = True


def files() -> list[Path]:
    """The package's modules."""
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """A file's dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def role_of(path: Path) -> str:
    """The role of a module.

    Raises:
        LookupError: none has it, or several.
    """
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    roles = [role for role, names in ROLES.items() if top in names]
    if len(roles) != 1:
        raise LookupError(f"'{top}' has {len(roles)} roles; give it one of those in ROLES of benchmarks/sizes.py")
    return roles[0]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(source: str, name: str) -> Iterator[Part]:
    """Every function and method, nested ones too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            yield _part(node, name)


def classes(source: str, name: str) -> Iterator[Part]:
    """Every class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield _part(node, name)


def public(source: str, name: str) -> Iterator[Part]:
    """Functions and classes without underscore at the top of a module, and the public methods of such classes."""
    for node in _defined(ast.parse(source)):
        yield _part(node, name)
        if isinstance(node, ast.ClassDef):
            yield from (_part(inner, f"{name}.{node.name}") for inner in _defined(node) if isinstance(inner, Function))


def _defined(owner: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Public definitions right within; overloads and setters are told by what they belong to."""
    for node in owner.body:
        if isinstance(node, (Function, ast.ClassDef)) and not node.name.startswith("_"):
            marks = [ast.unparse(decorator) for decorator in node.decorator_list]
            if not any(mark.endswith(("overload", ".setter", ".deleter")) for mark in marks):
                yield node


def _part(node: Function | ast.ClassDef, name: str) -> Part:
    size = (node.end_lineno or node.lineno) - node.lineno + 1
    return Part(f"{name}.{node.name}", size, ast.get_docstring(node) is not None)


def import_graph(package: str = PACKAGE.name, root: Path = ROOT) -> grimp.ImportGraph:
    """Imports of a package's modules from each other, those for type checkers included."""
    sys.path.insert(0, str(root))
    try:
        return grimp.build_graph(package, exclude_type_checking_imports=False, cache_dir=None)
    finally:
        sys.path.remove(str(root))


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Modules that import each other, by whatever detour: one list per circle."""
    needs = {name: graph.find_upstream_modules(name) for name in graph.modules}
    found = {frozenset({name, *(other for other in needs[name] if name in needs[other])}) for name in needs}
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def layers() -> list[set[str]]:
    """The layers of ``.importlinter``, highest first; members of one know nothing of each other."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter", encoding="utf-8")
    written = contract["importlinter:contract:layers"]["layers"].split("\n")
    return [{name.strip(" ()") for name in line.replace(":", "|").split("|")} for line in written if line.strip()]


def upward(graph: grimp.ImportGraph, order: list[set[str]]) -> list[str]:
    """Imports of a higher layer, or of a neighbour in the same."""
    rank = {f"luna_daemon.{name}": number for number, layer in enumerate(order) for name in layer}
    found = []
    for module in graph.modules - {"luna_daemon"}:
        for other in graph.find_modules_directly_imported_by(module) - {"luna_daemon"}:
            mine, its = (".".join(name.split(".")[:2]) for name in (module, other))
            if mine != its and rank[its] <= rank[mine]:
                found.append(f"{module} imports {other}")
    return sorted(found)


@dataclass(frozen=True)
class Shape:
    """The whole package, measured."""

    roles: dict[str, int]
    modules: list[Part]
    functions: list[Part]
    classes: list[Part]
    public: list[Part]
    circles: list[list[str]]
    upward: list[str]

    @property
    def documented(self) -> float:
        """Public names with a docstring, in percent."""
        return 100 * statistics.mean(part.documented for part in self.public)

    @property
    def too_large(self) -> list[str]:
        """Modules, functions and classes with more lines than they may have, a line each."""
        large = [part for part in self.classes if part.lines > MOST_CLASS]
        parts = [
            *(part for part in self.modules if part.lines > MOST_MODULE),
            *(part for part in self.functions if part.lines > MOST_FUNCTION),
            *(part for part in large if part.name not in LARGE_CLASSES or len(large) > 1),
        ]
        return [f"{part.name} has {part.lines} lines" for part in parts]

    @property
    def undocumented(self) -> list[str]:
        """Public names without a docstring."""
        return [part.name for part in self.public if not part.documented]


def measure() -> Shape:
    """Read every module of the package."""
    sources = {module_name(path): path.read_text("utf-8") for path in files()}
    roles = dict.fromkeys(ROLES, 0)
    for path in files():
        roles[role_of(path)] += lines(path)
    graph = import_graph()
    return Shape(
        roles,
        [Part(name, len(source.splitlines())) for name, source in sources.items()],
        [part for name, source in sources.items() for part in functions(source, name)],
        [part for name, source in sources.items() for part in classes(source, name)],
        [part for name, source in sources.items() for part in public(source, name)],
        circles(graph),
        upward(graph, layers()),
    )


def problems(shape: Shape) -> list[str]:
    """What is beyond the limits, a line each."""
    bare = f"public docstrings: {shape.documented:.1f} %, not {LEAST_DOCSTRINGS:g}: {', '.join(shape.undocumented)}"
    return [
        *shape.too_large,
        *([bare] if shape.documented < LEAST_DOCSTRINGS else []),
        *(f"import circle: {', '.join(circle)}" for circle in shape.circles),
        *(f"upward import: {line}" for line in shape.upward),
    ]


def spread(parts: list[Part]) -> str:
    """Median, 90th percentile and maximum of their lines."""
    sizes = sorted(part.lines for part in parts)
    return f"{statistics.median(sizes):g} / {statistics.quantiles(sizes, n=10)[8]:.0f} / {sizes[-1]}"


def main() -> int:
    shape = measure()
    print(f"{'role':32}{'lines':>8}")
    for role, size in shape.roles.items():
        print(f"{role:32}{size:>8,}")
    print(f"{'total':32}{sum(shape.roles.values()):>8,}\n")
    print(f"{'module':24}{'lines':>8}{'aim':>8}")
    sizes = {name: lines(PACKAGE / f"{name}.py") for name in AIM}
    for name, aim in [*AIM.items(), ("together", sum(AIM.values()))]:
        print(f"{name:24}{sizes.get(name, sum(sizes.values())):>8,}{aim:>8,}")
    print()
    large = [part for part in shape.classes if part.lines > MOST_CLASS]
    rows = {
        "modules, median / p90 / max": spread([part for part in shape.modules if part.lines > 1]),  # no bare __init__
        f"{len(shape.functions):,} functions, median / p90 / max": spread(shape.functions),
        f"classes over {MOST_CLASS} lines": ", ".join(f"{part.name} ({part.lines})" for part in large) or "0",
        "public docstrings": f"{shape.documented:.0f} % of {len(shape.public)}",
        "import circles, upward imports": f"{len(shape.circles)}, {len(shape.upward)}",
    }
    for what, value in rows.items():
        print(f"{what:40}{value}")
    wrong = problems(shape)
    for line in wrong:
        print(f"beyond the limits: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
