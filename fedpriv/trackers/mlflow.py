"""MLflow: a run on a tracking server, or in a folder."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from fedpriv.trackers.base import TrackedRun
from fedpriv.trackers.registry import TrackerOptions

# MLflow takes no longer ones.
_LONGEST = 500


class MlflowOptions(TrackerOptions):
    """Which server and experiment."""

    name: str = Field(default="mlflow", description="mlflow: a run of MLflow")
    uri: str | None = Field(
        default=None, description="of the tracking server; null: the folder mlruns in the run's"
    )
    experiment: str | None = Field(default=None, description="its name there; null: as here")


class MlflowTracker:
    """Writes metrics to a run of MLflow, the same one after a resume: see `Tracker`."""

    def __init__(self, options: MlflowOptions, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        place = options.uri or (run.folder / "mlruns").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=place)
        kept = run.folder / "mlflow.txt"
        if kept.exists():
            self._id = kept.read_text(encoding="utf-8")
            self._client.update_run(self._id, status="RUNNING")
            return
        title = options.experiment or run.name
        found = self._client.get_experiment_by_name(title)
        experiment = found.experiment_id if found else self._client.create_experiment(title)
        self._id = self._client.create_run(experiment, run_name=run.folder.name).info.run_id
        kept.write_text(self._id, encoding="utf-8")
        for key, value in run.settings.items():
            self._client.log_param(self._id, key, str(value)[:_LONGEST])

    def log(self, numbers: Mapping[str, float], round_: int) -> None:
        """Log a metric for each number."""
        for name, number in numbers.items():
            self._client.log_metric(self._id, name, number, step=round_)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)
