"""Evaluation while a network is trained."""

import lightning as L

from itpn.tasks.evaluation import Evaluator, evaluate
from itpn.training.evaluation import Evaluation
from itpn.training.module import TrainingModule


class Validation(Evaluation):
    """Evaluates a network, and the EMA of its weights where there is one.

    Args:
        prefix: of the metrics' names.
    """

    def __init__(self, module: TrainingModule, evaluator: Evaluator, every_n_epochs: int, prefix: str = "val_") -> None:
        self.module = module
        self.evaluator = evaluator
        self.prefix = prefix
        networks = module.networks()
        super().__init__([f"{n}{prefix}{name}" for n in networks for name in evaluator.names], every_n_epochs)

    def evaluate(self, fabric: L.Fabric) -> dict[str, float]:
        networks = self.module.networks()
        with fabric.autocast():
            scores, skipped = evaluate(
                self.evaluator, list(networks.values()), fabric.device, fabric.global_rank, fabric.world_size
            )
        self.name_skipped(fabric, skipped)
        metrics = {
            f"{name}{self.prefix}{metric}": value
            for name, own in zip(networks, scores, strict=True)
            for metric, value in self.evaluator.metrics(own).items()
        }
        if self.evaluator.best is not None:
            self.score = max(
                value for name, value in metrics.items() if name.endswith(self.prefix + self.evaluator.best)
            )
        return metrics

    def describe(self) -> dict[str, str]:
        return self.evaluator.summarize({name.replace(self.prefix, ""): value for name, value in self.metrics.items()})
