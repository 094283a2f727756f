"""What `experiments/*.yaml` may say. `autokernel schema` prints this as JSON schema for editors.

Relative paths in an experiment are relative to the folder of its file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from autokernel.config_messages import (
    ADDRESS_PATTERN,
    NAME_PATTERN,
    Mistake,
    from_overrides,
    mistakes,
    suggestion,
    without_passwords,
)
from autokernel.config_yaml import parse_yaml_mapping, set_value
from autokernel.errors import ConfigError, shortened
from autokernel.model_config import (
    CallScenario,
    DecodeScenario,
    ModelSection,
    PrefillScenario,
    Scenario,
    Section,
    Seed,
    TensorInput,
    written_as_json,
)

_STORAGE = ("sqlite", "postgresql", "mysql")
_TRACKING = (*_STORAGE, "mssql", "http", "https")

BackendName = Literal["aten", "inductor", "triton", "cutedsl"]
BACKENDS: tuple[str, ...] = get_args(BackendName)


class SearchSection(Section):
    """How much to try. The search stops at whichever of `trials` and `seconds` comes first."""

    trials: PositiveInt = Field(200, description="distinct candidates over all hotspots")
    seconds: PositiveFloat = Field(600, description="wall time of the search stage, that before an interruption included")
    min_trials: PositiveInt = Field(4, description="trials that every searched hotspot gets, whatever it could gain")
    workers: PositiveInt = Field(2, description="candidates in flight; timing itself is never concurrent on a device")
    sampler: Literal["auto", "model", "tpe", "random", "cmaes", "gp"] = Field(
        "auto", description="model: ranked by the shipped cost model; auto: model on the GPUs it was recorded on, else tpe"
    )
    seeds: tuple[Literal["stock", "history", "nvmatmul"], ...] = Field(
        ("stock", "history", "nvmatmul"), description="who proposes first, in this order"
    )
    without: tuple[str, ...] = Field((), description="ops to leave alone, by name: `[generated]` searches no generated fusions")
    hotspots: PositiveInt = Field(16, description="how many of the ranked hotspots to search at most")
    all_gemms: bool = Field(False, description="search GEMMs of lower rank as well, which fusions with more to gain outrank")
    min_weight: float = Field(0.01, ge=0, lt=1, description="leave hotspots below this share of the whole run alone")
    seed: Seed = Field(0, description="of samplers, and of the inputs that candidates are checked on")
    max_copies: int = Field(
        8, ge=1, le=64, description="sets of weights and inputs a candidate is timed on in turn; more keep caches colder"
    )
    trial_timeout_s: PositiveFloat = Field(120, description="one candidate, from build to re-check")
    spaces: Path | None = Field(None, description="folder of search spaces that replaces the package's own")


class GraphSection(Section):
    """Search over Inductor's graph-level options, judged end to end."""

    enabled: bool = Field(True, description="try sets of Inductor's own options on top of the entries")
    trials: PositiveInt = Field(8, description="option sets tried end to end, stock included")
    seconds: PositiveFloat = Field(600, description="wall time per scenario; sets that it does not suffice for are not tried")
    scenarios: tuple[str, ...] = Field((), description="scenarios that the sets are tried on; default: all")
    layers: PositiveInt | None = Field(
        None,
        description="try the sets on a model of so many layers (`model.depth_key`); validation always takes the whole model",
    )


class ProfileSection(Section):
    """What the model spends its time on, under Inductor's defaults."""

    layers: int | None = Field(
        None,
        ge=2,
        description="capture a model of so many layers (`model.depth_key`) and one of half as many, and reckon from both what "
        "all layers take; where the config has kinds of layers that take turns, of at most so many, whole turns apart; where "
        "layers differ in kind otherwise, the whole model is captured all the same",
    )


class PlanSection(Section):
    """Which fusions go together, where several would take the same part of a graph, with which configs; judged end to end."""

    enabled: bool = Field(
        True,
        description="time sets of fusions that exclude each other, and runners-up in the place of winners, in the model; else "
        "the single savings decide",
    )
    trials: PositiveInt = Field(
        4,
        description="plans per scenario that are timed in the model, at most: the one that should save most, and another for "
        "each 2 % of a step that the choice is about; the second half of them are Optuna's",
    )
    layers: PositiveInt | None = Field(
        None,
        description="time them in a model of so many layers (`model.depth_key`); validation always takes the whole model",
    )


