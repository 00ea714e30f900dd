"""MLflow as a writer: the recipe, the commit, numbers and pictures. The last AP is the run's metric."""

import os
import re
from collections.abc import Mapping
from io import BytesIO

import mlflow
from PIL import Image

from scratch_det.config.load import flatten, plain
from scratch_det.engine.writers import PROJECT, Run, Writer


class MLflow(Writer):
    """A run of the server at MLFLOW_TRACKING_URI, or of mlflow.db in the current folder."""

    is_slow = True

    def __init__(self, run: Run):
        if not run.id and not os.environ.keys() & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"}:
            mlflow.set_experiment(PROJECT)
        tags = {"mlflow.source.git.commit": run.commit} if run.commit else {}
        active = mlflow.start_run(run.id, run_name=str(run.run_dir.path), tags=tags)
        if not run.id:  # a parameter has one value for ever
            mlflow.log_params({key: plain(value) for key, value in flatten(run.cfg).items()})
        run.id = active.info.run_id

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        names = {re.sub(r"[^\w\-./: ]", "_", key): value for key, value in values.items()}  # a class may have any name
        mlflow.log_metrics(names, step=iteration)

    def image(self, iteration: int, name: str, picture: bytes) -> None:
        mlflow.log_image(Image.open(BytesIO(picture)), key=name, step=iteration, synchronous=True)

    def close(self, end: str) -> None:
        mlflow.end_run({"finished": "FINISHED", "failed": "FAILED"}.get(end, "KILLED"))  # paused, too: it may go on
