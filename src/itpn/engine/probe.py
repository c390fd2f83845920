"""How good are frozen features? Nearest neighbours and a linear classifier on them."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.checkpoints.weights import load_weights, read_weights
from itpn.config import Config, image_size
from itpn.pretraining.build import build_masked_model
from itpn.seeding import derive_seed
from itpn.tasks.pretrain import PretrainingTask


def probe(config: Config, weights: Path | None, sets: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Accuracy on the second of two labelled sets, of nearest neighbours and of a linear classifier.

    Args:
        weights: of a run with these settings; None for those that it began with.
        sets: to learn from and to be asked about: uint8 images [n, 3, H, W] and int64 labels [n].
    """
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_masked_model(config.model, image_size(config.data), config.teacher)
    if weights is not None:
        load_weights(model, read_weights(weights), str(weights))
    task = PretrainingTask(model, config, "probe")
    (x, y), (x_test, y_test) = [(compute_features(task, images.split(128)), labels) for images, labels in sets]
    return knn_accuracy(x, y, x_test, y_test), linear_accuracy(x, y, x_test, y_test)


@torch.no_grad()
def compute_features(task: PretrainingTask, batches: Iterable[Tensor]) -> Tensor:
    """Mean over the units of the last backbone stage, for uint8 batches [B, 3, H, W]: float32 [n, C] on the CPU."""
    training = task.training
    task.eval()
    try:
        features = []
        for images in batches:
            (maps,) = task.model.extract_feat(task.normalize(images.to(task.device)))
            features.append(maps.mean(dim=(2, 3)).float().cpu())
        return torch.cat(features)
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
    """Top-1 accuracy of multinomial logistic regression on standardised features, fitted to the end by L-BFGS."""
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
