"""Writes a journal's events into MLflow, once each, however often it is asked to."""

from __future__ import annotations

import datetime
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from autokernel.errors import StorageError
from autokernel.events import Confirmed, Evaluated, Event, Profiled, RunStarted, StageFinished
from autokernel.records import Problem, Status
from autokernel.tracking import mlflow_layout as layout
from autokernel.tracking.journal import JOURNAL_NAME, Entry, bundle_folder, find_runs, is_being_written, read_entries
from autokernel.tracking.mlflow_env import (
    default_artifact_folder,
    default_tracking_uri,
    is_server,
    prepare_environment,
    redacted,
    scrubbed,
    with_driver,
)
from autokernel.tracking.plots import parameter_importance, write_plots
from autokernel.tracking.report import write_report
from autokernel.tracking.summary import ProblemSummary, RunSummary, latency_us, rounded, summarize
from autokernel.tracking.views import publish_views, view_states

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)
T = TypeVar("T")

_BATCH = 1000  # MLflow's own limit of metrics per call
_CAMPAIGN_STATUS = {"won": "FINISHED", "stock": "FINISHED", "failed": "FAILED"}


@dataclass(slots=True)
class _Hotspot:
    """A hotspot's run while trials come in."""

    run_id: str
    baseline_us: float | None = None
    best_us: float | None = None
    seen: set[str] = field(default_factory=set)  # candidate ids
    pending: list[Metric] = field(default_factory=list)


