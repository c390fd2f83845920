"""Windows of large images: where they are, what they have of pixels, objects and label maps."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image

from itpn.cli import main
from itpn.data.annotations import read_objects
from itpn.data.decode import UnreadableImage
from itpn.data.labelmaps import find_label_maps
from itpn.data.mask_checks import MaskRules
from itpn.data.object_windows import cut_objects, decode_counts, draw_local
from itpn.data.objects import draw_masks, encode_mask, make_target
from itpn.data.readers import FileReader
from itpn.data.samples import open_sample
from itpn.data.segmentation_transform import SegmentationTransform
from itpn.data.stored import PLAIN
from itpn.data.windows import cut_windows
from itpn.tasks.configs import (
    DetectionConfig,
    DetectionDataConfig,
    DetectionModelConfig,
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationModelConfig,
    TrainerConfig,
)
from itpn.tasks.detection.data import find_data
from itpn.tasks.run import train
from itpn.tasks.segmentation.data import find_data as find_scenes

HEIGHT, WIDTH = 90, 130
SIZE, OVERLAP = 48, 6
CORNERS = [(top, left) for top in (0, 42) for left in (0, 41, 82)]


def draw_disk(y: float, x: float, radius: float) -> np.ndarray:
    rows, cols = np.mgrid[:HEIGHT, :WIDTH]
    return (rows - y) ** 2 + (cols - x) ** 2 < radius**2


def count_runs(mask: np.ndarray) -> list[int]:
    """Uncompressed run lengths, in the order of columns, background first."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(int)))
    return np.diff([0, *changes, flat.size]).tolist()


def to_rle(mask: np.ndarray, compressed: bool) -> dict:
    if not compressed:
        return {"size": [HEIGHT, WIDTH], "counts": count_runs(mask)}
    encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = encoded["counts"]
    return {"size": [HEIGHT, WIDTH], "counts": counts.decode() if isinstance(counts, bytes) else counts}


def make_objects() -> list[dict]:
    """Objects with masks in each form, a crowd, and boxes alone, all over the image."""
    disks = [(20.5, 30, 12), (45, 45, 20), (85, 125, 9), (60, 88, 7)]
    objects = []
    for number, disk in enumerate(disks):
        mask = draw_disk(*disk)
        rows, cols = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = [cols[0], rows[0], cols[-1] + 1 - cols[0], rows[-1] + 1 - rows[0]]
        objects.append({"bbox": [int(v) for v in box], "segmentation": to_rle(mask, bool(number % 2)), "iscrowd": 0})
    polygons = [[60.3, 5.7, 110.2, 12.1, 99.9, 41.5, 70.4, 33.3], [20.1, 60.2, 44.4, 61.9, 30.0, 88.8]]
    objects.append({"bbox": [20.1, 5.7, 90.1, 83.1], "segmentation": polygons, "iscrowd": 0})
    objects.append({"bbox": [30.5, 30.25, 50.5, 20.5], "iscrowd": 0})
    crowd = np.zeros((HEIGHT, WIDTH), bool)
    crowd[10:80, 44:128] = True
    objects.append({"bbox": [44, 10, 84, 70], "segmentation": to_rle(crowd, False), "iscrowd": 1})
    return [{**one, "id": n, "image_id": 7, "category_id": 1 + n % 2} for n, one in enumerate(objects)]