class EvalSection(Section):
    """The model's own quality metric, measured with stock code and with the bundle."""

    metric: str = Field("bits_per_byte", description="`bits_per_byte`, `perplexity`, or `module:function` / `file.py:function`")
    data: str | None = Field(None, description="a text file, a folder of them, or `file.py:function` that returns bytes")
    max_bytes: PositiveInt = Field(65536, description="how much of the data to use")
    length: PositiveInt = Field(256, description="tokens per window")
    limit: PositiveFloat = Field(0.002, description="largest relative worsening allowed, at the interval's bad end")
    higher_is_better: bool = False
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of a metric function")

    _json = field_validator("arguments")(written_as_json)


# Of one round the interval has no width, and below six no two of the ratios hold the median in 95 % of cases. Eleven is what
# other comparisons of whole models take at least.
_LEAST_ROUNDS = 11
StockMode = Literal["eager", "default", "max-autotune", "reduce-overhead"]


class ValidationSection(Section):
    """What a winner has to prove. The numerical budget itself (2x eager's own error) is not negotiable."""

    eval: EvalSection | None = None
    deterministic: bool = Field(False, description="refuse candidates whose output differs between two runs")
    min_gain: float = Field(0.02, ge=0, lt=1, description="lower bound of a winner's speed-up must exceed 1 + min_gain")
    confirm_rounds: int = Field(41, ge=_LEAST_ROUNDS, description="paired rounds per confirmation")
    confirm_top: PositiveInt = Field(
        2, description="candidates per hotspot that are confirmed against the baselines, beside the best of the library"
    )
    end_to_end_rounds: int = Field(41, ge=_LEAST_ROUNDS, description="paired rounds per scenario and mode")
    max_copied_gb: PositiveFloat = Field(
        32,
        description="weights that entries may copy in all scenarios together (packed, or side by side for merged GEMMs); what "
        "gains least for its bytes is left out",
    )
    baselines: tuple[StockMode, ...] = Field(
        ("eager", "default", "max-autotune"),
        min_length=1,
        description="stock modes to be compared with; on a GPU all of them run from a CUDA graph that is captured by hand, but "
        "for reduce-overhead, which captures its own and is left out, with the reason, where it cannot, as on a CPU",
    )
    max_autotune_picks: bool = Field(
        True,
        description="where max-autotune is a baseline: have what it makes of each matrix product meet the finalists, and "
        "refuse those that are slower; this has Inductor build and time its whole list for each",
    )
    ablation: bool = Field(
        False, description="compile the model without each entry in turn, and drop entries that it is faster without"
    )
    ablation_layers: PositiveInt | None = Field(
        4,
        description="do that with a model of so many layers (`model.depth_key`); null: all. The last word has the whole model",
    )
    max_abs_error: PositiveFloat | None = Field(
        None, description="how far any output may be from that of eager PyTorch, on top of the numerical budget; default: any"
    )
    min_top1_agreement: float = Field(0.99, ge=0, le=1, description="language models: same most likely token as stock")


class ClusterSection(Section):
    """Where workers run. The default starts Ray on this machine."""

    address: str = Field(
        "local",
        pattern=ADDRESS_PATTERN,
        description="`local`, `auto`, `HOST:PORT`, or `ray://HOST:PORT`; `inline` uses no Ray at all",
    )
    gpus_per_worker: float = Field(1, gt=0, description="GPU runs only")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that Ray reserves for each worker")
    model_memory: float = Field(
        0.8, gt=0, le=1, description="part of a GPU's memory that jobs on the whole model may fill together; fewer run at once"
    )