class MlflowWriter:
    """Takes the entries of one journal in order, from its first line.

    What MLflow already has is found by its tags and completed, so feeding a journal again changes nothing. Metrics
    carry the journal's times: MLflow recognises a repeated point as the same one.

    Args:
        tracking_uri: any that MLflow knows.
        run_folder: `<runs folder>/<experiment>/<run_id>`; artifacts are read from there.
    """

    def __init__(self, tracking_uri: str, run_folder: Path | str) -> None:
        prepare_environment()
        from mlflow import MlflowClient

        self.experiment_id = ""
        self._uri = tracking_uri
        self._folder = Path(run_folder)
        self._client = MlflowClient(with_driver(tracking_uri))
        self._events: list[Event] = []
        self._campaign = ""
        self._ak_run_id = ""
        self._pending: list[Metric] = []  # the campaign's
        self._num_graph_trials = 0
        self._existing: dict[str, tuple[str, bool]] = {}  # ak.key -> MLflow run, whether it is finished
        self._hotspots: dict[str, _Hotspot] = {}
        self._last_ms = 0

    def take(self, entry: Entry) -> None:
        """Mirror one event. Metrics of hotspots and campaign wait for `flush`."""
        event = entry.event
        self._last_ms = time_ms = _ms(entry.time)
        self._events.append(event)
        match event:
            case RunStarted():
                self._begin(event, time_ms)
            case Profiled():
                for problem in summarize(self._events).problems:
                    self._hotspot(problem, time_ms)
                self._publish_views()
            case Evaluated():
                self._trial(event, time_ms)
            case Confirmed():
                self._confirmed(event, time_ms)
            case StageFinished():
                self._client.set_tag(self._campaign, "mlflow.note.content", layout.campaign_note(summarize(self._events)))
        metrics = layout.campaign_metrics(event)
        self._num_graph_trials += "graph.score" in metrics
        self._pending += _metrics(metrics, time_ms, self._num_graph_trials if "graph.score" in metrics else 0)

    def flush(self) -> None:
        """Send the metrics that wait."""
        for target in (self._campaign, *self._hotspots):
            hotspot = self._hotspots.get(target)
            pending = hotspot.pending if hotspot is not None else self._pending
            run_id = hotspot.run_id if hotspot is not None else self._campaign
            for batch in _batches(pending, _BATCH):
                self._client.log_batch(run_id, metrics=batch)
            pending.clear()

    def settle(self) -> None:
        """The writer of the journal is gone: describe the results, store the artifacts, close the runs."""
        if not self._campaign:
            return
        run = summarize(self._events)
        for problem in run.problems:
            self._settle_hotspot(problem)
        status = run.outcome if run.outcome != "unfinished" else "interrupted"
        self._pending += _metrics(layout.campaign_totals(run), self._last_ms)
        self.flush()
        self._client.set_tag(self._campaign, "ak.status", status)
        self._client.set_tag(self._campaign, "mlflow.note.content", layout.campaign_note(run))
        self._store_artifacts(run)
        self._publish_views()
        self._client.set_terminated(self._campaign, _CAMPAIGN_STATUS.get(status, "KILLED"), self._last_ms)

    def _begin(self, event: RunStarted, time_ms: int) -> None:
        if self._campaign:  # resumed: the runs go on
            return
        self._ak_run_id = event.run_id
        name = layout.experiment_name(event)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            self.experiment_id = experiment.experiment_id
        else:
            artifacts = None if is_server(self._uri) else default_artifact_folder(self._folder.parent.parent).as_uri()
            self.experiment_id = self._client.create_experiment(name, artifact_location=artifacts)
        self._client.set_experiment_tag(self.experiment_id, "mlflow.note.content", layout.experiment_note(event))
        self._find_existing(event.run_id)
        self._campaign = self._ensure(layout.campaign_spec(event), "", time_ms)

    def _find_existing(self, run_id: str) -> None:
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], f"tags.`ak.run_id` = '{run_id}'", max_results=1000, page_token=token
            )
            for run in page:
                self._existing[run.data.tags.get("ak.key", "")] = (run.info.run_id, run.info.status != "RUNNING")
            token = page.token
            if not token:
                return

    def _ensure(self, spec: layout.RunSpec, parent: str, time_ms: int) -> str:
        """The MLflow run of a campaign or hotspot, made if it is not there, and open."""
        run_id, finished = self._existing.get(spec.key, ("", False))
        if not run_id:
            run_id = self._create(spec, parent, time_ms)
        elif finished:
            self._client.update_run(run_id, status="RUNNING")
        self._log(run_id, spec, time_ms)
        return run_id

    def _create(self, spec: layout.RunSpec, parent: str, time_ms: int) -> str:
        tags = {**spec.tags, **({"mlflow.parentRunId": parent} if parent else {})}
        run = self._client.create_run(self.experiment_id, start_time=time_ms, tags=tags, run_name=spec.name)
        return str(run.info.run_id)

    def _log(self, run_id: str, spec: layout.RunSpec, time_ms: int) -> None:
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in spec.params.items()]
        if params or spec.metrics:
            self._client.log_batch(run_id, metrics=_metrics(spec.metrics, time_ms), params=params)

    def _hotspot(self, summary: ProblemSummary, time_ms: int) -> _Hotspot:
        key = summary.problem.key
        if key not in self._hotspots:
            spec = layout.hotspot_spec(summary, self._ak_run_id)
            self._hotspots[key] = _Hotspot(run_id=self._ensure(spec, self._campaign, time_ms))
        return self._hotspots[key]

    def _hotspot_of(self, problem: Problem, time_ms: int) -> _Hotspot:
        """Also for a problem that the profile does not name."""
        return self._hotspots.get(problem.key) or self._hotspot(ProblemSummary(problem=problem, rank=0, hotspots=()), time_ms)

    def _trial(self, event: Evaluated, time_ms: int) -> None:
        evaluation = event.evaluation
        candidate = evaluation.candidate
        hotspot = self._hotspot_of(candidate.problem, time_ms)
        if evaluation.status is Status.LOST or candidate.id in hotspot.seen:
            return
        hotspot.seen.add(candidate.id)
        if evaluation.status is Status.OK:
            us = latency_us(event)
            if event.origin == "stock":
                hotspot.baseline_us = min(us, hotspot.baseline_us or us)
            hotspot.best_us = min(us, hotspot.best_us or us)
        if hotspot.best_us is not None:
            best = {"best_latency_us": rounded(hotspot.best_us)}
            hotspot.pending += _metrics(best, time_ms, len(hotspot.seen))
        run_id, finished = self._existing.get(candidate.id, ("", False))
        if finished:
            return
        spec = layout.trial_spec(event, hotspot.baseline_us, self._ak_run_id)
        start_ms = time_ms - round(1000 * evaluation.total_s)
        run_id = run_id or self._create(spec, hotspot.run_id, start_ms)
        self._log(run_id, spec, time_ms)
        self._client.set_terminated(run_id, spec.status, time_ms)

    def _confirmed(self, event: Confirmed, time_ms: int) -> None:
        hotspot = self._hotspot_of(event.candidate.problem, time_ms)
        values = layout.speedup_metrics("", event.speedup)
        if event.winner is not None:
            values |= {"baseline_us": rounded(event.winner.baseline_us), "winner_us": rounded(event.winner.winner_us)}
        hotspot.pending += _metrics(values, time_ms)

    def _settle_hotspot(self, problem: ProblemSummary) -> None:
        hotspot = self._hotspot(problem, self._last_ms)
        values, tags = layout.hotspot_result(problem)
        hotspot.pending += _metrics({"trials": float(len(hotspot.seen)), **values}, self._last_ms)
        for name, value in tags.items():
            self._client.set_tag(hotspot.run_id, name, value)
        self._client.set_tag(hotspot.run_id, "mlflow.note.content", layout.hotspot_note(problem))
        self._client.set_terminated(hotspot.run_id, "FINISHED", self._last_ms)

    def _publish_views(self) -> None:
        run = summarize(self._events)
        scenarios = [layout.safe_key(name) for name in (run.profiled.scenario_us if run.profiled is not None else {})]
        important = [layout.safe_key(name) for name in parameter_importance(run)]
        seen = {layout.safe_key(name) for p in run.problems for t in p.timed for name in t.evaluation.candidate.config}
        params = [*important, *sorted(seen - set(important))]
        states = view_states(scenarios, params, layout.charted_trials(run, params))
        publish_views(self._client, self.experiment_id, states, self._last_ms)

    def _store_artifacts(self, run: RunSummary) -> None:
        self._client.log_text(self._campaign, run.started.experiment, "experiment.yaml")
        journal = self._folder / JOURNAL_NAME
        if journal.is_file():
            self._client.log_artifact(self._campaign, str(journal))
        if run.exported is not None:
            bundle = bundle_folder(self._folder, run.exported)
            if bundle.is_dir():
                self._client.log_artifacts(self._campaign, str(bundle), "bundle")
            else:
                logger.warning("%s: the bundle is not there any more; it is left out of the artifacts", bundle)
        with tempfile.TemporaryDirectory() as scratch:
            write_report(self._events, Path(scratch) / "report.html")
            write_plots(run, Path(scratch) / "plots")
            self._client.log_artifacts(self._campaign, scratch)


