"""Checkpoints of a run: what one holds, how it is restored, and which is the best.

The keys are those that Lightning's Trainer wrote, so that runs that were begun by it are resumed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed

from itpn.checkpoints.io import save_to
from itpn.distributed import broadcast
from itpn.errors import MachineError, UserError
from itpn.system.text import one_line
from itpn.training.metrics_log import MetricsLog
from itpn.training.run_state import CORRUPT
from itpn.training.state import Training
from itpn.training.visualization import Visualizations

WHOLE = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True)


class Checkpointing:
    """Writes checkpoints, after a whole optimizer step alone, so that a resumed run equals an uninterrupted one.

    Attributes:
        best_score: of ``best.ckpt``, which is of ``best_step``.
        restored: what the checkpoint that the run resumes from says of scores and of training.
    """

    def __init__(self, log: MetricsLog) -> None:
        self.log = log
        self.run = log.run
        self.best_score = float("-inf")
        self.best_step = -1
        self.restored: dict[str, Any] = {}

    def score(self) -> float:
        """How good the network is at this step: the evaluation's score at its steps, or else the loss with its sign."""
        evaluation = self.run.evaluation
        if evaluation is not None and evaluation.score is not None:
            return evaluation.score if evaluation.step == self.run.step else float("-inf")
        loss = self.log.metrics.get("loss")
        return float("-inf") if loss is None else -loss

    @property
    def due(self) -> bool:
        """Whether this step has one, and be it because an evaluation has just found the best network so far."""
        run, evaluation = self.run, self.run.evaluation
        if run.at_end or run.step % run.config.trainer.checkpoint_every_n_steps == 0:
            return True
        evaluated = evaluation is not None and evaluation.step == run.step and evaluation.score is not None
        return evaluated and self.score() > self.best_score

    def save(self, batch: dict[str, Any]) -> None:
        """Write a checkpoint, all processes together.

        Raises:
            MachineError: it cannot be written; on every process.
        """
        run, folder, score, problem = self.run, self.run.folder, self.score(), None
        self.log.check_finite(batch, weights=True)
        if score > self.best_score:
            self.best_score, self.best_step = score, run.step
        state = {**collect_state(run), "callbacks": self.describe(score)}
        if run.main:
            try:
                self.log.flush()
                with folder.writing(folder.last):
                    folder.put_checkpoint(lambda file: save_to(file, state), run.step, self.best_step == run.step)
            except MachineError as error:
                problem = str(error)
        problem = broadcast(problem)  # nobody takes another step before it is written
        if problem is not None:
            raise MachineError(problem)

    def describe(self, score: float) -> dict[str, Any]:
        """What a checkpoint says of the run beside what is trained, under the names of Lightning's callbacks."""
        scores = {"score": score, "best_score": self.best_score, "best_step": self.best_step}
        evaluation = self.run.evaluation
        return {
            "Monitor": {"images_seen": self.log.images_seen, "skipped": self.log.corrupt.skipped.state_dict()},
            "Checkpointing": {**scores, "training": self.log.state_dict()},
            **({} if evaluation is None else {"Evaluation": evaluation.state_dict()}),
        }

    def restore(self, path: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            UserError: its bytes are those that were written, but not by a run of this kind and version; or another
                number of processes or other data would make it another run.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, MemoryError, RuntimeError) as error:  # it was whole a moment ago
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise MachineError(f"checkpoint {path} cannot be read: {reason}; nothing was changed") from error
        try:
            restore_state(self.run, state)
            self._restore(state["callbacks"])
        except (*CORRUPT, RuntimeError) as error:
            if not isinstance(error, CORRUPT) and "in loading state_dict" not in str(error):
                raise
            raise UserError(
                f"checkpoint {path} is corrupt: no run can be restored from it "
                f"({one_line(f'{type(error).__name__}: {error}'.partition(chr(10))[0])}); nothing was changed: choose "
                "another --name, or move it away to resume from the one before"
            ) from error

    def _restore(self, records: dict[str, Any]) -> None:
        if "Monitor" in records:
            self.log.images_seen = int(records["Monitor"]["images_seen"])
            self.log.corrupt.skipped.load_state_dict(records["Monitor"]["skipped"])
        if "Checkpointing" in records:
            self.restored = records["Checkpointing"]
            self.best_score = float(self.restored["best_score"])
            self.best_step = int(self.restored.get("best_step", -1))
        evaluation, found = self.run.evaluation, find_evaluation(records)
        if evaluation is not None and found is not None:
            evaluation.load_state_dict(found)

    def restore_best(self) -> None:
        """Let ``best.ckpt`` be of the best step, all processes together; a kill can come after a checkpoint and before
        its second name."""
        if not self.restored:
            return
        folder = self.run.folder
        if self.run.main:
            with folder.writing(folder.best):
                best = folder.find_best(self.best_step)
                if best is None:
                    self._restore_best()
                elif best != folder.best:
                    folder.put_best(best)
        self.best_score, self.best_step = broadcast((self.best_score, self.best_step))

    def _restore_best(self) -> None:
        folder = self.run.folder
        scores = folder.read_scores(folder.best)
        if scores is None and folder.resumed is not None:  # there is none, and nothing to make it from
            scores = {"best_score": self.restored.get("score", self.best_score), "best_step": self.run.step}
            folder.put_best(folder.resumed)
        # else it is of a step that is to be taken again, as the last checkpoint was corrupt
        self.best_score = (scores or {}).get("best_score", self.best_score)
        self.best_step = (scores or {}).get("best_step", self.best_step)

    def complete(self, visualizations: Visualizations) -> bool:
        """Make up for what a run whose steps are all taken lacks: it was killed before it wrote its last files.

        Returns:
            Whether weights or summary are missing; they are left to be written.
        """
        run, folder, evaluation = self.run, self.run.folder, self.run.evaluation
        self.log.load_state_dict(self.restored.get("training", {}))
        self.restore_best()
        missing = broadcast(not folder.is_finished(run.step))
        if missing and evaluation is not None and evaluation.step != run.step:
            evaluation.update(run.fabric, run.module, run.step)
            self.log.add_evaluation(evaluation.metrics)
            if run.main and self.score() > self.best_score:
                with folder.writing(folder.best):
                    folder.put_best(folder.last)
        if visualizations.due:
            visualizations.latest = visualizations.path
            if not visualizations.latest.exists():
                visualizations.write()
        return missing


