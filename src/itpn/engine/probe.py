"""How good are frozen features? Nearest neighbours and a linear classifier on them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.loading import build_from, load_weights
from itpn.config import Config
from itpn.seeding import derive_seed
from itpn.tasks.pretrain import PretrainingTask


@dataclass
class Accuracy:
    """Shares of test images named rightly from frozen features."""

    knn: float
    linear: float
    pyramid_knn: float
    pyramid_linear: float


def probe(config: Config, weights: Path | None, sets: list[tuple[Tensor, Tensor]]) -> Accuracy:
    """Ask nearest neighbours and a linear classifier, of the backbone's features and of the pyramid's.

    Args:
        weights: of a run with these settings; None for those that it began with.
        sets: to learn from and to be asked about: uint8 images [n, 3, H, W] and int64 labels [n].
    """
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_from(config)
    if weights is not None:
        load_weights(model, read_checkpoint(weights))
    task = PretrainingTask(model, config, "probe")
    (known, labels), (asked, answers) = [(compute_features(task, x.split(128)), labels) for x, labels in sets]
    figures = [
        f(x, labels, y, answers) for x, y in zip(known, asked, strict=True) for f in (knn_accuracy, linear_accuracy)
    ]
    return Accuracy(*figures)


@torch.no_grad()
def compute_features(task: PretrainingTask, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Means over an image of uint8 batches [B, 3, H, W], in eval mode, on the CPU.

    Returns:
        Of the last backbone stage, float32 [n, C], and of the pyramid's levels side by side, [n, 3 * width].
    """
    training = task.training
    task.eval()
    try:
        backbone, pyramid = [], []
        for images in batches:
            stages = task.model.backbone.forward_stages(task.normalize(images.to(task.device)))
            levels = [level.mean(dim=(1, 2, 3)) for level in task.model.pyramid(stages)]
            backbone.append(stages[-1].mean(dim=(1, 2, 3)).float().cpu())
            pyramid.append(torch.cat(levels, dim=1).float().cpu())
        return torch.cat(backbone), torch.cat(pyramid)
    finally:
        task.train(training)


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy of weighted nearest neighbours (Wu et al. 2018, section 3.4).

    Args:
        train, test: features [n, C].
        train_labels, test_labels: int64 [n].
    """
    mean = train.mean(dim=0)  # without it all cosines are near 1: features of a network share a large mean
    keys, queries = (F.normalize(x - mean, dim=1) for x in (train, test))
    classes = int(train_labels.max()) + 1
    correct = 0
    for x, labels in zip(queries.split(1024), test_labels.split(1024), strict=True):
        similarity, nearest = (x @ keys.T).topk(min(k, len(keys)), dim=1)  # [b, k]
        votes = F.one_hot(train_labels[nearest], classes) * (similarity / temperature).exp().unsqueeze(-1)
        correct += int((votes.sum(dim=1).argmax(dim=1) == labels).sum())
    return correct / len(test)


def linear_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, weight_decay: float = 1e-3
) -> float:
    """Top-1 accuracy of multinomial logistic regression on standardised features, by L-BFGS."""
    deviation, mean = torch.std_mean(train, dim=0)
    train, test = ((x - mean) / (deviation + 1e-6) for x in (train, test))
    classifier = nn.Linear(train.shape[1], int(train_labels.max()) + 1)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(train), train_labels)
        loss = loss + weight_decay * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float((classifier(test).argmax(dim=1) == test_labels).float().mean())