class Experiment(Section):
    """One experiment: a model, its scenarios, what may be tried, and what has to be proved."""

    name: str = Field(pattern=NAME_PATTERN, description="names the run's folder and the MLflow experiment")
    model: ModelSection
    scenarios: dict[str, Scenario] = Field(min_length=1, description="name -> what the model does; each is timed end to end")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    threads: PositiveInt | None = Field(None, description="CPU threads of the model; default: physical cores")
    backends: tuple[BackendName, ...] = Field(
        ("aten", "inductor"), description="whose kernels are searched; aten is always there"
    )
    search: SearchSection = SearchSection()
    profile: ProfileSection = ProfileSection()
    plan: PlanSection = PlanSection()
    graph: GraphSection = GraphSection()
    validation: ValidationSection = ValidationSection()
    storage: str | None = Field(None, description="Optuna storage URL; default: SQLite in the run's folder")
    tracking: str | None = Field(None, description="MLflow tracking URI; default: SQLite in the runs folder")
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _combinations(self) -> Experiment:
        if "aten" not in self.backends:
            raise ValueError("backends: must include aten: the stock kernels are always in the candidate set")
        if self.device == "cpu":
            gpu_only = sorted({"triton", "cutedsl"} & set(self.backends))
            if gpu_only:
                raise ValueError(f"backends: {gpu_only} need a GPU, but device is cpu: remove them or set `device: cuda`")
        if self.device == "cpu" and set(self.validation.baselines) == {"reduce-overhead"}:
            raise ValueError("validation.baselines: reduce-overhead alone leaves nothing to compare with on a CPU: add default")
        metric = self.validation.eval.metric if self.validation.eval is not None else ""
        if not self.model.by_auto_class and metric in ("bits_per_byte", "perplexity"):
            raise ValueError(
                f"validation.eval.metric: {metric} is for language models; a model of your own class needs `module:function`"
            )
        for name, scenario in self.scenarios.items():
            if getattr(scenario, "rows", None) is not None and "triton" not in self.backends:
                raise ValueError(
                    f"scenarios.{name}.rows: only kernels of backend triton hold for a range of rows, and backends are "
                    f"{', '.join(self.backends)}: add triton to `backends`, or leave `rows` out"
                )
        for name in self.graph.scenarios:
            if name not in self.scenarios:
                known = ", ".join(self.scenarios)
                raise ValueError(f"graph.scenarios: {name!r} is none of {known}{suggestion(name, self.scenarios)}")
        for name, url, schemes in (("storage", self.storage, _STORAGE), ("tracking", self.tracking, _TRACKING)):
            scheme = url.partition("://")[0] if url is not None else ""
            if url is not None and scheme.partition("+")[0] not in schemes:
                known = ", ".join(f"{s}://" for s in schemes)
                raise ValueError(f"{name}: is a URL that begins with one of {known}, not {scheme!r}")
        if self.storage is not None and self.storage == self.tracking:
            raise ValueError("tracking: must be another database than that of `storage`: Optuna and MLflow clash in one")
        return self


class LoadedExperiment(Section):
    """An experiment with where it came from."""

    experiment: Experiment
    path: Path
    text: str = Field(description="the file as read, for the record")
    overrides: tuple[str, ...] = Field((), description="`a.b=value`, as given on top of the file, for messages and the record")

    def resolve(self, path: Path | str) -> Path:
        """A path of the experiment as an absolute path."""
        return (self.path.parent / Path(path).expanduser()).resolve()

    def wrong(self, key: str, text: str) -> ConfigError:
        """What to raise for a key that says what cannot be: names the file, the key and the `--set` that it is from."""
        return ConfigError(f"{self.path}: {key}: {text}{from_overrides(key, self.overrides)}")


def load_experiment(path: Path | str, overrides: tuple[str, ...] = ()) -> LoadedExperiment:
    """Read and check an experiment; `overrides` are `a.b=value` with the value in YAML.

    Raises:
        ConfigError: names the file, the key's path, the value and the cure.
    """
    try:
        path = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # an unknown `~user`, a NUL
        raise ConfigError(f"{path!r}: is no path: {error}") from None
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; in that folder: {', '.join(near)}" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    experiment = parse_experiment(text, path, overrides)
    said = tuple(map(without_passwords, overrides))
    loaded = LoadedExperiment(experiment=experiment, path=path, text=text, overrides=said)
    _check_files(loaded)
    return loaded


