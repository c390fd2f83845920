"""A run in MLflow: in a database beside the runs, or on the server of MLFLOW_TRACKING_URI."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from itpn.errors import MachineError, UserError
from itpn.system.console import print_note
from itpn.training.config import RunConfig, to_dict
from itpn.training.loggers.logger import Ending, Logger, describe, import_library, keep_run_id, read_run_id
from itpn.training.run_folder import RunFolder

# the user's own variables have precedence
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # which functions are used, sent to its makers
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what went wrong is said by us, in a line
    # training waits meanwhile; what was not sent is sent later
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
SEND_EVERY = 5.0  # seconds
RETRY_AFTER = 300.0  # seconds
STALL = 0.05  # fraction of the time that training waits for a server that does not answer
MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 6000  # MLflow takes at once


class MLflowRun(Logger):
    """A run of MLflow. What cannot be sent is kept in memory and sent later; the training continues."""

    def __init__(self, folder: RunFolder, config: RunConfig, resumed: bool, console: Console) -> None:
        self._folder = folder
        self._config = config
        self._resumed = resumed
        self._console = console
        self._mlflow: Any = None
        self._client: Any = None
        self._run_id = ""
        self._last_step = -1  # that an earlier process has logged
        self._metrics: list[Any] = []
        self._uploads: list[Callable[[], None]] = []
        self._next = 0.0

    def start(self) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        mlflow = self._mlflow = import_library("mlflow")
        output = Path(self._config.output_dir).absolute()
        given = os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or str(output / "mlflow.db")
        try:
            uri = given or make_uri(output / "mlflow.db")
            self._client = mlflow.MlflowClient(uri)
            earlier = read_run_id(self._folder, "mlflow") if self._resumed else None
            if earlier is None or not self._continue(earlier):
                self._begin(None if given else (output / "mlartifacts").as_uri())
        except Exception as error:  # its stores raise anything
            status = getattr(error, "get_http_status_code", lambda: 500)()
            mistake = isinstance(error, ImportError) or status < 500  # mlflow-skinny has no databases
            kind = UserError if mistake and not isinstance(error, OSError) else MachineError
            raise kind(f"--trainer.logger mlflow: {uri} cannot be used: {describe(error)}") from error
        keep_run_id(self._folder, "mlflow", self._run_id)
        shown = uri if uri.startswith("http") else f"`mlflow ui --backend-store-uri {uri}`"
        print_note(f"mlflow: run {self._run_id}, {shown}", self._console)

    def _begin(self, artifacts: str | None) -> None:
        """Begin a run of the experiment that variables name.

        Args:
            artifacts: where files of a new experiment go; None for where the server wants them.
        """
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "itpn")
        identity = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if identity is None:
            known = self._client.get_experiment_by_name(name)
            identity = known.experiment_id if known is not None else None
        if identity is None:
            identity = self._client.create_experiment(name, artifact_location=artifacts)
        run = self._client.create_run(identity, run_name=f"{self._folder.recipe}/{self._config.name}")
        self._run_id = run.info.run_id
        settings = {"recipe": self._folder.recipe, "task": self._config.task, **to_dict(self._config)}
        params = [self._mlflow.entities.Param(name, value[:LONGEST_PARAM]) for name, value in flatten(settings)]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[first : first + MOST_PARAMS])

    def _continue(self, run_id: str) -> bool:
        """Continue the run of an earlier process, if it is there."""
        self._run_id = run_id
        try:
            self._client.update_run(self._run_id, status="RUNNING")
            logged = self._client.get_metric_history(self._run_id, "loss")
        except self._mlflow.exceptions.MlflowException as error:
            if error.get_http_status_code() < 500:
                print_note(f"mlflow: run {self._run_id} is not there: beginning another", self._console)
                return False
            self._postpone(error, 0.0)
            return True
        self._last_step = max((metric.step for metric in logged), default=-1)
        return True

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        metric, now = self._mlflow.entities.Metric, int(time.time() * 1000)
        if step > self._last_step:
            self._metrics += [metric(name, value, now, step) for name, value in metrics.items() if value is not None]
        if time.monotonic() >= self._next:
            self._send()

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        self._uploads.append(lambda: self._client.log_image(self._run_id, image, key=name, step=step, synchronous=True))

    def log_files(self, files: Sequence[Path]) -> None:
        self._uploads += [partial(self._client.log_artifact, self._run_id, str(path)) for path in files]

    def flush(self) -> None:
        if time.monotonic() >= self._next - SEND_EVERY:
            self._send()

    def close(self, ending: Ending) -> None:
        self._uploads.append(lambda: self._client.set_terminated(self._run_id, STATUS[ending]))
        self._send(last=True)

    def _send(self, last: bool = False) -> None:
        """Send what has gathered; what cannot be sent stays for later, if there is one."""
        begin = time.monotonic()
        self._next = begin + SEND_EVERY
        try:
            while self._metrics:
                self._client.log_batch(self._run_id, metrics=self._metrics[:MOST_METRICS])
                del self._metrics[:MOST_METRICS]
            while self._uploads:
                self._uploads[0]()
                del self._uploads[0]
        except Exception as error:  # a service of others must not end the training
            self._postpone(error, time.monotonic() - begin, last)

    def _postpone(self, error: Exception, seconds: float, last: bool = False) -> None:
        self._next = time.monotonic() + max(RETRY_AFTER, seconds / STALL)
        files = max(len(self._uploads) - 1, 0)  # the last is no file: it sets the status
        left = f"{len(self._metrics)} metrics and {files} files are in {self._folder.path} alone"
        then = left if last else "the training continues, and what is missing is sent later"
        print_note(f"mlflow: logging failed ({describe(error)}); {then}", self._console)


def make_uri(path: Path) -> str:
    """The address of a database in a file, whatever the file is called."""
    if not {"%", "?"} & {*str(path)}:
        return f"sqlite:///{path}"
    url = import_module("sqlalchemy").URL.create("sqlite", database=str(path))  # versions differ in what they quote
    return str(url.render_as_string())


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, value) with names as ``data.img_size``."""
    found = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += flatten(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return found