def _metrics(values: Mapping[str, float], time_ms: int, step: int = 0) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(name, value, time_ms, step) for name, value in values.items()]


def _ms(time: datetime.datetime) -> int:
    return round(time.timestamp() * 1000)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Synced:
    """Where a journal now is in MLflow."""

    tracking_uri: str
    experiment_id: str


def sync_journal(journal_path: Path | str, tracking_uri: str | None = None) -> Synced:
    """Make MLflow hold what a journal says, creating or completing what is missing. Idempotent.

    Args:
        journal_path: a `journal.jsonl` or its folder.
        tracking_uri: default: the SQLite file in the folder of runs.

    Raises:
        StorageError: the journal cannot be read, or MLflow does not take it.
    """
    folder = Path(journal_path)
    folder = (folder if folder.is_dir() else folder.parent).resolve()
    uri = tracking_uri or default_tracking_uri(folder.parent.parent)
    prepare_environment()
    from mlflow.exceptions import MlflowException

    try:
        writer = MlflowWriter(uri, folder)
        for entry in read_entries(folder):
            writer.take(entry)
        writer.flush()
        writer.settle()
    except (MlflowException, OSError, ImportError, ValueError) as error:  # the last: a URI that is none
        raise StorageError(
            f"{redacted(uri)}: MLflow did not take the run {folder.name}: {scrubbed(str(error), uri)}. "
            f"The journal has everything: repeat this when the server answers again"
        ) from None
    return Synced(tracking_uri=uri, experiment_id=writer.experiment_id)


def sync_runs(runs_folder: Path | str, tracking_uri: str | None = None) -> int:
    """`sync_journal` for every run below a folder, oldest first.

    Runs that are still being written have a mirror of their own and are left to it; runs that cannot be read or stored
    are logged and passed over.

    Returns:
        How many were synchronised.
    """
    count = 0
    for folder in reversed(find_runs(runs_folder)):
        if is_being_written(folder):
            continue
        try:
            sync_journal(folder, tracking_uri)
            count += 1
        except StorageError as error:
            logger.warning("%s is left out: %s", folder, error)
    return count
