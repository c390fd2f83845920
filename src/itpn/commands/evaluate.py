"""`itpn evaluate`: a checkpoint and labelled images, in metrics."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.load import check_finite, load_found
from itpn.system.console import Output, make_table, print_aside
from itpn.system.writing import make_folder, writing_to
from itpn.tasks.evaluation import evaluate as evaluate_networks
from itpn.tasks.spec import TaskSpec
from itpn.training.config import RunConfig, freeze
from itpn.training.launch import quieten_libraries, start_fabric


def evaluate(
    task: TaskSpec,
    config: RunConfig,
    recipe: str,
    checkpoint: str,
    out: Path,
    given: Collection[str] = (),
    knn: bool = False,
) -> Any:
    """Evaluate a checkpoint on the images that the settings name, and write the metrics.

    Args:
        out: folder of the files that the task's evaluator writes.
        given: settings of the data that were given, and are not taken from the checkpoint.
        knn: evaluate the backbone's features by k-NN among the training images.

    Returns:
        The scores, of the task's own kind.

    Raises:
        UserError: no such checkpoint, one without the task's head, images of other classes than it knows.
    """
    assert task.resolve_evaluation is not None
    assert task.find_evaluation_data is not None
    found = read_checkpoint(checkpoint)
    check_finite(found)
    config, arguments = task.resolve_evaluation(config, found, given, knn)
    config = freeze(config)
    if config.model.num_heads is not None:
        arguments["num_heads"] = config.model.num_heads
    model, notes = load_found(found, "backbone" if knn else task.name, **arguments)
    evaluator, which = task.find_evaluation_data(config, found, model, given, knn)
    make_folder(out)
    quieten_libraries()
    with start_fabric(config.trainer) as fabric:
        model.to(fabric.device).eval()
        with fabric.autocast():
            (scores,), skipped = evaluate_networks(
                evaluator, [model], fabric.device, fabric.global_rank, fabric.world_size
            )
        if fabric.is_global_zero:
            for note in [*evaluator.notes, *notes]:
                print_aside(note)
            for name, reason in skipped:
                print_aside(f"skipped {name}: {reason}")
            evaluator.warn(scores)
            about = {"checkpoint": checkpoint, "recipe": recipe, "data": which}
            about |= {"images_skipped": len(skipped) + evaluator.left_out, **evaluator.about}
            with writing_to(out):
                evaluator.write(scores, out, about)
            rows = {**evaluator.rows(scores, about), "files": f"{out}/{', '.join(evaluator.files)}"}
            title = f"{checkpoint} by {about['by']}" if "by" in about else checkpoint
            Output().print(make_table(title, rows))
    return scores
