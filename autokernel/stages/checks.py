"""What can be said of an experiment before anything is started: its ops, its search spaces, its device, its backends."""

from __future__ import annotations

from importlib.util import find_spec

from autokernel.backends import all_backends
from autokernel.config import LoadedExperiment
from autokernel.config_messages import suggestion
from autokernel.ops import OPS
from autokernel.requirements import install_extra
from autokernel.search.graph_options import load_graph_options
from autokernel.search.space_file import COPY, default_spaces_folder, load_space

HERE = ("local", "inline")  # addresses of clusters that are this machine alone


def check_experiment(loaded: LoadedExperiment) -> str:
    """Everything that can be checked without the model, its inputs and the metric's functions.

    Returns:
        The device it runs on.

    Raises:
        ConfigError: an op, a device or a package that there is not, or search spaces that cannot be read.
    """
    check_ops(loaded)
    check_spaces(loaded)
    check_packages(loaded)
    return resolve_device(loaded)


def check_ops(loaded: LoadedExperiment) -> None:
    """Raises ConfigError if the experiment names an op that does not exist."""
    known = [op.name for op in OPS]
    for name in loaded.experiment.search.without:
        if name not in known:
            raise loaded.wrong("search.without", f"{name!r} is no op; there are {', '.join(known)}{suggestion(name, known)}")


def check_spaces(loaded: LoadedExperiment) -> None:
    """Read all search spaces of the experiment's own folder, if it names one.

    Raises:
        ConfigError: a space cannot be read, or there is none for mm, without which hardly any model can be searched.
    """
    settings, graph = loaded.experiment.search, loaded.experiment.graph
    if settings.spaces is None:
        default_spaces_folder()
        return
    folder = loaded.resolve(settings.spaces)
    if not folder.is_dir():
        raise loaded.wrong("search.spaces", f"{folder} is no folder; {COPY}")
    missing = ops_without_space(loaded)
    if "mm" in missing:
        has = ", ".join(sorted(path.name for path in folder.glob("*.yaml"))) or "no *.yaml at all"
        raise loaded.wrong(
            "search.spaces",
            f"{folder} has no mm.yaml, which nearly every model needs; it has {has}: {COPY}, or leave that op alone with "
            "`search.without: [mm]`",
        )
    for op in OPS:
        if op.name not in missing and op.name not in settings.without:
            load_space(op.name, folder)
    if graph.enabled:
        for device in ("cpu", "cuda"):
            load_graph_options(device, folder)


def check_packages(loaded: LoadedExperiment) -> None:
    """Raises ConfigError if a package is not installed that the driver needs for what the experiment says."""
    experiment = loaded.experiment
    if experiment.search.sampler == "cmaes" and find_spec("cmaes") is None:
        raise loaded.wrong("search.sampler", "cmaes needs a package that is not installed: pip install cmaes")
    wants_driver = (experiment.storage or "").startswith("postgresql://")
    if wants_driver and not any(find_spec(name) for name in ("psycopg2", "psycopg")):
        raise loaded.wrong("storage", f"PostgreSQL needs a driver that is not installed: {install_extra('postgresql')}")


def ops_without_space(loaded: LoadedExperiment) -> list[str]:
    """Ops that may be searched, but have no space in the experiment's own folder: a hotspot of theirs ends the run."""
    settings = loaded.experiment.search
    if settings.spaces is None:
        return []
    folder = loaded.resolve(settings.spaces)
    names = [op.name for op in OPS if op.name not in settings.without]
    return [name for name in names if not (folder / f"{name}.yaml").is_file()]


def resolve_device(loaded: LoadedExperiment) -> str:
    """The experiment's device; "auto" is a GPU if there is one.

    Raises:
        ConfigError: it asks for a GPU and torch sees none.
    """
    import torch

    wanted = loaded.experiment.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available() and loaded.experiment.cluster.address in HERE:
        raise loaded.wrong(
            "device",
            f"cuda, but torch {torch.__version__} sees no GPU here; install a CUDA build of torch, set `device: cpu`, or name "
            "a cluster in `cluster.address`",
        )
    return wanted


def left_out_backends(loaded: LoadedExperiment, device: str) -> list[str]:
    """What there is to say of backends that the experiment names and this machine cannot use.

    Args:
        loaded: the experiment.
        device: "cpu" or "cuda".

    Returns:
        A sentence for each; none where the work is done on other machines.
    """
    if loaded.experiment.cluster.address not in HERE:
        return []
    named = [backend for backend in all_backends() if backend.name in loaded.experiment.backends]
    reasons = {backend.name: backend.unavailable(device) for backend in named}
    return [str(loaded.wrong("backends", f"{name} is left out: {reason}")) for name, reason in reasons.items() if reason]
