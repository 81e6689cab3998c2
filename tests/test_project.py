"""The house rules: which package may use which, what is public, what an import costs."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hypergrad", "hypergrad_rl")

# A module may import those of its own layer and of the layers before it.
LAYERS = (
    "errors",
    "tracing",
    "transforms",
    "norms",
    "precision",
    "pytree",
    "operators",
    "spectrum",
    "solvers",
    "ihvp",
    "bilevel",
)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def dotted_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Yield the absolute name of every module that the source imports, at any depth."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            # `from hypergrad import solvers` names a module, `from hypergrad import CG` does not.
            for alias in node.names:
                is_layer = target == "hypergrad" and alias.name in LAYERS
                yield f"{target}.{alias.name}" if is_layer else target


def module_imports(path: Path) -> list[str]:
    is_package = path.name == "__init__.py"
    return list(imports(path.read_text("utf-8"), dotted_name(path), is_package=is_package))


def upward_imports(importer: str, imported: list[str]) -> list[str]:
    """List what a module of `hypergrad` imports from a layer above its own, or from outside."""
    # The public face stands on all layers. As it imports them all, no layer may import it.
    top = len(LAYERS)
    own = top if importer == "hypergrad" else LAYERS.index(importer.split(".")[1])
    upward = [name for name in imported if name.partition(".")[0] == "hypergrad_rl"]
    for name in imported:
        package, *rest = name.split(".")
        if package == "hypergrad" and (LAYERS.index(rest[0]) if rest else top) > own:
            upward.append(name)
    return upward


def submodule_imports(imported: list[str]) -> list[str]:
    """List the imports that reach behind the public face of `hypergrad`."""
    return [name for name in imported if name.startswith("hypergrad.")]


@pytest.mark.parametrize("path", modules("hypergrad"), ids=dotted_name)
def test_imports_point_down(path: Path) -> None:
    name = dotted_name(path)
    if name != "hypergrad":
        layer = name.split(".")[1]
        assert layer in LAYERS, (
            f"hypergrad.{layer} has no place in LAYERS yet: say what it is above"
        )
    assert upward_imports(name, module_imports(path)) == []


@pytest.mark.parametrize("path", modules("hypergrad_rl"), ids=dotted_name)
def test_rl_uses_the_public_face_only(path: Path) -> None:
    assert submodule_imports(module_imports(path)) == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("hypergrad.operators.hessian", "from ..solvers.cg import CG"),
        ("hypergrad.operators.hessian", "from .. import bilevel"),
        ("hypergrad.operators.hessian", "import hypergrad"),
        ("hypergrad.pytree", "from hypergrad.operators import base"),
        ("hypergrad.solvers.cg", "def f():\n    import hypergrad.bilevel.hypergradient"),
        ("hypergrad.bilevel.hypergradient", "from hypergrad_rl import BLPO"),
    ],
)
def test_an_upward_import_is_found(importer: str, source: str) -> None:
    assert upward_imports(importer, list(imports(source, importer, is_package=False)))


@pytest.mark.parametrize(
    "source",
    [
        "import hypergrad.solvers",
        "from hypergrad.solvers import CG",
        "from hypergrad import solvers",
    ],
)
def test_an_import_behind_the_public_face_is_found(source: str) -> None:
    assert submodule_imports(list(imports(source, "hypergrad_rl.blpo", is_package=False)))


@pytest.mark.parametrize(
    "source", ["import hypergrad", "from hypergrad import CG, hessian", "import torch"]
)
def test_an_import_of_the_public_face_is_allowed(source: str) -> None:
    assert submodule_imports(list(imports(source, "hypergrad_rl.blpo", is_package=False))) == []


def public_names() -> list[tuple[str, str]]:
    return [
        (package, name)
        for package in PACKAGES
        for name in importlib.import_module(package).__all__
        if not name.startswith("__")
    ]


@pytest.mark.parametrize(("package", "name"), public_names())
def test_a_public_name_has_a_docstring_of_its_own(package: str, name: str) -> None:
    thing = getattr(importlib.import_module(package), name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
        assert text, f"{package}.{name} has no docstring"
        # A dataclass without a docstring is given its signature for one.
        assert not text.startswith(f"{name}("), f"{package}.{name} has no docstring"


@pytest.mark.parametrize(("package", "name"), public_names())
def test_a_public_name_is_on_the_api_page(package: str, name: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert re.search(rf"^\.\. auto\w+:: {package}\.{name}$", page, re.MULTILINE), (
        f"{package}.{name} is public but not in docs/api.md"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_out(package: str) -> None:
    names = importlib.import_module(package).__all__
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(importlib.import_module(package), name)] == []


def run_python(code: str) -> str:
    # -W error: a warning at import would greet every user of the library.
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


LIST_PACKAGES = "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def test_import_needs_torch_numpy_and_scipy_only() -> None:
    # All of SciPy, since a submodule of it may load parts that its top level does not.
    allowed = set(run_python("import torch, numpy, scipy" + LIST_PACKAGES).split())
    allowed |= {"hypergrad", "scipy", *sys.stdlib_module_names}
    loaded = set(run_python("import hypergrad" + LIST_PACKAGES).split())
    assert "hypergrad" in loaded
    assert loaded - allowed == set()


def imported_while_loading(source: str) -> set[str]:
    """List the packages that the source imports outside of functions and of TYPE_CHECKING."""
    found = set()
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", modules("hypergrad"), ids=dotted_name)
def test_module_loads_torch_numpy_and_scipy_only(path: Path) -> None:
    # sys.modules cannot tell: PyTorch itself loads tqdm or sympy where they are installed.
    allowed = {"hypergrad", "torch", "numpy", "scipy", *sys.stdlib_module_names}
    assert imported_while_loading(path.read_text("utf-8")) - allowed == set()


def test_import_loads_no_part_of_other_packages_that_torch_does_not() -> None:
    # torch._dynamo doubles the time of `import torch`, and parts of SciPy cost as much: they are
    # loaded when asked for.
    code = "import sys, torch; before = set(sys.modules); import hypergrad; "
    loaded = run_python(code + "print(*sys.modules.keys() - before)").split()
    ours = {"hypergrad", *sys.stdlib_module_names}
    assert {name for name in loaded if name.partition(".")[0] not in ours} == set()


def test_import_takes_no_noticeable_time_over_torch(tmp_path: Path) -> None:
    # A ratio, since seconds would measure the machine; of processor time, since what else runs
    # there makes the clock's say nothing. Of our modules as users load them, from bytecode, which
    # the first import writes; and without the collector, which finds torch's objects at the time
    # of our import, and visits them for as long as our import takes.
    code = f"""
import gc, sys, time
gc.disable()
start = time.process_time()
import torch
alone = time.process_time() - start
sys.pycache_prefix, sys.dont_write_bytecode = {str(tmp_path)!r}, False
start = time.process_time()
import hypergrad
print((time.process_time() - start) / alone)
"""
    run_python(code)
    assert any(tmp_path.rglob("*.pyc")), "no bytecode was written: source would be measured"
    ratio = min(float(run_python(code)) for _ in range(3))
    assert ratio < 0.15, f"import hypergrad adds {ratio:.3f} of import torch"


def test_distribution_is_installed_under_its_name() -> None:
    distribution = importlib.metadata.distribution("hypergrad-torch")
    assert distribution.metadata["Name"] == "hypergrad-torch"
    requirements = distribution.requires or []
    core = {re.match(r"[\w-]+", line)[0] for line in requirements if "extra ==" not in line}  # type: ignore[index]
    assert core == {"torch", "numpy", "scipy"}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_marked_as_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
