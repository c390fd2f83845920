"""What `itpn evaluate` shows: words of the field, each line within 80 columns."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from itpn.metrics.classification import rank_classes
from itpn.metrics.detection import METRICS, DetectionScores
from itpn.metrics.segmentation import PixelScores
from itpn.system.console import Output, make_table
from itpn.tasks.detection.evaluation import DetectionEvaluator
from itpn.tasks.segmentation.evaluation import SegmentationEvaluator


def show(rows: dict[str, str]) -> list[str]:
    page = io.StringIO()
    Output(file=page, width=80).print(make_table("evaluated", rows))
    lines = page.getvalue().splitlines()[2:-1]
    assert len(lines) == len(rows)  # nothing is wrapped
    return [" ".join(line.strip("│").split()) for line in lines]


def test_hardest_and_easiest():
    """None is both, and where all are alike nothing is listed."""
    names = [f"class {i}" for i in range(9)]
    assert rank_classes(dict.fromkeys(names, 0.0)) == {}
    assert rank_classes(dict.fromkeys(names, 1.0)) == {}
    assert rank_classes({name: i / 1000 for i, name in enumerate(names[:5] * 2)}) == {  # of few, all
        "classes": "class 4 1%, class 3 1%, class 2 1%, class 1 1%, class 0 0%"
    }
    one = dict.fromkeys(names, 0.0) | {"class 5": 0.25}
    assert rank_classes(one) == {"hardest": "class 0 0%, class 1 0%, class 2 0%", "easiest": "class 5 25%"}
    ranked = rank_classes({name: i / 10 for i, name in enumerate(names)})
    assert ranked["hardest"] == "class 0 0%, class 1 10%, class 2 20%"
    assert ranked["easiest"] == "class 8 80%, class 7 70%, class 6 60%"


@pytest.mark.parametrize("kinds", [("box",), ("box", "mask")])
def test_a_detector(kinds):
    values = dict(zip(METRICS, [0.321, 0.5, float("nan"), *[0.1] * 9], strict=True))
    scores = DetectionScores(dict.fromkeys(kinds, values), {kind: [0.0] * 10 for kind in kinds}, 25, 80)
    evaluator: Any = SimpleNamespace(classes=[f"class {i}" for i in range(10)])
    lines = show(DetectionEvaluator.rows(evaluator, scores, {"images_skipped": 0}))
    assert lines[1:5] == [
        "box AP │ 32.1, AP50 50.0, AP75 -",
        "box AP by size │ small 10.0, medium 10.0, large 10.0",
        "box recall │ AR1 10.0, AR10 10.0, AR100 10.0",
        "box recall by size │ small 10.0, medium 10.0, large 10.0",
    ]
    assert len(lines) == 1 + 4 * len(kinds)


def test_a_segmenter():
    scores = PixelScores(torch.tensor([[6, 2], [2, 0]]), 25)
    evaluator: Any = SimpleNamespace(classes=["a", "b"], names=("miou", "mean_accuracy", "pixel_accuracy"))
    lines = show(SegmentationEvaluator.rows(evaluator, scores, {"images_skipped": 0, "data": "scenes"}))
    assert lines[1:4] == ["mIoU │ 30.0 %", "pixel accuracy │ 60.0 %", "mean class accuracy │ 37.5 %"]