def parse_experiment(text: str, path: Path, overrides: tuple[str, ...] = ()) -> Experiment:
    """The experiment that a file's text and the overrides make, without a look at the files that it names.

    Raises:
        ConfigError: as `load_experiment`.
    """
    data = parse_yaml_mapping(text, path)
    for override in overrides:
        set_value(data, override)
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        found = mistakes(error, Experiment, data)
    in_file: list[Mistake] = []
    if overrides:  # are they to blame, or is the file wrong by itself?
        alone = parse_yaml_mapping(text, path)
        try:
            Experiment.model_validate(alone)
        except ValidationError as error:
            in_file = mistakes(error, Experiment, alone)
    lines = [f"{path}: {m}{'' if m in in_file else _blamed(m, overrides)}" for m in found]
    raise ConfigError("\n".join(lines))


def _blamed(mistake: Mistake, overrides: tuple[str, ...]) -> str:
    return from_overrides(mistake.key, overrides) or from_overrides("", overrides)


def _check_files(loaded: LoadedExperiment) -> None:
    """Everything the experiment names on disk must be there before anything is started."""
    experiment = loaded.experiment
    model = experiment.model
    wanted: list[tuple[str, Path | str, str]] = []
    if model.checkpoint is not None:
        wanted.append(("model.checkpoint", model.checkpoint, "a folder with config.json and *.safetensors"))
    if isinstance(model.config, Path):
        wanted.append(("model.config", model.config, "a config.json"))
    if experiment.search.spaces is not None:
        wanted.append(("search.spaces", experiment.search.spaces, "a folder of <op>.yaml files"))
    functions = [("model.factory", model.factory), ("model.class_path", model.class_path)]
    calls = {name: s for name, s in experiment.scenarios.items() if isinstance(s, CallScenario)}
    functions += [(f"scenarios.{name}.inputs", scenario.inputs_function) for name, scenario in calls.items()]
    if experiment.validation.eval is not None:
        data, metric = experiment.validation.eval.data, experiment.validation.eval.metric
        functions.append(("validation.eval.metric", metric if ":" in metric else None))
        if data is not None and ":" in data:
            functions.append(("validation.eval.data", data))
        elif data is not None:
            wanted.append(("validation.eval.data", data, "a text file or a folder of them"))
        elif metric in ("bits_per_byte", "perplexity"):
            raise loaded.wrong("validation.eval.data", f"metric {metric} needs text to be measured on")
        if metric not in ("bits_per_byte", "perplexity") and ":" not in metric:
            raise loaded.wrong("validation.eval.metric", f"{metric!r} is neither bits_per_byte, perplexity nor module:function")
    for key, reference in functions:
        if reference is None:
            continue
        target, colon, function = reference.rpartition(":")
        if not colon or not function.isidentifier() or not target:
            raise loaded.wrong(key, f"{reference!r} must look like package.module:function or file.py:function")
        if target.endswith(".py"):
            wanted.append((key, target, "a Python file"))
    for key, name, what in wanted:
        try:
            place = loaded.resolve(name)
            is_there, is_checkpoint = place.exists(), (place / "config.json").is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, an unknown `~user`, a NUL
            said = shortened(repr(str(name)))
            raise loaded.wrong(key, f"{said} cannot be looked up ({_why(error)}); it should be {what}") from None
        if not is_there:
            raise loaded.wrong(key, f"{place} does not exist; it should be {what}")
        if key == "model.checkpoint" and not is_checkpoint:
            raise loaded.wrong(key, f"{place} holds no config.json")


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


__all__ = [
    "BACKENDS",
    "CallScenario",
    "ClusterSection",
    "DecodeScenario",
    "EvalSection",
    "Experiment",
    "GraphSection",
    "LoadedExperiment",
    "ModelSection",
    "PrefillScenario",
    "Scenario",
    "SearchSection",
    "StockMode",
    "TensorInput",
    "ValidationSection",
    "load_experiment",
    "parse_experiment",
    "parse_yaml_mapping",
]