@pytest.fixture
def coco(tmp_path):
    """An image with objects, one without, and a smaller one than a window."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    rng = np.random.default_rng(0)
    sizes = {"large": (HEIGHT, WIDTH), "empty": (60, 50), "small": (30, 40)}
    for name, (height, width) in sizes.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train2017" / f"{name}.png")
    ids = {"large": 7, "empty": 8, "small": 9}
    small = {"bbox": [5, 5, 20, 10], "iscrowd": 0, "id": 99, "image_id": 9, "category_id": 1}
    content = {
        "images": [
            {"id": ids[name], "file_name": f"{name}.png", "height": height, "width": width}
            for name, (height, width) in sizes.items()
        ],
        "annotations": [*make_objects(), small],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    (tmp_path / "val2017").symlink_to(tmp_path / "train2017")
    return tmp_path


def cut(coco: Path, min_visible: float = 0.3):
    images = read_objects(str(coco), "train", log=pytest.fail)
    windows, _ = cut_windows(images.files, SIZE, OVERLAP, PLAIN, images.sizes)
    return images, cut_objects(images, windows, min_visible)


def test_run_lengths_of_any_length():
    """COCO's compressed form has the numbers that it was made of."""
    rng = np.random.default_rng(0)
    for size in (1, 4, 40):
        counts = rng.integers(1, [3, 50, 3000, 10**6][size % 4], 2 * size).tolist()
        encoded = rle.frPyObjects({"size": [1, sum(counts)], "counts": counts}, 1, sum(counts))["counts"]
        assert decode_counts(encoded) == counts
        assert decode_counts(encoded.decode() if isinstance(encoded, bytes) else encoded) == counts


