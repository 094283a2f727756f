"""The rules of docs/architecture.md that a machine can check, read from the source by `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import autokernel
from autokernel.ops import OPS
from autokernel.search.graph_options import FILE as GRAPH_OPTIONS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "autokernel"

# Lowest first. A module may import what lies in a lower row, and its own group; groups of one row do not know each other.
# docs/architecture.md has the same table. The longest matching name decides, so a package can lie in two rows.
LAYERS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("records",), ("errors",)),
    (("environment",), ("requirements",), ("torch_facts",), ("model_config",)),
    (("config_messages", "config_yaml"),),
    (("events",), ("config",)),
    (("fingerprint",),),
    (("ops",),),
    # GPU kernels: of our own; of CuTe DSL, compiled ahead of time; other ways to write an op
    (("kernels",), ("cutedsl",), ("rewrites",)),
    (("export",),),  # bundle, matching, plan, pins, passes, freezing, apply: production
    (("backends",),),
    (("workers",),),
    (("evaluate",),),  # one candidate
    # the whole model
    (("profiling", "evaluate.modes", "evaluate.end_to_end", "evaluate.quality"),),
    (("search",), ("tracking",)),
    (("export.proof", "export.prove"), ("export.verify",)),  # a bundle, looked at from outside
    (("stages",),),
    (("pipeline",),),
    (("doctor",),),
    (("display",),),
    (("cli", "__main__"),),
)
UPWARD: dict[tuple[str, str], str] = {}  # (module, what it imports from a higher row): why
# Packages that look their plug-ins up, which import the protocol from them: inside a function, so nothing loads twice.
LOOKUPS = {
    ("backends", "backends.aten"),
    ("backends", "backends.cutedsl"),
    ("backends", "backends.inductor"),
    ("backends", "backends.triton"),
    ("workers.pool", "workers.cluster"),
    ("search.seeds", "search.nvmatmul"),
}

HOMES = {
    "ray": ("workers.cluster",),
    "optuna": ("search.tuner", "search.plan_study"),
    "mlflow": ("tracking",),
    "nvMatmulHeuristics": ("search.nvmatmul_library",),
    "typer": ("cli", "display.session"),
    "rich": ("cli", "display"),
    "pydantic": ("config", "config_messages", "model_config", "search.space_file"),
    "transformers": ("profiling",),
    "matplotlib": ("tracking.plots",),
    "jinja2": ("tracking.report",),
    "scipy": ("tracking", "search"),
    "cutlass": (
        "cutedsl.blackwell",
        "cutedsl.cluster_gemm",
        "cutedsl.compiler",
        "cutedsl.epilogue_source",
        "cutedsl.operators",
        "cutedsl.own",
        "cutedsl.quack",
    ),
    "quack": ("cutedsl.compiler", "cutedsl.epilogue_source", "cutedsl.quack"),
    "tvm_ffi": ("cutedsl.compiler", "cutedsl.objects"),
    "torch._inductor": (
        "export.apply",
        "export.dependent_launch",
        "export.one_row",
        "export.passes",
        "export.missed",
        "export.region_kernels",
        "export.regions",
        "export.pins",
        "export.rendering",
        "export.isa_probes",
        "export.substitution",
        "export.user_kernels",
        "export.templates",
        "export.cutedsl",
        "export.chain",
        "export.aoti",
        "ops.program",
        "export.prove",
        "backends.compiled",
        "backends.max_autotune",
        "profiling.capture",
        "evaluate.whole_model",
    ),
}

# Where whatever is raised has to become a value: candidates' code, functions that an experiment names, and the outermost
# boundary of a process or a run.
CATCH_ALL = {
    "export.apply",
    "evaluate.candidate",
    "evaluate.confirm",
    "profiling.functions",
    "pipeline",
    "workers.child",
    "workers.pool",
    "workers.worker",
    "tracking.mlflow_follower",
    "display.session",
}
TESTED_AS_A_WHOLE: set[str] = set()

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One module, by its name without "autokernel."; the package itself is ""."""

    name: str
    path: Path
    tree: ast.Module


def _sources() -> list[Source]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Source(name=name, path=path, tree=ast.parse(path.read_text(encoding="utf-8"))))
    return found


SOURCES = _sources()
NAMES = {source.name for source in SOURCES}


