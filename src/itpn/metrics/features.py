"""How good are frozen features? k-NN and a linear classifier on them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_DECAYS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4)  # that a linear probe chooses from


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy of :func:`knn_votes`."""
    votes = knn_votes(train, train_labels, test, int(train_labels.max()) + 1, k, temperature)
    return float((votes.argmax(dim=1) == test_labels).double().mean())


def knn_votes(
    train: Tensor, train_labels: Tensor, test: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Weighted k-NN by cosine (Wu et al. 2018, section 3.4), exactly.

    Args:
        train, test: features [n, C], on whichever device is to do it.
        train_labels: int64 [n], there as well.

    Returns:
        Fractions of the votes, [n of test, classes], there as well.
    """
    mean = train.mean(dim=0)  # without it all cosines are near 1: features of a network have a large mean in common
    keys, queries = (F.normalize(x - mean, dim=1) for x in (train, test))
    fractions = []
    for x in queries.split(256):  # against a million keys, a gigabyte
        similarity, nearest = (x @ keys.T).topk(min(k, len(keys)), dim=1)  # [b, k]
        weights = (similarity / temperature).exp()
        votes = weights.new_zeros(len(x), classes).scatter_add_(1, train_labels[nearest], weights)
        fractions.append(votes / votes.sum(dim=1, keepdim=True))
    return torch.cat(fractions)


def linear_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, weight_decay: float = 1e-3
) -> float:
    """Top-1 accuracy of :func:`fit_linear`."""
    classifier = fit_linear(train, train_labels, int(train_labels.max()) + 1, weight_decay)
    with torch.no_grad():
        return float((classifier(test).argmax(dim=1) == test_labels).float().mean())


def choose_weight_decay(features: Tensor, labels: Tensor, classes: int) -> float:
    """Of some, the weight decay whose classifier has the best top-1 accuracy on a held-out fifth of the images."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    held_out, rest = order.split([max(1, len(order) // 5), len(order) - max(1, len(order) // 5)])

    def accuracy(weight_decay: float) -> float:
        classifier = fit_linear(features[rest], labels[rest], classes, weight_decay)
        with torch.no_grad():
            return float((classifier(features[held_out]).argmax(dim=1) == labels[held_out]).double().mean())

    return max(WEIGHT_DECAYS, key=accuracy)


def fit_linear(train: Tensor, train_labels: Tensor, classes: int, weight_decay: float = 1e-3) -> nn.Linear:
    """Multinomial logistic regression on standardised features, by L-BFGS.

    Args:
        weight_decay: on the weights for standardised features.

    Returns:
        A layer that takes features as they are: standardising is in its weights.
    """
    std, mean = torch.std_mean(train, dim=0)
    scale = 1 / (std + 1e-6)
    x = (train - mean) * scale
    classifier = nn.Linear(train.shape[1], classes, device=train.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(x), train_labels)
        loss = loss + weight_decay * classifier.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        classifier.weight *= scale
        classifier.bias.sub_(classifier.weight @ mean)
    return classifier
