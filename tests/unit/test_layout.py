"""The rules of docs/architecture.md that a machine can keep."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernel", "model", "cache", "service", "loadtest")
SOURCES = sorted(
    path for room in (*ROOMS, "client", "experiments", "benchmarks") for path in (ROOT / room).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAY_IMPORT = {  # the arrow: model -> cache -> service, kernel lies under all
    "kernel": {"kernel"},
    "model": {"kernel", "model"},
    "cache": {"kernel", "model", "cache"},
    "service": {"kernel", "model", "cache", "service"},
    "loadtest": {"loadtest"},
    "client": {"ranktower_client"},
}
ONE_DOOR = {  # third-party engine: where alone it may be imported
    "redis": ("cache/",),
    "hiredis": ("cache/",),
    "faiss": ("cache/index.py", "model/sampling.py"),
    "onnxruntime": ("model/tower.py",),
    "fastapi": ("service/",),
    "starlette": ("service/",),
    "uvicorn": ("service/",),
    "locust": ("loadtest/",),
    "lightgbm": ("model/teacher.py",),
    "ray": ("cache/on_ray.py", "service/ray_serve.py"),
    "pyspark": ("cache/on_spark.py",),
}
TORCH_ROOMS = tuple(
    f"model/{room}.py"
    for room in (
        *("layers", "fused", "networks", "regularisers", "losses", "scoring", "checkpoint", "train", "evaluate"),
        *("export", "distributed", "native"),
    )
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_follow_the_arrow(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    ours = {module.split(".")[0] for module in imports(path)} & {*ROOMS, "ranktower_client", "tests"}
    assert ours <= MAY_IMPORT.get(room, {*ROOMS, "ranktower_client"})


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_each_engine_has_one_door(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)}
    for engine, doors in ONE_DOOR.items():
        if engine in roots and not name(path).startswith(("benchmarks/", "experiments/")):
            assert name(path).startswith(doors), f"{engine} is imported only in {', '.join(doors)}"
    if "torch" in roots and path.relative_to(ROOT).parts[0] in ROOMS:
        assert name(path) in TORCH_ROOMS


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_settings_reads_the_environment(path: Path) -> None:
    if name(path) != "service/settings.py":
        assert not re.search(r"\bos\.(environ|getenv)\b|from os import .*(environ|getenv)", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_command_lines_print(path: Path) -> None:
    command_line = path.name in ("cli.py", "__main__.py") or path.relative_to(ROOT).parts[0] in (
        "loadtest",
        "experiments",
        "benchmarks",
    )
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert command_line or not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name)
def test_no_drawers_no_pickle_no_swallowed_errors(path: Path) -> None:
    assert path.stem not in ("utils", "helpers", "common", "misc")
    roots = {module.split(".")[0] for module in imports(path)}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ExceptHandler)
            and isinstance(node.type, ast.Name)
            and node.type.id in ("Exception", "BaseException")
        ):
            assert not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), "an error is swallowed"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name)
def test_no_function_is_over_60_lines(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_file_opens_with_a_sentence(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "say in one sentence what flows through this file"


def test_every_source_file_of_a_room_has_a_test_file() -> None:
    tested = {path.name for path in TESTS}
    spared = {"__init__.py", "__main__.py", "cli.py", "errors.py"}
    rooms = ("kernel", "model", "cache", "service")
    sources = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in rooms and path.name not in spared]
    covered_by = {  # one contract suite or a whole room's file stands for these
        "head": "test_reference.py",
        "file_store": "test_stores.py",
        "redis_chunks": "test_stores.py",
        "redis_store": "test_stores.py",
        "file_log": "test_changes.py",
        "redis_log": "test_changes.py",
        "store": "test_stores.py",
        "log": "test_datasets.py",
        "schema": "test_schema.py",
        "movielens": "test_datasets.py",
        "kuairand": "test_datasets.py",
    }
    missing = [name(path) for path in sources if covered_by.get(path.stem, f"test_{path.stem}.py") not in tested]
    assert not missing


@pytest.mark.parametrize("room", ROOMS)
def test_import_names_are_ours_alone(room: str) -> None:
    spec = find_spec(room)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).parent == ROOT / room
    claimed = set(packages_distributions().get(room, []))  # an editable install claims no top-level names
    assert claimed <= {"ranktower"}


def test_the_serving_path_never_imports_torch() -> None:
    heavy = ("torch", "lightgbm", "onnx", "scipy", "locust")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy})); "
        + "import service.app, service.cli, cache.embed, cache.cli, model.cli"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_docs_name_every_make_verb() -> None:
    verbs = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    assert [verb for verb in verbs if f"make {verb}" not in readme] == []
