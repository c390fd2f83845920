"""`itpn evaluate`: a checkpoint and labelled images, in metrics."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from itpn.checkpoints.paths import HUB, check_file
from itpn.commands.options import Flag, RecipeCommand, shown
from itpn.errors import UserError
from itpn.system.console import Output, make_table, print_note
from itpn.system.text import either
from itpn.system.writing import make_folder, writing_to
from itpn.tasks.spec import TaskSpec, all_tasks, task_of
from itpn.training.config import RunConfig, freeze

# settings that evaluation goes by, beside what a task adds
SETTINGS = (
    *("--evaluation.", "--data.num-workers", "--data.max-pixels", "--seed"),
    *("--trainer.precision", "--trainer.accelerator", "--trainer.devices", "--trainer.num-nodes", "--model.num-heads"),
)
# what to say of options that another is meant by
HINTS = {"--model.checkpoint": "give the checkpoint as --checkpoint, not as --model.checkpoint"}


@dataclass(frozen=True, kw_only=True)
class Evaluate(RecipeCommand):
    """Evaluate a classifier, detector or segmenter on labelled images.

    The recipe says where the images are (--data.root); sizes and normalisation are the checkpoint's.
    Settings of the network and of training are refused.
    """

    checkpoint: Annotated[str, shown("CKPT")]
    """A checkpoint that `itpn inspect` knows."""
    out: Annotated[Path | None, shown("DIR", "(default: `evaluation` beside the checkpoint)")] = None
    """Folder for metrics and plots."""
    knn: Flag = False
    """Classify by k-NN among the features of the training images, without a classifier."""

    def run(self) -> None:
        task = task_of(self.config)
        if task.resolve_evaluation is None:
            names = [other.name for other in all_tasks() if other.resolve_evaluation is not None]
            raise UserError(f"{self.recipe} is a recipe of {task.name}: give one of {either(names)}")
        if self.knn and not task.knn:
            names = [other.name for other in all_tasks() if other.knn]
            raise UserError(f"--knn is for recipes of {either(names)}, not of {task.name}")
        self._check_given((*SETTINGS, *task.evaluation_options), {**HINTS, **task.evaluation_hints})
        check_file(self.checkpoint)
        config = replace(self.config, model=self.config.model.of_checkpoint(self.checkpoint))
        config.check()
        self._evaluate(task, config, self.given_data)

    def _check_given(self, known: tuple[str, ...], hints: Mapping[str, str]) -> None:
        for option in self.given:
            if option in hints:
                raise UserError(hints[option])
            if not option.startswith(known):
                raise UserError(f"{option} has no meaning here: the network is the checkpoint's, and it is not trained")

    def _check_head(self, task: TaskSpec, heads: Collection[str]) -> None:
        if self.knn or task.name in heads:
            return
        recipe = task.head().recipe
        ways = ["give --knn to evaluate its features, or "] * task.knn
        ways += ["fine-tune it first", f" (itpn train {recipe})" if recipe else ""]
        raise UserError(f"checkpoint {self.checkpoint} has no {task.name} head: {''.join(ways)}")

    def _evaluate(self, task: TaskSpec, config: RunConfig, given: Collection[str]) -> None:
        """Evaluate on the images that the settings name; settings of data in ``given`` are not the checkpoint's."""
        from itpn.checkpoints.files import read_checkpoint
        from itpn.checkpoints.load import check_finite, load_found
        from itpn.tasks.evaluation import EvaluationRequest, evaluate
        from itpn.tasks.evaluation_bar import EvaluationBar
        from itpn.training.launch import launched, make_fabric, quieten_libraries, read_launch

        assert task.resolve_evaluation is not None
        assert task.find_evaluation_data is not None
        checkpoint = read_checkpoint(self.checkpoint)
        check_finite(checkpoint)
        self._check_head(task, checkpoint.contents.heads)
        request = EvaluationRequest(checkpoint, given, self.knn)
        config, arguments = task.resolve_evaluation(config, request)
        config = freeze(config)
        model, notes = load_found(checkpoint, "backbone" if self.knn else task.name, **arguments)
        evaluator, which = task.find_evaluation_data(config, model, request)
        out = self.out or find_folder(self.checkpoint, self.knn)
        quieten_libraries()
        fabric = make_fabric(config.trainer, read_launch())
        make_folder(out)
        with launched(fabric):
            model.to(fabric.device).eval()
            with fabric.autocast():
                rank, world_size = fabric.global_rank, fabric.world_size
                with EvaluationBar(math.ceil(len(evaluator) / world_size), hidden=rank > 0) as bar:
                    (scores,), skipped = evaluate(evaluator, [model], fabric.device, rank, world_size, bar)
            if not fabric.is_global_zero:
                return
            for note in [*evaluator.notes, *notes, *(f"skipped {name}: {reason}" for name, reason in skipped)]:
                print_note(note)
            evaluator.warn(scores)
            about = {"checkpoint": self.checkpoint, "recipe": self.recipe, "data": which}
            about |= {"images_skipped": len(skipped) + evaluator.left_out, **evaluator.about}
            with writing_to(out):
                evaluator.write(scores, out, about)
            rows = {**evaluator.rows(scores, about), "files": f"{out}/{', '.join(evaluator.files)}"}
            title = f"{self.checkpoint} by {about['by']}" if "by" in about else self.checkpoint
            Output().print(make_table(title, rows))


def find_folder(checkpoint: str, knn: bool) -> Path:
    """Beside the checkpoint, so that evaluations of two do not overwrite each other."""
    path = Path(checkpoint)
    words = ["evaluation", *(["knn"] if knn else [])]
    if checkpoint.startswith(HUB):
        return Path("-".join([checkpoint.removeprefix(HUB).replace("/", "-"), *words]))
    if path.is_dir():
        return path / "-".join(words)
    return path.parent / "-".join([*([] if path.name == "model.safetensors" else [path.stem]), *words])
