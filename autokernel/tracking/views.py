"""Saved views of MLflow's run table, so that its user interface opens on results instead of an empty landing page.

MLflow keeps a shared view as an experiment tag `mlflow.sharedViewState.<key>` with a compressed JSON state. That format
is MLflow's own and undocumented (seen in 3.15 to 3.17): where it is refused, `publish_views` says so and links lead to
the plain table.
"""

from __future__ import annotations

import base64
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from autokernel.tracking.mlflow_env import prepare_environment

logger = logging.getLogger(__name__)

RESULTS, HOTSPOTS, TRIALS, CHART = "ak-results", "ak-hotspots", "ak-trials", "ak-chart"
VIEW_NAMES = {
    RESULTS: "1 Results",
    HOTSPOTS: "2 Hotspots",
    TRIALS: "3 Trials (by speed-up)",
    CHART: "4 Parallel coordinates",
}
_TABLE: Mapping[str, Any] = {
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "columnOrder": [],
    "columnWidths": {},
    "runsHiddenMode": "SHOWALL",
    "viewMaximized": False,
    "runListHidden": False,
    "isAccordionReordered": False,
    "useGroupedValuesInCharts": True,
    "hideEmptyCharts": True,
    "groupBy": None,
    "groupsExpanded": {},
    "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartedTrials:
    """What the chart of parallel coordinates shows: trials that have the same parameters, for MLflow draws no others."""

    hotspot: str  # its title
    backend: str
    params: tuple[str, ...]  # the most telling first


def view_states(
    scenarios: Sequence[str], params: Sequence[str], charted: ChartedTrials | None = None
) -> dict[str, dict[str, Any]]:
    """The state of each view, by its key.

    Args:
        scenarios: their end-to-end speed-ups become columns of "Results".
        params: names of the trials' parameters, the most telling first.
        charted: the trials of the chart; None (nothing was tried yet) leaves it without parameters.
    """
    columns = [f"metrics.`e2e.{name}.speedup`" for name in scenarios]
    trial = "tags.`ak.kind` = 'trial' and tags.`ak.status` = 'OK'"
    one, title = trial, ""
    if charted is not None:
        named = charted.hotspot.replace("'", "")
        one = f"{trial} and params.`hotspot` = '{named}' and params.`backend` = '{charted.backend}'"
        title = f": {charted.backend}, {charted.hotspot}"
    chart = {
        "uuid": "ak-parallel",
        "type": "PARALLEL",
        "runsCountToCompare": 100,
        "metricSectionId": "ak-section",
        "deleted": False,
        "isGenerated": False,
        "displayName": f"Configs and latency{title}",
        "selectedParams": list(charted.params[:8]) if charted is not None else [],
        "selectedMetrics": ["latency_us"],
        "showAllRuns": True,
    }
    section = {
        "uuid": "ak-section",
        "name": "Kernel search",
        "columns": 1,
        "cardHeight": 330,
        "display": True,
        "isReordered": False,
        "deleted": False,
        "isGenerated": False,
    }
    gains = ["weight_pct", "baseline_us", "best_latency_us", "speedup", "speedup_low", "speedup_high"]
    gains += ["roofline_stock_pct", "roofline_pct", "runner_up_pct", "trials"]
    return {
        RESULTS: _state(
            "tags.`ak.kind` = 'campaign'",
            "attributes.start_time",
            False,
            ["tags.`ak.status`", "metrics.`winners`", "metrics.`trials`", "metrics.`e2e.speedup`", *columns, "params.`torch`"],
        ),
        HOTSPOTS: _state(
            "tags.`ak.kind` = 'hotspot'",
            "metrics.`weight_pct`",  # sorted by time, MLflow would fold the rows under their campaign
            False,
            ["tags.`ak.status`", "tags.`ak.used`", *(f"metrics.`{name}`" for name in gains), "tags.`ak.runner_up`"],
        ),
        TRIALS: _state(
            trial,
            "metrics.`speedup`",  # times of different shapes do not compare
            False,
            ["metrics.`latency_us`", "metrics.`speedup`", "metrics.`limit_used`", "params.`hotspot`", "params.`backend`"]
            + [f"params.`{name}`" for name in params[:8]],
        ),
        CHART: {
            **_state(one, "metrics.`latency_us`", True, ["metrics.`latency_us`"]),
            "compareRunCharts": [chart],
            "compareRunSections": [section],
        },
    }


def _state(search: str, order: str, ascending: bool, columns: list[str]) -> dict[str, Any]:
    name = "attributes.`Run Name`"
    widths = {name: 380} | {c: 230 if c == "params.`hotspot`" else 22 + 7 * max(9, len(c) - 10) for c in columns}
    return {
        **_TABLE,
        "searchFilter": search,
        "orderByKey": order,
        "orderByAsc": ascending,
        "selectedColumns": columns,
        "columnOrder": [name, *columns],
        "columnWidths": widths,
    }


def encode_view(name: str, state: Mapping[str, Any], time_ms: int) -> str:
    """The tag's value."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": name, "createdAt": time_ms, "updatedAt": time_ms, "state": f"deflate;{packed}"})


def publish_views(client: Any, experiment_id: str, states: Mapping[str, Mapping[str, Any]], time_ms: int) -> list[str]:
    """Store the views with their experiment.

    Args:
        client: an `mlflow.MlflowClient`.
        experiment_id: of MLflow.
        states: from `view_states`.
        time_ms: since 1970; shown as the view's age.

    Returns:
        The keys that were stored; fewer where the server refuses the tag.
    """
    prepare_environment()
    from mlflow.exceptions import MlflowException

    stored = []
    for key, state in states.items():
        try:
            value = encode_view(VIEW_NAMES[key], state, time_ms)
            client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{key}", value)
            stored.append(key)
        except MlflowException as error:
            logger.warning("MLflow refused the saved view %r (%s); the plain table of runs remains", VIEW_NAMES[key], error)
    return stored


def ui_url(base: str, experiment_id: str | None = None, view: str | None = RESULTS) -> str:
    """Address of MLflow's user interface.

    Args:
        base: e.g. `http://127.0.0.1:5000`.
        experiment_id: None leads to the list of experiments.
        view: key of a saved view; None leads to the plain table.
    """
    query = {"workflowType": "machine_learning"}
    if experiment_id is None:
        return f"{base.rstrip('/')}/#/experiments?{urlencode(query)}"
    if view is not None:
        query["viewStateShareKey"] = view
    if view == CHART:
        query["compareRunsMode"] = "CHART"
    return f"{base.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs?{urlencode(query)}"
