"""Track a run with MLflow, which reads its variables MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME (default ``ptd``).

A run that continues is found by its id, which is the value of its tag ``ptd.run``. Records that MLflow already has are
not sent again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from ptd.trackers import Status, Tracked
from ptd.values import flattened

TAG = "ptd.run"
ENDS: dict[Status, str] = {"finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
PARAMS, PARAM_LENGTH = 100, 500
"""Settings per request, and characters of a setting, that every MLflow server accepts."""


class Mlflow:
    """One MLflow run with its own client, so that the active run of the fluent API remains the caller's."""

    def __init__(self, run: Tracked) -> None:
        self._client = client = MlflowClient()
        self._last: dict[str, int] = {}
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ptd")
        experiment = client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment is not None else client.create_experiment(name)
        earlier = client.search_runs([place], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        self._continued = bool(earlier)
        if earlier:
            self._id = earlier[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            return
        self._id = client.create_run(place, run_name=run.name, tags={TAG: run.id}).info.run_id
        params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in flattened(run.config).items()]
        for begin in range(0, len(params), PARAMS):
            client.log_batch(self._id, params=params[begin : begin + PARAMS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        new = [Metric(key, float(value), now, step) for key, value in values.items() if step > self._known(key)]
        if new:
            self._client.log_batch(self._id, metrics=new)

    def _known(self, key: str) -> int:
        """Return the last step for which an earlier start sent this metric; −1 if none did."""
        if key not in self._last:
            history = self._client.get_metric_history(self._id, key) if self._continued else []
            self._last[key] = max((metric.step for metric in history), default=-1)
        return self._last[key]

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._id, status=ENDS[status])


def start(run: Tracked) -> Mlflow:
    return Mlflow(run)
