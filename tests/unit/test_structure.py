"""Who may import whom: a lower layer never imports a higher one."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fastdeploy_lite"

# Prefixes of module names inside the package, lowest layer first; the longest match counts.
LAYERS: dict[str, int] = {
    "": 0,
    "assets": 0,
    "config": 0,
    "quantization_config": 0,
    "formats": 0,
    "models": 0,  # what a family says of itself; its model is built higher up
    "models.ernie4_5.model": 5,
    "models.ernie4_5.draft": 5,
    "envs": 0,
    "plugins": 0,
    "utils": 0,
    "speculation.config": 0,
    "_ops_cpu": 0,
    "_ops_cuda": 0,
    "paddle_device": 1,
    "processor": 1,
    "device": 1,
    "checkpoint": 1,
    # What a request and its answer are made of; read by everything above.
    "guided.spec": 1,
    "request": 1,
    "worker.output": 1,
    "quantization": 2,
    "model_executor.ops": 3,
    "model_executor.workspace": 3,
    "distributed": 4,
    "model_executor.layers": 4,
    "model_executor.models": 5,
    "model_executor": 6,
    "worker": 7,
    "executor": 8,
    "guided": 7,
    "speculation": 7,
    "benchmarks": 7,
    "input": 8,
    "calibration": 9,
    "reasoning": 8,
    "metrics": 8,
    "engine": 9,
    "entrypoints": 10,
    "__main__": 10,
}
NUMPY_ONLY = (
    "checkpoint",
    "formats",
    "quantization",
    "config",
    "models.family",
    "models.ernie4_5.config",
    "models.ernie4_5.names",
    "quantization_config",
    "envs",
    "utils",
)
REQUESTS_ROAD = (
    "request",
    "guided",
    "input",
    "engine",
    "executor",
    "reasoning",
    "metrics",
    "entrypoints",
)
WITHOUT_PADDLE_AT_RUN_TIME = (
    "fastdeploy_lite",
    "fastdeploy_lite.engine.sampling_params",
    "fastdeploy_lite.engine.args_utils",
    "fastdeploy_lite.engine.request",
    "fastdeploy_lite.entrypoints.openai.api_server",
    "fastdeploy_lite.entrypoints.cli.main",
)


@functools.cache
def modules() -> tuple[tuple[str, Path], ...]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found.append((".".join(p for p in parts if p != "__init__"), path))
    return tuple(found)


def layer_of(module: str) -> int:
    prefixes = [p for p in LAYERS if p in ("", module) or module.startswith(p + ".")]
    best = max(prefixes, key=len)
    if best == "" and module not in ("", "__main__"):
        pytest.fail(f"module {module!r} has no layer: add it to LAYERS")
    return LAYERS[best]


def owning_module(name: str) -> str:
    """The module that holds a dotted name: itself or, for a class or function, its parent."""
    return name if name in dict(modules()) else name.rpartition(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


@functools.cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """Absolute names of all modules that a file imports, lazily or not, and whether for types."""
    found: list[tuple[str, bool]] = []
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False)]
    while pending:
        node, for_types = pending.pop()
        for_types |= is_type_checking(node)
        if isinstance(node, ast.Import):
            found += ((alias.name, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import at line {node.lineno}"
            # `from package import module` means the module, where there is one of that name.
            found += ((f"{node.module}.{alias.name}", for_types) for alias in node.names)
        pending += ((child, for_types) for child in ast.iter_child_nodes(node))
    return tuple(found)


def imported_names(path: Path, for_types: bool = False) -> list[str]:
    """Names of the modules that a file imports; `for_types` adds those under `TYPE_CHECKING`."""
    return [name for name, is_for_types in imports(path) if for_types or not is_for_types]


@pytest.mark.parametrize(("module", "path"), modules(), ids=str)
def test_no_lower_layer_imports_a_higher_one(module: str, path: Path) -> None:
    if module == "":
        return  # the top package forwards names lazily
    own = layer_of(module)
    for name in imported_names(path):
        if not name.startswith("fastdeploy_lite."):
            continue
        target = owning_module(name.removeprefix("fastdeploy_lite."))
        assert layer_of(target) <= own, f"{module} (layer {own}) imports {target}"


def test_no_circle_of_files() -> None:
    """Each file can be read after those that it imports, be it for types or inside a function."""
    own = dict(modules())
    graph = {
        module: {
            owning_module(name.removeprefix("fastdeploy_lite."))
            for name in imported_names(path, for_types=True)
            if name.startswith("fastdeploy_lite.")
        }
        & set(own) - {module}
        for module, path in own.items()
        if path.name != "__init__.py"  # a package forwards the names of its files
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_sampling_parameter_is_named_in_few_files() -> None:
    """Declared for the user, the wire and the step, taken by the op and its stubs; the rest of the
    road carries it by name."""
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]
    named = [path.name for path in files if "min_p" in path.read_text(encoding="utf-8")]
    assert len(named) <= 6, named


def test_engine_and_input_are_one_way() -> None:
    for module, path in modules():
        if module.startswith(("input.", "guided", "request.")):
            above = [n for n in imported_names(path, for_types=True) if ".engine" in n]
            assert not above, f"{module} imports {above}"


def test_a_class_name_means_one_thing_on_a_requests_road() -> None:
    homes: dict[str, str] = {}
    for module, path in modules():
        if not module.startswith(REQUESTS_ROAD):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                home = homes.setdefault(node.name, module)
                assert home == module, f"class {node.name} is in {home} and in {module}"


@pytest.mark.parametrize(("module", "path"), modules(), ids=str)
def test_files_and_formats_need_numpy_only(module: str, path: Path) -> None:
    if not module.startswith(NUMPY_ONLY):
        return
    roots = {name.split(".")[0] for name in imported_names(path)}
    assert not roots & {"paddle", "torch", "transformers"}, f"{module} imports {roots}"


@pytest.mark.parametrize("module", WITHOUT_PADDLE_AT_RUN_TIME)
def test_front_end_imports_without_paddle(module: str) -> None:
    """The HTTP process must not load the framework: it would cost memory and touch the device."""
    code = f"import sys, {module}; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_native_modules_use_no_streams_of_the_c_plus_plus_library() -> None:
    """A module with a libstdc++ of its own beside Paddle's reads numbers through wrong facets."""
    endings = {".h", ".cc", ".cu", ".cuh"}
    sources = [p for p in (PACKAGE.parent / "custom_ops").rglob("*") if p.suffix in endings]
    assert sources
    streams = re.compile(
        r"#include <(fstream|iomanip|iostream|istream|locale|ostream|regex|sstream)>"
    )
    assert [str(path) for path in sources if streams.search(path.read_text("utf-8"))] == []


FIRST_IMPORT = """
import importlib, os, sys
from fastdeploy_lite import device

class FirstPaddle:
    prepared = False

    def find_spec(self, name, path=None, target=None):
        if name == "paddle":
            os._exit(0 if self.prepared else 9)

watch = FirstPaddle()
device.prepare_environment = lambda: setattr(watch, "prepared", True)
sys.meta_path.insert(0, watch)
import fastapi, jinja2, numpy, uvicorn  # once, not in each child
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except ImportError:
            pass
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9:
        print(name)
"""


def test_whatever_is_imported_first_paddle_comes_after_its_plug_in() -> None:
    """Paddle reads the folder of its plug-ins once, while it is imported."""
    names = [f"{PACKAGE.name}.{name}" for name, _ in modules() if name not in ("", "__main__")]
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IMPORT, *names],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == []
