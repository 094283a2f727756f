"""What the documentation shows works: its code is taken from the pages and run."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from experiment_keys import with_keys
from typer.main import get_command

import autokernel
from autokernel import backends, ops
from autokernel.backends import aten
from autokernel.cli import app
from autokernel.config import Experiment, load_experiment
from autokernel.environment import current_environment
from autokernel.export.bundle import Bundle, Entry, read_bundle, write_bundle
from autokernel.ops import Op, Site
from autokernel.profiling.metric import load_metric
from autokernel.profiling.workload import build_scenario, load_model
from autokernel.records import Candidate, Problem, Status, TensorSpec
from autokernel.search import space_file
from autokernel.search.expressions import FUNCTIONS
from autokernel.search.space import DEVICE_NAMES, DeviceFacts, names_for
from autokernel.search.space_file import load_space

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, code in _BLOCK.findall((DOCS / page).read_text(encoding="utf-8")) if kind == language]


def named_blocks(page: str) -> dict[str, str]:
    """Code by the file it is said to belong in."""
    return dict(_NAMED.findall((DOCS / page).read_text(encoding="utf-8")))


def module_from(folder: Path, path: str, code: str) -> ModuleType:
    file = folder / Path(path).name
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"docs_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    folder = tmp_path_factory.mktemp("extension")
    code = named_blocks("extending.md")
    paths = ("autokernel/ops/cumsum.py", "autokernel/ops/softcap.py", "autokernel/backends/chunked.py")
    return {Path(path).stem: module_from(folder, path, code[path]) for path in paths}


@pytest.fixture
def _extended(extension: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The lines that the page says to append."""
    everything = (*backends.all_backends(), extension["chunked"].ChunkedBackend())
    monkeypatch.setattr(ops, "OPS", (*ops.OPS, extension["cumsum"].Cumsum()))
    monkeypatch.setattr(aten, "GEMM_OPS", (*aten.GEMM_OPS, "cumsum"))
    monkeypatch.setattr(backends, "all_backends", lambda: everything)
    monkeypatch.setattr(space_file, "BACKENDS", tuple(backend.name for backend in everything))
    yield
    torch.compiler.reset()


def cumsum_problem() -> Problem:
    return Problem(op="cumsum", inputs=(TensorSpec.contiguous((64, 1024), "float32"),), device="cpu")


def sites_in_what_inductor_sees(op: Op, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[Site]:
    found: list[Site] = []

    class Keep(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            found.extend(op.find(graph, frozenset(), "cpu"))

        def uuid(self) -> None:
            return None

    with torch.no_grad():
        options: dict[str, Any] = {"post_grad_custom_post_pass": Keep()}
        torch.compile(function, options=options)(x)
    return found


def test_the_op_is_found_in_what_inductor_sees(extension: dict[str, ModuleType]) -> None:
    op, x = extension["cumsum"].Cumsum(), torch.randn(64, 1024)
    found = sites_in_what_inductor_sees(op, lambda x: torch.cumsum(x.relu(), dim=-1) * 2, x)
    assert [site.problem for site in found] == [cumsum_problem()]
    assert found[0].producers == ("aten.relu",)
    assert found[0].consumers == ("aten.mul",)


def test_the_fusion_is_found_by_its_reference(extension: dict[str, ModuleType]) -> None:
    op, x = extension["softcap"].Softcap(), torch.randn(3, 5, 64)
    (site,) = sites_in_what_inductor_sees(op, lambda x: 30.0 * torch.tanh(x.relu() / 30.0) + 1, x)
    assert site.problem.key == "cpu: softcap(float32[3x5x64], cap=30.0)"
    assert op.dims(site.problem)["elements"] == 960
    assert sites_in_what_inductor_sees(op, lambda x: 30.0 * torch.tanh(x.relu() / 20.0), x) == []


@pytest.mark.usefixtures("_extended")
def test_the_backend_evaluates_and_beside_it_stock_code() -> None:
    code = next(code for code in blocks("extending.md", "python") if "EvaluateCandidate(" in code)
    scope: dict[str, object] = {}
    exec(code, scope)
    evaluation = scope["evaluation"]
    assert evaluation.status is Status.OK, evaluation.message  # type: ignore[attr-defined]
    candidate = Candidate(problem=cumsum_problem(), backend="aten", config={"prepack": False})
    stock = scope["EvaluateCandidate"](candidate=candidate, max_copies=4)()  # type: ignore[operator]
    assert stock.status is Status.OK, stock.message
    refused = Candidate(problem=cumsum_problem(), backend="chunked", config={"chunk": 100})
    assert scope["EvaluateCandidate"](candidate=refused, max_copies=4)().status is Status.INVALID  # type: ignore[operator]


@pytest.mark.usefixtures("_extended")
def test_the_search_space_is_legal(extension: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "cumsum.yaml").write_text(named_blocks("extending.md")["search_spaces/cumsum.yaml"])
    spaces = load_space("cumsum", tmp_path)
    facts = DeviceFacts(device="cpu", threads=2, isa="AVX512", l2_bytes=1 << 20, smem_bytes=0, num_units=2)
    names = names_for(extension["cumsum"].Cumsum().dims(cumsum_problem()), facts)
    assert spaces["chunked"].default(names) == {"chunk": 16}
    assert spaces["chunked"].count(names, 100) == 7


def test_all_that_expressions_may_use_is_listed() -> None:
    section = (DOCS / "extending.md").read_text(encoding="utf-8").split("## A search space")[1].split("## A backend")[0]
    for name in (*FUNCTIONS, *DEVICE_NAMES):
        assert f"`{name}`" in section, f"docs/extending.md does not list {name}"


def test_the_experiment_and_its_metric_run(tmp_path: Path) -> None:
    for path, code in named_blocks("extending.md").items():
        if path.startswith("experiments/"):
            (tmp_path / Path(path).name).write_text(code, encoding="utf-8")
    loaded = load_experiment(tmp_path / "mlp.yaml", ())
    model = load_model(loaded, "cpu")
    for name, scenario in loaded.experiment.scenarios.items():
        program = build_scenario(model, scenario, name, 0, "cpu", loaded.experiment.model.dtype, loaded=loaded)
        assert program.module(*program.inputs).shape == (scenario.batch, 256)
    assert len(load_metric(loaded, model, "cpu")(model)) == 32


def test_the_experiment_on_a_class_runs(tmp_path: Path) -> None:
    (tmp_path / "encoder.yaml").write_text(named_blocks("extending.md")["experiments/encoder.yaml"], encoding="utf-8")
    loaded = load_experiment(tmp_path / "encoder.yaml", ("device=cpu",))
    model, scenario = load_model(loaded, "cpu"), loaded.experiment.scenarios["one"]
    program = build_scenario(model, scenario, "one", 0, "cpu", "float32", loaded=loaded)
    torch.compiler.reset()
    compiled = torch.compile(program.module, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert compiled(*program.inputs).shape == (1, 48, 64)
    torch.compiler.reset()


def test_the_example_of_a_bundle_can_be_read(tmp_path: Path) -> None:
    (code,) = blocks("bundle.md", "json")
    (tmp_path / "bundle.json").write_text(code, encoding="utf-8")
    bundle = read_bundle(tmp_path)
    assert [entry.key for entry in bundle.entries] == ["cpu: mm(bfloat16[64x512], const bfloat16[512x2048]@1,512)"]
    assert bundle.sealed() == bundle
    page = (DOCS / "bundle.md").read_text(encoding="utf-8")
    for field in json.loads(code) | json.loads(code)["entries"][0]:
        assert f"`{field}`" in page, f"docs/bundle.md does not explain {field}"


@pytest.mark.parametrize("number", range(len(blocks("deploying.md", "python"))))
def test_production_examples_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = TensorSpec.contiguous((16, 64), "float32"), TensorSpec(shape=(64, 96), dtype="float32", stride=(1, 64))
    bias = TensorSpec.contiguous((96,), "float32")
    plain = Problem(op="mm", inputs=(x, weight), device="cpu", constants=(1,))
    biased = Problem(op="addmm", inputs=(bias, x, weight), device="cpu", constants=(0, 2))
    entries = [Entry(problem=problem, backend="aten", config={"prepack": True}) for problem in (plain, biased)]
    environment = current_environment("cpu", threads=2 if number == 0 else None)
    bundle = Bundle(name="t", created="", version="", environment=environment, entries=tuple(entries))
    write_bundle(bundle, tmp_path / "path" / "to" / "bundle")
    monkeypatch.chdir(tmp_path)
    threads, freezing = torch.get_num_threads(), torch._dynamo.config.prepare_freezing
    scope: dict[str, object] = {"print": lambda *_: None}
    packed = torch._dynamo.utils.counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"]
    try:
        torch.compiler.reset()
        exec(blocks("deploying.md", "python")[number], scope)
    finally:
        torch.set_num_threads(threads)
        torch._dynamo.config.prepare_freezing = freezing
        torch.compiler.reset()
    with torch.no_grad():
        assert scope["output"].shape[0] == 16  # type: ignore[attr-defined]
    assert torch._dynamo.utils.counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"] > packed


def test_the_readme_s_model_of_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "mlp.py").write_text(blocks("../README.md", "python")[0], encoding="utf-8")
    (experiment,) = blocks("../README.md", "yaml")
    (tmp_path / "mlp.yaml").write_text(experiment, encoding="utf-8")
    loaded = load_experiment(tmp_path / "mlp.yaml", ("device=cpu",))
    model, scenario = load_model(loaded, "cpu"), loaded.experiment.scenarios["one"]
    program = build_scenario(model, scenario, "one", 0, "cpu", "bfloat16", loaded=loaded)
    assert program.module(*program.inputs).shape == (1, 256)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_headings() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/LOG.md", *DOCS.glob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text(encoding="utf-8")):
            linked = page.parent / target if target else page
            assert anchor in anchors(linked), f"{page.name} links to {target}#{anchor}, which is no heading"


def test_named_keys_of_experiments_exist() -> None:
    """`validation.min_gain` and the like, wherever the pages mention one."""
    sections = set(Experiment.model_fields)
    for page in (ROOT / "README.md", *DOCS.glob("*.md")):
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)`", page.read_text(encoding="utf-8")):
            first, *rest = key.split(".")
            if first not in sections or rest[-1] in ("yaml", "py"):
                continue
            model: object = Experiment
            for part in (first, *rest):
                fields = getattr(model, "model_fields", {})
                assert part in fields, f"{page.name} names {key}, which experiments do not have"
                annotation = fields[part].annotation
                model = next(
                    (a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")), None
                )


def test_the_reference_has_the_keys_of_today() -> None:
    assert with_keys(REFERENCE) == REFERENCE, "run `python tests/experiment_keys.py`"


def test_the_reference_has_every_command_and_option() -> None:
    def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        yield path, command
        for name, below in getattr(command, "commands", {}).items():
            yield from walk(below, f"{path} {name}")

    for path, command in walk(get_command(app), "autokernel"):
        assert f"`{path}" in REFERENCE, f"docs/reference.md lacks {path}"
        for option in (name for parameter in command.params for name in parameter.opts if name.startswith("--")):
            assert f"`{option}" in REFERENCE, f"docs/reference.md lacks {option} of {path}"


def test_the_reference_has_every_variable_that_is_read() -> None:
    read = re.compile(r"environ(?:\.\w+)?[(\[]\s*\"(\w+)\"|\"(\w+)\" not in os\.environ|FOLDER_VARIABLE = \"(\w+)\"")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "autokernel").rglob("*.py")]
    names = {name for source in sources for found in read.findall(source) for name in found if name}
    assert {"AUTOKERNEL_CACHE_DIR", "COLUMNS", "CUDA_VISIBLE_DEVICES"} <= names
    assert sorted(name for name in names if f"`{name}`" not in REFERENCE) == []


def test_the_reference_names_every_op() -> None:
    assert [op.name for op in ops.OPS if f"`{op.name}`" not in REFERENCE] == []


def test_the_reference_s_experiment_on_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").symlink_to(ROOT / "experiments" / "models" / "tiny_llama")
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "my_model.yaml").write_text(blocks("reference.md", "yaml")[-1], encoding="utf-8")
    assert load_experiment(tmp_path / "my_model.yaml", ("device=cpu",)).experiment.model.by_auto_class


def test_the_reference_s_way_to_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").symlink_to(ROOT / "experiments" / "models" / "tiny_llama")
    x, weight = TensorSpec.contiguous((1, 384), "bfloat16"), TensorSpec(shape=(384, 384), dtype="bfloat16", stride=(1, 384))
    entry = Entry(
        problem=Problem(op="mm", inputs=(x, weight), device="cpu", constants=(1,)), backend="aten", config={"prepack": True}
    )
    environment = current_environment("cpu", threads=2)
    bundle = Bundle(name="t", created="", version="", environment=environment, entries=(entry,))
    write_bundle(bundle, tmp_path / "path" / "to" / "bundle")
    monkeypatch.chdir(tmp_path)
    threads, scope = torch.get_num_threads(), {"print": lambda *_: None}
    (code,) = blocks("reference.md", "python")
    try:
        torch.compiler.reset()
        exec(code, scope)
    finally:
        torch.set_num_threads(threads)
        torch.compiler.reset()
    (usage,) = scope["backend"].usage().values()  # type: ignore[attr-defined]
    assert usage.hits == 12  # four products in each of three layers: q, k, v and o


def test_the_readme_shows_the_public_api() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "autokernel.backend(" in text
    assert callable(autokernel.backend)
