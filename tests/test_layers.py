"""Every import, lazy and type-only ones included, points down the layers, and none goes in a circle."""

import ast
import re
from pathlib import Path

import pytest

from mindvlm.models.registry import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"mindvlm": ROOT / "mindvlm", "mindvlm.convert": ROOT / "convert", "mindvlm.tools": ROOT / "tools"}
# A package may import those of lower rows, and of its own row only itself.
LAYERS = (
    ("tools",),
    ("convert", "evaluation", "serving"),
    ("training",),
    ("api", "datagen"),
    ("sessions",),
    ("generation",),
    ("models",),
    ("parallel", "weights"),
    ("nn", "processing"),
    ("checkpoint", "native"),
    ("core",),
)
# `mindvlm.load` and `mindvlm.Conversation` import these when they are asked for; everything may ask for the version.
PUBLIC = (("", "api"), ("", "sessions"))
# A family's modules lie in a folder or module of its name below these; the oracle describes the published models.
PLACES = ("mindvlm.models", "mindvlm.convert.parity", "mindvlm.tools.benchmarks", "mindvlm.evaluation.benchmarks")
ORACLE = "mindvlm.convert.reference"
# Shared modules that may name a family, and why.
MAY_NAME_FAMILIES = {
    "mindvlm.models.registry": "the rows",
    "mindvlm.api": "the shipped model",
    "mindvlm.tools.predict_llm": "the shipped model",
    "mindvlm.tools.check_model": "the shipped model",
    "mindvlm.tools.serve": "the shipped model",
    "mindvlm.tools.evaluate_text": "the shipped model",
    "mindvlm.evaluation.published": "the figures of papers",
    "mindvlm.datagen.dataset": "a format of annotations",
    "mindvlm.training.datasets.registry": "a format of annotations",
}


def find_modules(folders: dict[str, Path]) -> dict[str, Path]:
    """Returns module name -> file of all modules below the folders."""
    modules = {}
    for package, folder in folders.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            modules[".".join((package, *(part for part in parts if part != "__init__")))] = file
    return modules


def imported_modules(source: str, known: set[str]) -> set[str]:
    """Returns the modules of `known` that a source imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno} imports relatively; write the whole name"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in submodules]
        else:
            continue
        found.update(name for name in names if name in known)
    return found


def layer_of(module: str) -> str:
    """Returns the package below `mindvlm` that a module lies in; empty for `mindvlm` itself."""
    return module.removeprefix("mindvlm").lstrip(".").partition(".")[0]


def wrong_arrows(imports: dict[str, set[str]]) -> list[str]:
    """Returns the imports that point sideways or upwards, one line each."""
    ranks = {package: rank for rank, row in enumerate(LAYERS) for package in row}
    wrong = []
    for module, targets in imports.items():
        for target in sorted(targets):
            source_layer, target_layer = layer_of(module), layer_of(target)
            if source_layer == target_layer or not target_layer or (source_layer, target_layer) in PUBLIC:
                continue
            if not source_layer and target_layer == "core":
                continue
            if not source_layer or ranks[source_layer] >= ranks[target_layer]:
                wrong.append(f"{module} -> {target}")
    return wrong


def wrong_families(imports: dict[str, set[str]]) -> list[str]:
    """Returns the imports of one family's modules by another family or by code that families share."""
    wrong = []
    for module, targets in imports.items():
        if module.startswith(ORACLE):
            continue
        for target in sorted(targets):
            family = family_of(target)
            if family and family != family_of(module):
                wrong.append(f"{module} -> {target}")
    return wrong


def family_of(module: str) -> str:
    """Returns the family that a module belongs to; empty if none."""
    found = (re.match(rf"{re.escape(place)}\.(\w+)", module) for place in PLACES)
    return next((match[1] for match in found if match and match[1] in FAMILIES), "")


def named_families(source: str) -> set[str]:
    """Returns the families that a source names in its code: in strings that are no docstrings, names and keywords."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words.append(node.value)
        words += [getattr(node, key) for key in ("id", "attr", "arg", "name") if hasattr(node, key)]
    return families_in("\n".join(word for word in words if word))


def families_in(text: str) -> set[str]:
    return {name for name in FAMILIES if re.search(rf"(?<![a-z]){name[:4]}_?{name[4:]}(?!ing)", text.lower())}


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Returns the circles of imports, each as one line of module names."""
    finished, path, found = set(), [], []

    def visit(module: str) -> None:
        if module in path:
            found.append(" -> ".join((*path[path.index(module) :], module)))
            return
        if module in finished:
            return
        path.append(module)
        for target in sorted(imports.get(module, ())):
            visit(target)
        path.pop()
        finished.add(module)

    for module in sorted(imports):
        visit(module)
    return found


@pytest.fixture(scope="module")
def imports():
    modules = find_modules(FOLDERS)
    return {name: imported_modules(file.read_text(), set(modules)) - {name} for name, file in modules.items()}


def test_every_module_is_in_a_layer(imports):
    layers = {package for row in LAYERS for package in row}
    assert {layer_of(module) for module in imports} - {""} <= layers


def test_arrows_point_down(imports):
    assert wrong_arrows(imports) == []


def test_no_circles(imports):
    # the package's `load` imports the API when it is called, and the API asks the package for nothing but its version
    inner = {name: targets - {"mindvlm"} for name, targets in imports.items()}
    assert circles(inner) == []


def test_a_family_is_imported_by_itself_only(imports):
    assert wrong_families(imports) == []


def test_shared_code_names_no_family():
    named = {}
    for module, file in find_modules(FOLDERS).items():
        if not family_of(module) and not module.startswith(ORACLE):
            named |= dict.fromkeys([module] if named_families(file.read_text()) else ())
    assert named.keys() == MAY_NAME_FAMILIES.keys()


def test_the_web_page_names_no_family():
    for name in ("index.html", "page.js", "page.css"):
        assert not families_in((ROOT / "mindvlm/serving/page" / name).read_text())


def test_wrong_arrows_and_circles_are_found():
    lazy = "def load():\n    from mindvlm.api import load\n"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mindvlm.models import base\n"
    known = {"mindvlm.api", "mindvlm.models.base", "mindvlm.models"}
    assert imported_modules(lazy, known) == {"mindvlm.api"}
    assert imported_modules(typed, known) == {"mindvlm.models.base"}
    assert wrong_arrows({"mindvlm.core.errors": {"mindvlm.api"}}) == ["mindvlm.core.errors -> mindvlm.api"]
    assert wrong_arrows({"mindvlm.nn.linear": {"mindvlm.processing.images"}}) == [
        "mindvlm.nn.linear -> mindvlm.processing.images"
    ]
    assert wrong_arrows({"mindvlm.api": {"mindvlm.core.errors"}, "mindvlm": {"mindvlm.api"}}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a -> b -> c -> a"]
    for module in ("models.vary.names", "convert.verify", "convert.parity.graphs", "convert.parity.vary", "tools.chat"):
        assert wrong_families({f"mindvlm.{module}": {"mindvlm.models.tinyllava.names"}})
    assert wrong_families({"mindvlm.convert.parity.tinyllava": {"mindvlm.models.tinyllava.names"}}) == []
    assert wrong_families({"mindvlm.tools.benchmark": {"mindvlm.tools.benchmarks.vary"}})
    with pytest.raises(AssertionError, match="imports relatively"):
        imported_modules("from . import base", known)
    assert named_families("x.is_vary_tiny = varying") == {"vary"}
    assert named_families("x = 'tiny_llava'") == named_families("f'of TinyLLaVA {x}'") == {"tinyllava"}
    assert named_families('"""Vary."""\n# vary') == set()