def _imports(source: Source) -> Iterator[str]:
    """Full names of what a module imports, inside functions too."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.path}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(source: Source) -> set[str]:
    """Names of this package's modules that a module imports; the package's own surface (version, backend, run) is free."""
    found = set()
    for name in _imports(source):
        if name.startswith("autokernel."):
            inner = name.removeprefix("autokernel.")
            found.add(inner if inner in NAMES else inner.rpartition(".")[0])
    return found - {"", source.name}


def _within(name: str, homes: tuple[str, ...] | set[str]) -> bool:
    return any(name == home or name.startswith(f"{home}.") for home in homes)


def _place(name: str) -> tuple[int, tuple[str, ...]]:
    """(row, group) of a module."""
    matches = [
        (len(prefix), row, group)
        for row, groups in enumerate(LAYERS)
        for group in groups
        for prefix in group
        if _within(name, (prefix,))
    ]
    assert matches, f"autokernel.{name} has no place in LAYERS"
    _, row, group = max(matches)
    return row, group


@pytest.mark.parametrize("source", [s for s in SOURCES if s.name], ids=lambda s: s.name)
def test_imports_point_down(source: Source) -> None:
    row, group = _place(source.name)
    for target in sorted(_own_imports(source)):
        target_row, target_group = _place(target)
        allowed = target_row < row or target_group == group or (source.name, target) in UPWARD
        assert allowed, f"autokernel.{source.name} must not import autokernel.{target}: it lies above, or beside"


def test_there_are_no_cycles() -> None:
    edges = {s.name: {t for t in _own_imports(s) if (s.name, t) not in LOOKUPS | UPWARD.keys()} for s in SOURCES if s.name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a cycle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_listed_exceptions_are_still_needed() -> None:
    edges = {(s.name, t) for s in SOURCES for t in _own_imports(s)}
    assert UPWARD.keys() <= edges
    assert edges >= LOOKUPS


@pytest.mark.parametrize("engine", sorted(HOMES))
def test_each_engine_has_one_home(engine: str) -> None:
    for source in SOURCES:
        names = set(_imports(source)) | {ast.unparse(n) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)}
        if any(_within(name, (engine,)) for name in names):
            assert _within(source.name, HOMES[engine]), f"autokernel.{source.name} uses {engine}; only {HOMES[engine]} may"


def _nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Source, ast.AST]]:
    for source in SOURCES:
        yield from ((source, node) for node in ast.walk(source.tree) if isinstance(node, kinds))


def test_only_the_command_line_prints() -> None:
    for source, node in _nodes(ast.Call):
        assert isinstance(node, ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id == "print":
            pytest.fail(f"{source.path}:{node.lineno}: log instead of printing")
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in ("sys.stdout.write", "console.print"):
            assert source.name == "cli", f"{source.path}:{node.lineno}: only cli.py prints"


def test_no_module_changes_its_globals() -> None:
    found = [f"{source.path}:{node.lineno}" for source, node in _nodes(ast.Global)]  # type: ignore[attr-defined]
    assert found == []


def test_catch_alls_are_at_boundaries() -> None:
    for source, node in _nodes(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type is not None else {"Exception"}
        if caught & {"Exception", "BaseException"}:
            assert source.name in CATCH_ALL, f"{source.path}:{node.lineno}: catch what can happen here, not everything"


def test_files_and_functions_are_short() -> None:
    for source in SOURCES:
        num_lines = len(source.path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= MAX_FILE_LINES, f"{source.path} has {num_lines} lines"
    for source, node in _nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        assert num_lines <= MAX_FUNCTION_LINES, f"{source.path}:{node.lineno}: {node.name} has {num_lines} lines"


def test_every_module_says_what_it_is_for() -> None:
    for source in SOURCES:
        if source.path.name != "__init__.py":
            assert ast.get_docstring(source.tree), f"{source.path} has no docstring"


def test_tests_mirror_the_package() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    tested = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    tested -= {"gpu", "benchmarks"}  # what only a GPU can show; scripts beside the package
    assert tested <= packages, f"tests/ has folders of no package: {sorted(tested - packages)}"
    at_the_top = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    untested = packages - tested - at_the_top - TESTED_AS_A_WHOLE
    assert not untested, f"packages without tests: {sorted(untested)}"


def test_every_op_has_a_search_space_of_its_name() -> None:
    spaces = {path.stem for path in (ROOT / "search_spaces").glob("*.yaml")} - {Path(GRAPH_OPTIONS).stem}
    assert spaces == {op.name for op in OPS}
    assert {op.name for op in OPS} <= {path.stem for path in (PACKAGE / "ops").glob("*.py")}


def _tracked_text() -> Iterator[tuple[Path, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".html", ".css", ".js", "") and path.is_file():
            yield path, path.read_text(encoding="utf-8")


def test_tracked_files_hold_nothing_private_or_unfinished() -> None:
    # spelled in parts, so that this file does not find itself
    forbidden = [f"/{folder}/" for folder in ("root", "work", "var" + "/tmp", "opt" + "/wheels")]
    forbidden += ["TO" + "DO", "FIX" + "ME", "file:" + "///"]
    for path, text in _tracked_text():
        for word in forbidden:
            assert word not in text, f"{path.relative_to(ROOT)} holds {word!r}"


def _modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "autokernel", "autokernel.records", "autokernel.events", "autokernel.config", "autokernel.export.bundle",
        "autokernel.tracking.summary", "autokernel.search.space", "autokernel.workers.pool", "autokernel.cli",
        "autokernel.cutedsl.cache",
    ],
)  # fmt: skip
def test_light_modules_import_no_torch(module: str) -> None:
    assert not _modules_after(f"import {module}") & {"torch", "ray", "optuna", "mlflow", "transformers"}


def test_production_imports_torch_alone() -> None:
    needless = {"ray", "optuna", "mlflow", "pydantic", "typer", "rich", "transformers", "yaml", "scipy", "matplotlib", "psutil"}
    needless |= {"cutlass", "quack", "tvm_ffi"}
    loaded = _modules_after("import autokernel.export.apply")
    assert "torch" in loaded
    # torch's compiler takes some of them itself where they are installed
    assert not (loaded & needless) - _modules_after("import torch._inductor.compile_fx, torch._inductor.select_algorithm")
    assert not loaded & {"ray", "optuna", "mlflow", "pydantic", "typer", "rich", "transformers"}
    own = {name for name in loaded if name.startswith("autokernel.")}
    allowed = (
        "autokernel.export",
        "autokernel.kernels",
        "autokernel.cutedsl",
        "autokernel.ops",
        "autokernel.rewrites",
        "autokernel.records",
        "autokernel.errors",
        "autokernel.environment",
        "autokernel.requirements",
    )
    assert all(_within(name, allowed) for name in own), f"production needs {sorted(own)}"


def test_the_version_is_one() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{autokernel.__version__}"' in text
