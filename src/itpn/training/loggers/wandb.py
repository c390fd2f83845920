"""A run at Weights & Biases, or in a folder that `wandb sync` sends there."""

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from itpn.errors import UserError
from itpn.system.console import print_note
from itpn.system.text import one_line
from itpn.training.config import RunConfig, to_dict
from itpn.training.loggers.logger import Ending, Logger, describe, import_library, keep_run_id, read_run_id
from itpn.training.run_folder import RunFolder

# What would be sent or printed unasked. As variables, not as settings: the user's own have precedence, and a version
# that does not know one passes over it.
DEFAULTS = {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",  # a copy of the terminal
    "WANDB_ERROR_REPORTING": "false",  # its own crashes and durations
    "WANDB_DISABLE_GIT": "true",  # uncommitted changes
    "WANDB_DISABLE_CODE": "true",
    "WANDB_HOST": "",  # the machine's name
    "WANDB_X_DISABLE_META": "true",  # the user's name, the command line
    "WANDB_X_DISABLE_STATS": "true",  # load of the machine
    "WANDB_X_DISABLE_MACHINE_INFO": "true",
    "WANDB_X_SAVE_REQUIREMENTS": "false",
    "WANDB_FINISH_TIMEOUT": "1800",  # or it would try for hours to reach a server that is gone
}


class WandbRun(Logger):
    """A run of wandb, which sends in a process of its own and outlasts a network that fails for a while.

    Whatever else goes wrong there costs a line, and the training continues without it.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, resumed: bool, console: Console) -> None:
        self._folder = folder
        self._config = config
        self._resumed = resumed
        self._console = console
        self._wandb: Any = None
        self._run: Any = None

    def start(self) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        wandb = self._wandb = import_library("wandb")
        try:
            with self._folder.writing(self._folder.path / "wandb"):
                reason = self._begin_somewhere()
        except (wandb.errors.Error, ValueError) as error:
            raise UserError(f"--trainer.logger wandb: {one_line(str(error))}") from error
        keep_run_id(self._folder, "wandb", self._run.id)
        where = self._run.url or f"offline{reason}; `wandb sync {self._stored}` sends it"
        if not self._run.disabled:
            print_note(f"wandb: {where}", self._console)

    def _begin_somewhere(self) -> str:
        """Begin, offline where there is no connection; returns why offline."""
        errors = self._wandb.errors
        mode, reason = choose_mode(self._wandb)
        try:
            self._run = self._begin(mode)
        except errors.AuthenticationError:
            raise
        except errors.CommError as error:
            reason = f", as there is no connection ({str(error).partition(chr(10))[0]})"
            self._run = self._begin("offline")
        return reason

    def _begin(self, mode: str) -> Any:
        folder, variables = self._folder, os.environ
        earlier = read_run_id(folder, "wandb") if self._resumed else None
        return self._wandb.init(
            project=variables.get("WANDB_PROJECT", "itpn"),
            name=variables.get("WANDB_NAME", f"{folder.recipe}/{self._config.name}"),
            id=variables.get("WANDB_RUN_ID", earlier),
            resume=variables.get("WANDB_RESUME", "allow" if earlier else None),
            dir=variables.get("WANDB_DIR", str(folder.path)),
            config={"recipe": folder.recipe, "task": self._config.task, **to_dict(self._config)},
            mode=mode,
            reinit="create_new",  # another run of the user's in this process is not ours
        )

    @property
    def _stored(self) -> Path:
        return Path(self._run.dir).parent

    def log_metrics(self, metrics: Mapping[str, float | None], step: int) -> None:
        known = {name: value for name, value in metrics.items() if value is not None}
        self._tell(lambda run: run.log(known, step=step))

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        self._tell(lambda run: run.log({name: self._wandb.Image(image)}, step=step))

    def log_files(self, files: Sequence[Path]) -> None:
        # config.yaml is the name of wandb's own file of the settings
        patterns = [glob.escape(str(path.absolute())) for path in files if path != self._folder.settings]

        def save(run: Any) -> None:
            for pattern in patterns:
                run.save(pattern, base_path=self._folder.path.absolute(), policy="now")

        self._tell(save)

    def close(self, ending: Ending) -> None:
        if ending == "stopped":
            self._tell(lambda run: run.mark_preempting())
        self._tell(lambda run: run.finish(exit_code=0 if ending == "finished" else 1))
        self._run = None

    def _tell(self, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # a service of others must not end the training
            stopped = f"wandb: stopped logging to {self._stored} ({describe(error)})"
            print_note(f"{stopped}; the training continues, {self._folder.metrics} has all metrics", self._console)
            self._run = None
            with suppress(Exception):  # or its service would fail once more, with a traceback, when the command ends
                self._wandb.teardown()


def choose_mode(wandb: Any) -> tuple[str, str]:
    """The mode that variables or wandb's settings say, but offline, and why, where nobody is logged in: no questions.

    Raises:
        UserError: a variable asks for another mode, but nobody is logged in.
    """
    mode = str(wandb.setup().settings.mode)
    if mode not in ("online", "run", "shared") or wandb.login(prompt=False, verify=False):
        return mode, ""
    if "WANDB_MODE" in os.environ:
        raise UserError(f"WANDB_MODE is {mode}, but nobody is logged in: run `wandb login`, or set WANDB_API_KEY")
    return "offline", ", as nobody is logged in (`wandb login`)"
