"""Images with hundreds of objects: no limit hides any of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import itpn
from itpn.cli import main
from itpn.data.annotations import read_objects
from itpn.models.build import make_pyramid
from itpn.models.detector import Detector
from itpn.tasks.configs import DetectionConfig, DetectionDataConfig, DetectionModelConfig, TrainerConfig
from itpn.tasks.detection.data import find_data
from itpn.tasks.detection.evaluation import DetectionEvaluator
from itpn.tasks.detection.network import resolve_detections
from itpn.tasks.evaluation import evaluate
from itpn.tasks.run import train
from itpn.training.config import read_yaml

SIDE, STEP, BOX = 160, 8, 6  # 20 x 20 places


def write_grid(root: Path, counts: dict[str, int]) -> Path:
    """COCO's layout: an image for each split, with so many boxes in rows, the first a crowd's besides."""
    (root / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (root / f"{split}2017").mkdir()
        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        boxes = [[number % 20 * STEP, number // 20 * STEP, BOX, BOX] for number in range(count)]
        for x, y, width, height in boxes:
            pixels[y : y + height, x : x + width] = 255
        Image.fromarray(pixels).save(root / f"{split}2017" / "grid.png")
        known = [{"id": n, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0} for n, box in enumerate(boxes)]
        crowd = {"id": count, "image_id": 1, "category_id": 1, "bbox": [0, 150, 20, 10], "iscrowd": 1}
        content = {
            "images": [{"id": 1, "file_name": "grid.png", "height": SIDE, "width": SIDE}],
            "annotations": [*known, crowd],
            "categories": [{"id": 1, "name": "square"}],
        }
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


class FindsAll(nn.Module):
    """Stands in for a detector: it finds each white square."""

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        (image,) = images
        rows, cols = np.meshgrid(np.arange(0, SIDE, STEP), np.arange(0, SIDE, STEP), indexing="ij")
        corners = torch.tensor(np.stack([cols, rows], -1).reshape(-1, 2))
        found = corners[image[0, corners[:, 1], corners[:, 0]] > 0.5].float()
        labels = torch.ones(len(found), dtype=torch.int64)
        return [{"boxes": torch.cat([found, found + BOX], 1), "labels": labels, "scores": torch.rand(len(found))}]


@pytest.mark.parametrize(("limit", "expected"), [(300, 1.0), (100, 1 / 3)])
def test_300_objects_that_are_all_found(tmp_path, limit, expected):
    images = read_objects(str(write_grid(tmp_path, {"val": 300})), "val")
    config = DetectionConfig(data=DetectionDataConfig(num_workers=0, mean=(0.5,), std=(0.5,)))
    evaluator = DetectionEvaluator(config, images, False, limit)
    (scores,), _ = evaluate(evaluator, [FindsAll()], torch.device("cpu"), 0, 1)
    metrics = scores.metrics["box"]
    assert metrics["ap"] == pytest.approx(expected, abs=0.01)  # of 101 recalls
    assert metrics[f"ar{limit}"] == pytest.approx(expected)
    assert (metrics["ar1"], metrics["ar10"]) == (pytest.approx(1 / 300), pytest.approx(10 / 300))
    assert len(metrics) == 12
    about = {"images_skipped": 0, **evaluator.about}
    assert f"AR{limit} {100 * expected:.1f}" in evaluator.rows(scores, about)["box recall"]
    evaluator.write(scores, tmp_path, about)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written[f"box_ar{limit}"] == pytest.approx(expected)
    assert written["max_detections"] == limit


def make_detector(**options) -> Detector:
    """One that finds something everywhere."""
    torch.manual_seed(0)
    backbone = make_pyramid(
        "pooled", pyramid_width=32, pyramid_depth=1, img_size=64, patch_size=16, embed_dim=64, depths=(1, 1, 2)
    )
    options = {"num_classes": 2, "min_size": SIDE, "max_size": SIDE, "head_width": 16, **options}
    return Detector(backbone, box_score_thresh=0.0, box_nms_thresh=1.0, **options).eval()


def test_the_first_stage_proposes_enough():
    """Of 100 objects as published, of more twice as many."""
    images = [torch.rand(3, SIDE, SIDE)]
    proposals = {"rpn_post_nms_top_n_test": 120}
    assert [len(make_detector(**proposals)(images)[0]["boxes"])] == [100]
    many = make_detector(box_detections_per_img=250, **proposals)
    assert (many.rpn._pre_nms_top_n["testing"], many.rpn._post_nms_top_n["testing"]) == (1000, 500)
    with torch.no_grad():
        assert len(many(images)[0]["boxes"]) == 250
    many.limit_detections(2000)
    assert (many.rpn._pre_nms_top_n["testing"], many.rpn._post_nms_top_n["testing"]) == (4000, 4000)
    usual = make_detector()
    assert (usual.rpn._pre_nms_top_n["testing"], usual.rpn._post_nms_top_n["testing"]) == (1000, 1000)


def make_config(root: Path, tmp_path: Path, name: str) -> DetectionConfig:
    return DetectionConfig(
        model=DetectionModelConfig(
            name="itpn_nano", scratch=True, head_width=16, rpn_post_nms_top_n_train=40, box_batch_size_per_image=16
        ),
        data=DetectionDataConfig(root=str(root), img_size=64, batch_size=1, num_workers=0),
        trainer=TrainerConfig(max_epochs=1, max_steps=1),
        name=name,
        output_dir=str(tmp_path / "runs"),
    )


def test_the_limit_of_a_run_is_that_of_its_images(tmp_path, capsys):
    """It is stored with the network, and evaluation and prediction change it."""
    root = write_grid(tmp_path / "many", {"train": 130, "val": 20})
    folder = train(make_config(root, tmp_path, "many"), "test")
    said = " ".join(capsys.readouterr().out.split())
    assert "130 objects are found in an image at most, as many as" in said
    assert read_yaml(folder / "config.yaml").values["evaluation"]["max_detections"] == 130
    model = itpn.load(folder / "model.safetensors")
    assert model.roi_heads.detections_per_img == 130
    assert model.rpn._post_nms_top_n["testing"] == 260
    assert itpn.load(folder / "model.safetensors", box_detections_per_img=150).roi_heads.detections_per_img == 150
    assert itpn.get_model("detector_small", folder / "model.safetensors").roi_heads.detections_per_img == 130

    command = ["evaluate", str(folder / "config.yaml"), "--checkpoint", str(folder / "model.safetensors")]
    for given, limit in ((["--evaluation.max-detections", "300"], 300), (["--evaluation.max-detections", "7"], 7)):
        assert main([*command, "--out", str(tmp_path / "scores"), *given]) == 0
        scores = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
        assert (scores["max_detections"], f"box_ar{max(100, limit)}" in scores) == (limit, True)

    photo, weights = str(root / "val2017" / "grid.png"), str(folder / "model.safetensors")
    counts = []
    for number, given in enumerate([[], ["--max-objects", "3"]]):
        out = tmp_path / f"out{number}"
        assert main(["predict", weights, photo, "--out", str(out), "--min-score", "0", *given]) == 0
        (answer,) = json.loads((out / "predictions.json").read_text())
        counts.append(len(answer["objects"]))
    assert counts[0] > counts[1] == 3
    assert main(["predict", weights, photo, "--max-objects", "0"]) == 2


def test_the_limit_of_windows_is_that_of_a_window(tmp_path):
    """A network that sees windows finds no more than they have."""
    config = make_config(write_grid(tmp_path, {"train": 400}), tmp_path, "windows")
    for size, limit in ((None, 400), (100, 13 * 13), (40, 100)):  # the last of a row is cut
        own = replace(config, data=replace(config.data, window_size=size, window_overlap=8))
        assert resolve_detections(own, find_data(own))[0].evaluation.max_detections == limit


def test_a_run_of_few_objects_keeps_the_published_limit(tmp_path, capsys):
    root = write_grid(tmp_path / "few", {"train": 30, "val": 20})
    folder = train(make_config(root, tmp_path, "few"), "test")
    assert "objects are found in an image at most" not in " ".join(capsys.readouterr().out.split())
    model = itpn.load(folder / "model.safetensors")
    assert model.roi_heads.detections_per_img == 100
    assert (model.rpn._pre_nms_top_n["testing"], model.rpn._post_nms_top_n["testing"]) == (1000, 20)