def test_masks_are_drawn_in_their_place_as_in_the_whole_image():
    """Pixel by pixel, partly outside of the image too."""
    rng = np.random.default_rng(1)
    partly = 0
    for number in range(300):
        corners = rng.uniform(-30, 160, 2)
        points = corners + rng.normal(0, 14, (rng.integers(3, 9), 2)).round(int(rng.integers(0, 4)))
        polygons = [points.ravel().tolist()]
        if number % 3 == 0:
            polygons.append((points + rng.uniform(-20, 20, 2)).ravel().tolist())
        whole = rle.decode(encode_mask(polygons, HEIGHT, WIDTH)).astype(bool)
        if not whole.any():
            continue
        partly += int(points.min() < 0 or points[:, 0].max() > WIDTH)
        for segmentation in (polygons, to_rle(whole, True), to_rle(whole, False)):
            top, left, pixels = draw_local(segmentation, HEIGHT, WIDTH)
            placed = np.zeros_like(whole)
            placed[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
            assert np.array_equal(placed, whole)
    assert partly > 20


@pytest.mark.parametrize("min_visible", [0.0, 0.3, 0.8])
def test_objects_of_windows_are_those_of_arrays_cut_by_hand(coco, min_visible):
    images, windows = cut(coco, min_visible)
    names = [windows.name(index) for index in range(len(windows))]
    assert [name.rpartition("/")[2] for name in names[:6]] == [f"large.png at {x},{y}" for y, x in CORNERS]
    assert len(windows) == 6 + 4 + 1
    objects = images.objects_of(0)
    masks = {n: draw_masks([one], HEIGHT, WIDTH)[0].numpy() for n, one in enumerate(objects) if "segmentation" in one}
    dropped = 0
    for index, (top, left) in enumerate(CORNERS):
        expected = []
        for number, one in enumerate(objects):
            x, y, width, height = one["bbox"]
            x0, y0 = max(x, left), max(y, top)
            x1, y1 = min(x + width, left + SIZE), min(y + height, top + SIZE)
            part = masks[number][top : top + SIZE, left : left + SIZE] if number in masks else None
            clipped = max(0, x1 - x0) * max(0, y1 - y0)
            visible = clipped / (width * height) if part is None else part.sum() / masks[number].sum()
            if not clipped or not visible or (visible < min_visible and not one["iscrowd"]):
                dropped += bool(visible)
                continue
            box = [x0 - left, y0 - top, x1 - x0, y1 - y0]
            expected.append((one["label"], one["iscrowd"], box, visible * one["area"], part))
        found = windows.objects_of(index)
        assert [(one["label"], one["iscrowd"]) for one in found] == [entry[:2] for entry in expected]
        for one, (*_, box, area, part) in zip(found, expected, strict=True):
            assert one["bbox"] == pytest.approx(box, abs=1e-9)
            assert one["area"] == pytest.approx(area)
            assert ("segmentation" in one) == (part is not None)
            if part is not None:
                assert np.array_equal(draw_masks([one], SIZE, SIZE)[0].numpy(), part)
                assert one["area"] == pytest.approx(part.sum() if one["bbox"] else 0, rel=0.05)
    assert (dropped > 0) == (min_visible > 0)
    assert [one["iscrowd"] for one in windows.objects_of(0)].count(1) == 1  # of which 5 % are in the window
    assert windows.objects_of(10) == images.objects_of(2)  # an image that fits is as it is


def test_windows_are_images_like_others(coco):
    """Ids are unique, pixels are those of the place, and training targets go with them."""
    _, windows = cut(coco)
    assert len(set(windows.ids.tolist())) == len(windows)
    pixels = np.asarray(Image.open(coco / "train2017" / "large.png"))
    for index, (top, left) in enumerate(CORNERS):
        _, data, known = windows[index]
        for seed in range(3):  # they stay where they are
            image = open_sample(data.move(random.Random(seed))).decode()
            assert np.array_equal(image.permute(1, 2, 0), pixels[top : top + SIZE, left : left + SIZE])
        assert known["size"] == (SIZE, SIZE) == tuple(image.shape[-2:])
        target = make_target({**known, "objects": [o for o in known["objects"] if "segmentation" in o]}, masks=True)
        assert target["masks"].shape[1:] == (SIZE, SIZE)
    assert len(windows.take(np.array([3, 5]))) == 2


def test_an_image_of_another_size_than_its_annotations_is_named(coco):
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(coco / "train2017" / "large.png")
    _, windows = cut(coco)
    with pytest.raises(UnreadableImage, match="130x91 pixels, and 130x90 in the annotations"):
        open_sample(windows[0][1])


def make_config(coco: Path, **data) -> DetectionConfig:
    data = {"window_size": SIZE, "window_overlap": OVERLAP, "img_size": 64, "batch_size": 2, "num_workers": 0, **data}
    return DetectionConfig(
        model=DetectionModelConfig(
            name="itpn_nano",
            scratch=True,
            head_width=16,
            rpn_post_nms_top_n_train=40,
            box_batch_size_per_image=16,
            masks=False,
        ),
        data=DetectionDataConfig(root=str(coco), **data),
        trainer=TrainerConfig(max_epochs=1, max_steps=2),
        output_dir=str(coco / "runs"),
    )


def test_windows_without_objects(coco):
    file = coco / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["id"] in (0, 6, 99)]  # a crowd among them
    file.write_text(json.dumps(content))
    with_empty, without = (find_data(make_config(coco, empty_images=empty)) for empty in (True, False))
    assert (len(with_empty.train), with_empty.count, with_empty.notes[0]) == (11, 11, "11 windows of 3 images")
    assert "5 windows without objects are left out (--data.empty-images)" in without.notes
    assert (len(without.train), without.notes[0]) == (2, "7 windows of 2 images")
    assert all(any(not one["iscrowd"] for one in without.train.objects_of(index)) for index in range(2))
    assert len(set(without.train.ids.tolist())) == 2
    assert len(without.val) == 3  # whole images


def test_a_run_on_windows(coco, capsys):
    config = make_config(coco)
    folder = train(config, "test")
    said = " ".join(capsys.readouterr().out.split())
    assert "7 windows (2 classes, 3 whole images to evaluate on)" in said
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics["loss_box_reg"] >= 0


def test_what_windows_are_not_for(coco, capsys):
    given = ["--data.root", str(coco), "--data.window-size", "40", "--model.scratch", "--model.name", "itpn_nano"]
    assert main(["train", "classifier_small", *given]) == 2
    assert "--data.window-size is not for classifiers" in capsys.readouterr().err
    smaller = ["--data.window-size", "4", "--data.window-overlap", "0", "--data.window-min-visible", "1"]
    assert main(["train", "detector_nano", *given, *smaller, "--output-dir", str(coco / "runs")]) == 2
    assert "no window of 4 px has 100% of an object in" in capsys.readouterr().err