def collect_state(run: Training) -> dict[str, Any]:
    """What is trained, and how far it has come; all processes together, where they hold parts of the network."""
    module = run.module
    scaler = run.fabric.strategy.precision.state_dict()
    if run.sharded:
        weights = distributed.get_model_state_dict(module, options=WHOLE)
        moments = distributed.get_optimizer_state_dict(module, run.optimizer, options=WHOLE)
    else:
        weights, moments = module.state_dict(), run.optimizer.state_dict()
    return {
        "epoch": run.epoch,
        "global_step": run.step,
        "loops": {"passes": run.passes},
        "state_dict": weights,
        "optimizer_states": [moments],
        "lr_schedulers": [run.schedule.state_dict()],
        "itpn": {"recipe": module.recipe, **module.describe()},
        "itpn_processes": run.processes,
        "itpn_loader": run.loader.state_dict(),
        **({"MixedPrecision": scaler} if scaler else {}),
    }


def restore_state(run: Training, state: dict[str, Any]) -> None:
    """Undo :func:`collect_state`.

    Raises:
        UserError: another number of processes, or other data, would make it another run.
    """
    module, before = run.module, state["itpn_processes"]
    if before != run.processes:
        raise UserError(
            f"this run was trained by {before} processes, not {run.processes}: start as many, or choose another --name "
            "and begin from its weights with --model.checkpoint"
        )
    module.check_same_data(state["itpn"])
    run.step, run.epoch, run.passes = state["global_step"], state["epoch"], count_passes(state["loops"])
    run.loader.load_state_dict({name: int(state["itpn_loader"][name]) for name in ("epoch", "batch")})
    if run.sharded:
        distributed.set_model_state_dict(module, state["state_dict"], options=WHOLE)
        named = name_parameters(module, state["optimizer_states"][0])
        distributed.set_optimizer_state_dict(module, run.optimizer, named, options=WHOLE)
    else:
        module.load_state_dict(state["state_dict"])
        run.optimizer.load_state_dict(state["optimizer_states"][0])
    run.schedule.load_state_dict(state["lr_schedulers"][0])
    if "MixedPrecision" in state:  # with fp16, the scale of the loss
        run.fabric.strategy.precision.load_state_dict(state["MixedPrecision"])


def count_passes(loops: Mapping[str, Any]) -> int:
    """Forward and backward passes so far; Lightning's Trainer counted them among much else."""
    if "passes" in loops:
        return int(loops["passes"])
    return int(loops["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"])


def find_evaluation(records: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the last evaluation found; earlier versions kept it under the name of the task's class, as "figures"."""
    for record in records.values():
        if "figures" in record:
            return {"score": None, "step": -1, **record, "metrics": record["figures"]}
    return records.get("Evaluation")


def name_parameters(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer by names of parameters; Lightning's Trainer numbered those of a sharded module."""
    names: dict[Any, str] = dict(enumerate(name for name, _ in module.named_parameters()))
    groups = [{**group, "params": [names.get(n, n) for n in group["params"]]} for group in state["param_groups"]]
    return {"state": {names.get(n, n): own for n, own in state["state"].items()}, "param_groups": groups}
