"""Probes on features of which the answer is known."""

import pytest
import torch

from itpn.metrics.features import knn_accuracy, linear_accuracy


def clusters(count: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around three centres far from the origin, as a network's features are."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return 10 + torch.eye(3)[labels] + noise * torch.randn(count, 3, generator=generator), labels


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy])
def test_clusters(probe):
    assert probe(*clusters(300, 0.05, 0), *clusters(2000, 0.05, 1)) == 1.0
    x, labels = clusters(300, 0.05, 0)
    shuffled = labels[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    assert probe(x, shuffled, *clusters(2000, 0.05, 1)) < 0.6  # nothing to learn


def test_knn_by_hand():
    """The nearer of two weighs more than one alone further away: exp(similarity / temperature)."""
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, -0.8], [-0.6, 0.0]])  # of mean zero
    labels = torch.tensor([0, 1, 1, 1])
    test = torch.tensor([[1.0, 0.1]])
    assert knn_accuracy(train, labels, test, torch.tensor([0]), k=2) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([1]), k=2, temperature=1e9) == 0.0  # a tie goes to the first


def test_a_linear_classifier_sees_what_distances_do_not():
    """A class in one of many directions, drowned by the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 50, generator=generator)
    labels = (x[:, 0] > 0).long()
    x[:, 1:] *= 10
    halves = (x[:1000], labels[:1000], x[1000:], labels[1000:])
    assert linear_accuracy(*halves) > 0.95
    assert knn_accuracy(*halves) < 0.7
