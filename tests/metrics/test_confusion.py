"""The plot of a confusion matrix."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from itpn.metrics.classification import draw_confusion

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LONG = "a class whose name has forty characters."


@pytest.mark.parametrize(
    "classes", [("a", LONG), ("W" * 40, LONG), CIFAR10, (*CIFAR10[:-1], LONG), tuple(f"class {i}" for i in range(40))]
)
def test_nothing_is_cut_off(tmp_path, monkeypatch, classes):
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    count = len(classes)
    draw_confusion(torch.eye(count).long() + 2, classes, tmp_path / "confusion.png")
    pixels = np.asarray(Image.open(tmp_path / "confusion.png").convert("L"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):  # text that is cut off touches the edge
        assert edge.min() == 255
    axes = drawn[0].axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    texts = [axes.yaxis.label, axes.xaxis.label, *axes.get_yticklabels(), *axes.get_xticklabels()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert max(box.x1 for box in boxes) - min(box.x0 for box in boxes) < pixels.shape[1]
    assert max(box.y1 for box in boxes) - min(box.y0 for box in boxes) < pixels.shape[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(classes)