# --- label maps


@pytest.fixture
def scenes(tmp_path):
    """An image whose pixels tell where they are, and whose mask is of three classes."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    rows, cols = np.mgrid[:HEIGHT, :WIDTH]
    for name in ("a", "b"):
        Image.fromarray(np.stack([rows, cols, rows * 0], -1).astype(np.uint8)).save(tmp_path / f"images/{name}.png")
        Image.fromarray(((rows // 5 + cols // 7) % 3).astype(np.uint8)).save(tmp_path / f"masks/{name}.png")
    return tmp_path


def test_label_maps_are_cut_where_their_images_are(scenes):
    """Windows move from epoch to epoch, and their labels with them."""
    maps, _ = find_label_maps(str(scenes), rules=MaskRules(log=lambda line: None))
    windows, _ = cut_windows(maps.files, SIZE, OVERLAP, PLAIN)
    cut_maps = maps.cut(windows)
    assert len(cut_maps) == len(windows) == 12
    transform = SegmentationTransform(
        cut_maps.table, SIZE, SIZE, scales=(1, 1), max_fraction=1, hflip=0, photometric=False
    )
    labels = np.asarray(Image.open(scenes / "masks" / "a.png"))
    places: Counter[tuple[int, int]] = Counter()
    for index in range(len(cut_maps)):
        for seed in range(5):
            rng = random.Random(seed)
            _, data, mask = cut_maps[index]
            view = transform(open_sample(data.move(rng)), rng, mask)
            top, left = (int(view["image"][channel, 0, 0]) for channel in (0, 1))
            assert np.array_equal(view["target"], labels[top : top + SIZE, left : left + SIZE])
            assert np.array_equal(view["image"][0, :, 0], np.arange(top, top + SIZE))
            places[top, left] += 1
    assert len(places) > len(CORNERS)


def test_a_segmenter_learns_windows(scenes, capsys):
    config = SegmentationConfig(
        model=SegmentationModelConfig(name="itpn_nano", scratch=True, head_width=16),
        data=SegmentationDataConfig(
            root=str(scenes), window_size=SIZE, window_overlap=0, img_size=64, batch_size=2, num_workers=0
        ),
        trainer=TrainerConfig(max_epochs=1, max_steps=1),
        output_dir=str(scenes / "runs"),
    )
    data = find_scenes(config)
    assert (data.count, data.notes[0]) == (12, "12 windows of 2 images")
    folder = train(config, "test")
    assert "12 windows (3 classes of pixels)" in " ".join(capsys.readouterr().out.split())
    assert (folder / "model.safetensors").is_file()


def test_windows_cover_each_image(scenes):
    """And move by half of their side at most, within their image."""
    windows, whole = cut_windows(
        FileReader([str(scenes / "images" / f"{name}.png") for name in "ab"]), SIZE, OVERLAP, PLAIN
    )
    assert [Path(name).name for name in whole] == ["a.png", "b.png"]  # PNG is not read by region
    covered = np.zeros((2, HEIGHT, WIDTH), bool)
    for index in range(len(windows)):
        number, top, left, height, width = windows.places[index].tolist()
        covered[number, top : top + height, left : left + width] = True
        _, data = windows[index]
        for seed in range(20):
            y, x, h, w = data.move(random.Random(seed)).box
            assert (h, w) == (SIZE, SIZE)
            assert 0 <= y <= HEIGHT - h
            assert 0 <= x <= WIDTH - w
            assert max(abs(y - top), abs(x - left)) <= SIZE // 2
    assert covered.all()
    pixels = open_sample(windows[1][1]).decode()
    assert torch.equal(pixels[1, 0], torch.arange(41, 41 + SIZE, dtype=torch.uint8))
