"""Annotations as people have them: what is usable is used, what is invalid is named by kind before training."""

import errno
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import itpn.system.text
from itpn.cli import main
from itpn.data.annotations import find_objects, read_objects
from itpn.data.layouts import UNREADABLE
from itpn.data.objects import DetectionTransform, make_target
from itpn.data.yolo import PIXELS
from itpn.errors import UserError
from itpn.metrics.detection import score_detections

HEIGHT, WIDTH = 60, 80
BOX = [10, 12, 20, 15]
FRACTIONS = "coordinates from 0 to 1, which look like fractions of the image (pixels are expected)"
GOOD = [10, 12, 30, 12, 30, 27, 10, 27]


def write_coco(root: Path, annotations: list, images: int = 3, categories: list | None = None, **changes) -> Path:
    """A set of grey images with these annotations; each goes to the next image where it does not name its own."""
    (root / "train2017").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    entries = []
    for number in range(1, images + 1):
        Image.new("RGB", (WIDTH, HEIGHT), "grey").save(root / "train2017" / f"{number}.jpg")
        entries.append({"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH} | changes)
    whole = [
        {"id": n, "image_id": 1 + (n - 1) % images, "category_id": 1, "bbox": BOX, "iscrowd": 0} | one
        for n, one in enumerate(annotations, start=1)
    ]
    content = {
        "images": entries,
        "annotations": whole,
        "categories": categories or [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


def edit(root: Path, change) -> None:
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def read(root: Path, **options):
    """The images, and the log without the heading of the summary."""
    logged: list[str] = []
    images = read_objects(str(root), "train", "summary", logged.append, **options)
    return images, [line.strip() for line in logged if "left out or corrected:" not in line]


def objects_of(images) -> list[list[dict]]:
    return [images.objects_of(index) for index in range(len(images))]


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as error:
        read(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def train(root: Path, out: Path, capsys, *options: str, recipe: str = "detector_nano") -> tuple[int, str, str]:
    """Exit code and output of a run of one step."""
    command = ["train", recipe, "--model.scratch", "--model.name", "itpn_nano", "--data.root", str(root)]
    command += ["--data.batch-size", "2", "--data.num-workers", "0", "--trainer.max-steps", "1"]
    code = main([*command, "--output-dir", str(out), *options])
    logged = capsys.readouterr()
    return code, " ".join(logged.out.split()), " ".join((logged.out + logged.err).split())


# --- ids


@pytest.mark.parametrize(
    "ids", [[0, 0, 0, 0], [7, 7, 7, 7], [None] * 4, ["a", "a", "b", ""], [1.5, [2], {}, 3], ["missing"] * 4]
)
def test_ids_of_annotations_are_not_needed(tmp_path, ids):
    """Nor in evaluation: an object of id 0 is none to COCO's code."""
    root = write_coco(tmp_path, [{"id": id_, "bbox": [10 + n, 12, 20, 15]} for n, id_ in enumerate(ids)])
    if ids[0] == "missing":
        edit(root, lambda c: [one.pop("id") for one in c["annotations"]])
    images, logged = read(root)
    assert logged == []
    assert [[o["bbox"] for o in objects] for objects in objects_of(images)] == [
        [[10, 12, 20, 15], [13, 12, 20, 15]],
        [[11, 12, 20, 15]],
        [[12, 12, 20, 15]],
    ]
    found = [
        {"image_id": int(images.ids[index]), "category_id": 1, "bbox": one["bbox"], "score": 0.9}
        for index, objects in enumerate(objects_of(images))
        for one in objects
    ]
    scores = score_detections(images, found, images.ids.tolist(), masks=False)
    assert scores.objects == 4
    assert scores.metrics["box"]["ap"] == 1.0


def test_ids_in_other_forms(tmp_path):
    """Of classes and images as floats and text; an image's id may be any text."""
    root = write_coco(
        tmp_path,
        [{"category_id": 1.0, "image_id": "1"}, {"category_id": "2", "image_id": 2.0}, {"category_id": "3"}],
        categories=[{"id": "1", "name": " cat "}, {"id": 2.0, "name": 5}],
    )
    images, logged = read(root)
    assert (images.classes, images.class_ids, images.ids.tolist()) == (("cat", "5"), (1, 2), [1, 2, 3])
    assert [[o["label"] for o in objects] for objects in objects_of(images)] == [[0], [1], []]
    assert logged == ["objects of an unknown class: 1 (annotation 3 of image 3: class 3)"]

    def rename(content):
        for image, id_ in zip(content["images"], ("a", "007", 7), strict=True):
            image["id"] = id_
        for one, id_ in zip(content["annotations"], ("a", "007", "7"), strict=True):
            one |= {"image_id": id_, "category_id": 1}

    edit(root, rename)
    images, logged = read(root)
    assert images.ids.tolist() == [8, 9, 7]
    assert [len(objects) for objects in objects_of(images)] == [1, 1, 1]
    assert logged == [f"{root}/annotations/instances_train2017.json: ids of images are text (a): results.json numbers "
                    "them from 8"]  # fmt: skip


def test_images_that_share_an_id_or_a_file(tmp_path):
    """Nobody knows whose the objects of a shared id are; those of a file that is listed twice are one image's."""
    root = write_coco(tmp_path, [{}, {"bbox": [1, 2, 9, 9]}, {}])
    edit(root, lambda c: c["images"][1].update(id=1))
    images, logged = read(root)
    assert [Path(images.name(i)).name for i in range(len(images))] == ["3.jpg"]
    assert "images whose id another one has: 2 (1: 1.jpg, 1: 2.jpg)" in logged
    root = write_coco(tmp_path, [{}, {"bbox": [1, 2, 9, 9]}, {}])
    edit(root, lambda c: c["images"][1].update(file_name="1.jpg"))
    images, logged = read(root)
    assert [[o["bbox"] for o in objects] for objects in objects_of(images)] == [[BOX, [1, 2, 9, 9]], [BOX]]
    assert logged == ["images that are listed with two ids, whose objects were joined: 1 (2: 1.jpg)"]


# --- boxes


def test_normalized_boxes_are_refused(tmp_path, capsys):
    root = write_coco(
        tmp_path / "a", [{"bbox": [0.1, 0.1, 0.3, 0.3]}, {"bbox": [0, 0, 1, 1]}, {"bbox": [0.2, 0, 0.5, 1]}]
    )
    code, _, logged = train(root, tmp_path / "runs", capsys)
    assert code == 2
    assert logged.endswith(
        "has no objects that can be used: boxes with coordinates from 0 to 1, which look like fractions: multiply them "
        "by the image's sides: 3 (annotation 1 of image 1, annotation 2 of image 2, annotation 3 of image 3)"
    )
    assert not (tmp_path / "runs").exists()


def test_boxes_under_a_pixel_are_left_out(tmp_path):
    root = write_coco(tmp_path, [{"bbox": [30, 20, 0.4, 9]}, {"bbox": [30, 20, 9, 0.9]}, {"bbox": [30, 20, 1, 1]}])
    images, logged = read(root)
    assert logged == ["boxes under 1 pixel: 2 (annotation 1 of image 1, annotation 2 of image 2)"]
    assert [len(objects) for objects in objects_of(images)] == [0, 0, 1]
    root = write_coco(tmp_path, [{"bbox": [79.5, 20, 9, 9]}, {}])  # of which half a pixel is inside
    assert read(root)[1] == ["boxes under 1 pixel: 1 (annotation 1 of image 1)"]
    assert "boxes under 1 pixel: 3" in refusal(write_coco(tmp_path, [{"bbox": [30, 20, 0.3, 0.3]}] * 3))


def test_a_box_in_the_first_pixel_of_a_tiny_image_is_no_fraction(tmp_path):
    root = write_coco(tmp_path, [{"bbox": [0, 0, 1, 1]}] * 3, height=4, width=4)
    assert [o["bbox"] for objects in objects_of(read(root)[0]) for o in objects] == [[0, 0, 1, 1]] * 3


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        (["10", "12.0", " 20", "15"], None),
        ([30, 27, -20, -15], "boxes of no area"),
        ([10, 12, 0, 0], "boxes of no area"),
        ([10, 12, float("nan"), 15], "objects whose box is not four numbers"),
        ([10, 12, 20], "objects whose box is not four numbers"),
        ([10, 12, True, 15], "objects whose box is not four numbers"),
        ("10 12 20 15", "objects whose box is not four numbers"),
        ([], "objects without a box"),
        (None, "objects without a box"),
    ],
)
def test_numbers_of_boxes(tmp_path, box, kind):
    images, logged = read(write_coco(tmp_path, [{"bbox": box}, {}]))
    assert logged == ([] if kind is None else [f"{kind}: 1 (annotation 1 of image 1)"])
    assert [o["bbox"] for o in objects_of(images)[0]] == ([BOX] if kind is None else [])


def test_corners_in_place_of_width_and_height(tmp_path):
    corners = [[30, 20, 70, 50], [5, 6, 12, 20], [40, 30, 60, 58]]
    text = refusal(write_coco(tmp_path, [{"bbox": box} for box in corners]))
    assert "boxes look like [x0, y0, x1, y1]: 2 of 3 would leave their image" in text
    assert "convert them to COCO's [x, y, width, height]" in text
    # boxes that reach a little out of their image, or of another image size, are no corners
    images, logged = read(write_coco(tmp_path, [{"bbox": [0, 0, 84, 62]}, {"bbox": [2, 2, 80, 60]}, {}]))
    assert logged[0].startswith("boxes partly outside their image, which were clipped: 2")
    assert [o["bbox"] for o in objects_of(images)[0]] == [[0, 0, 80, 60]]
    _, logged = read(write_coco(tmp_path, [{"bbox": [60, 40, 50, 50]}, {"bbox": [70, 50, 30, 20]}, {}]))
    assert logged[0].startswith("boxes partly outside their image, which were clipped: 2")


def test_objects_that_training_always_drops_are_named(tmp_path, capsys):
    """A box of 2 px in an image of 1000 px is 0.2 px at 96 px: before training, not on the way."""
    root = write_coco(
        tmp_path / "a", [{"bbox": [30, 20, 2, 2]}, {"bbox": [30, 20, 600, 600]}, {}], height=1000, width=1000
    )
    for number in (1, 2, 3):
        Image.new("RGB", (1000, 1000)).save(root / "train2017" / f"{number}.jpg")
    code, logged, _ = train(root, tmp_path / "runs", capsys)
    assert code == 0
    assert f"1 of 3 objects in {root} are under 1 pixel at --data.img-size 96, and are not learned: raise it" in logged
    edit(root, lambda c: c.update(annotations=c["annotations"][:1]))
    code, _, logged = train(root, tmp_path / "runs2", capsys)
    assert code == 2
    assert f"1 of 1 objects in {root} are under 1 pixel" in logged


@pytest.mark.parametrize(
    "options", [{"crop_prob": 0.0}, {"crop_prob": 1.0}, {"large_scale_jitter": (0.3, 2.0)}, {"longest": 70}]
)
def test_magnification_is_the_largest(tmp_path, options):
    """No draw keeps an object that is counted as lost, and some draw keeps one that is half as large again."""
    transform = DetectionTransform(**{"size": 64, "longest": 107, "masks": False, **options})
    side = 1 / transform.magnify(300, 400)
    image = torch.zeros(3, 300, 400, dtype=torch.uint8)
    kept = {}
    for factor in (0.98, 1.6):
        box = [200.0, 150.0, side * factor, side * factor]
        annotation = {"id": 1, "size": (300, 400), "objects": [{"bbox": box, "label": 0, "iscrowd": 0}]}
        kept[factor] = sum(len(transform(image, random.Random(s), annotation)["target"]["boxes"]) for s in range(150))
    assert kept[0.98] == 0 < kept[1.6]


# --- polygons


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ([10, 12, 30, 12], "not polygons of three points or more"),
        ([10, 12, 30, 12, 30], "not polygons of three points or more"),
        ([5, 5, 5, 5, 5, 5], "it contains no pixel"),
        ([10, 12, 20, 22, 30, 32], "it contains no pixel"),
        ([10, 12, float("nan"), 12, 30, 27], "not polygons of three points or more"),
        ([0.1, 0.2, 0.4, 0.2, 0.4, 0.5], FRACTIONS),
        (["x", 1, 2, 3, 4, 5], "could not convert string to float: 'x'"),
        ([1e30, 1, 5, 5, 1e30, 1e30], "polygons far outside their image"),
    ],
)  # fmt: skip
def test_good_polygons_are_used_without_those_beside_them(tmp_path, beside, reason):
    images, logged = read(write_coco(tmp_path / "a", [{"segmentation": [beside, GOOD, []]}]))
    assert logged == [
        f"polygons that cannot be used, beside others of the object: 1 (annotation 1 of image 1: {reason})"
    ]
    mask = make_target(images[0][2], masks=True)["masks"][0]
    assert mask[12:27, 10:30].all()
    assert mask.sum() == 15 * 20
    images, logged = read(write_coco(tmp_path / "b", [{"segmentation": [beside]}]))  # alone, the box is left
    assert logged == [
        f"polygons or masks that cannot be used (the box is, if there is one): 1 (annotation 1 of image 1: {reason})"
    ]
    assert objects_of(images)[0] == [{"iscrowd": 0, "bbox": BOX, "area": 300, "label": 0}]


@pytest.mark.parametrize("empty", [[], [[]], [[], []], None, {}, ""])
def test_empty_polygons_are_none(tmp_path, empty):
    images, logged = read(write_coco(tmp_path, [{"segmentation": empty}]))
    assert logged == []
    assert images.mask_counts == (0, 1)
    assert objects_of(images)[0] == [{"iscrowd": 0, "bbox": BOX, "area": 300, "label": 0}]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": "0PP1"}, "Invalid RLE"),  # of fewer pixels than the image has
        ({"size": [WIDTH, HEIGHT], "counts": [4800]}, "run lengths for [80, 60]"),
        ({"size": [HEIGHT, WIDTH], "counts": [4800]}, "it contains no pixel"),
        ({"counts": [4800]}, "in none of COCO's forms"),
        ("polygon", "could not convert string to float: 'p'"),
        (7, "in none of COCO's forms"),
    ],
)
def test_invalid_masks_leave_the_box(tmp_path, mask, reason):
    images, logged = read(write_coco(tmp_path, [{"segmentation": mask}]))
    assert f"(the box is, if there is one): 1 (annotation 1 of image 1: {reason}" in logged[0]
    assert [o["bbox"] for o in objects_of(images)[0]] == [BOX]


def test_a_missing_box_is_the_polygons(tmp_path):
    root = write_coco(
        tmp_path, [{"segmentation": [GOOD, [1, 2]], "bbox": []}, {"segmentation": [[1, 2]], "bbox": None}, {}]
    )
    images, logged = read(root)
    assert [[o["bbox"] for o in objects] for objects in objects_of(images)] == [[BOX], [], [BOX]]
    assert "objects without a box: 1 (annotation 2 of image 2)" in logged


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [10, 12, -1, -1], [float("nan")] * 4, [1, 2], {"x": 1}])
def test_a_box_that_is_none_is_the_polygons(tmp_path, box):
    images, logged = read(
        write_coco(tmp_path, [{"segmentation": [GOOD], "bbox": box}, {"segmentation": [], "bbox": box}])
    )
    assert [[o["bbox"] for o in objects] for objects in objects_of(images)][:2] == [[BOX], []]
    kind = "boxes of no area, or not of four numbers, replaced by the box of the polygon"
    assert f"{kind}: 1 (annotation 1 of image 1)" in logged
    assert len(logged) == 2


def test_boxes_of_objects_with_invalid_polygons_are_trained(tmp_path, capsys):
    """With masks on, they are left out as objects without a polygon are."""
    root = write_coco(
        tmp_path / "a", [{"segmentation": [GOOD]}, {"segmentation": [[1, 2, 3, 4]]}, {"segmentation": [[]]}]
    )
    code, logged, _ = train(root, tmp_path / "off", capsys, "--model.masks", "False")
    assert code == 0
    assert "3 images (2 classes)" in logged
    code, logged, _ = train(root, tmp_path / "on", capsys, "--model.masks", "True", "--data.batch-size", "1")
    assert code == 0
    assert "2 objects without a mask are left out: --model.masks False learns all boxes" in logged
    assert "1 images (2 classes)" in logged


# --- other fields


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        *(("iscrowd", value, 0) for value in (0.0, "0", False, None)),
        *(("iscrowd", value, 1) for value in (1.0, "1", True)),
        *(("iscrowd", value, None) for value in (0.5, "yes", 2, [0])),
        *(("height", value, 0) for value in (60.0, "60", "60.0", " 60 ")),
        *(("height", value, None) for value in (60.5, "sixty", True, None, -60, [60])),
    ],
)  # fmt: skip
def test_whole_numbers_in_other_forms(tmp_path, field, value, accepted):
    root = write_coco(tmp_path, [{}, {}])
    edit(root, lambda c: c["annotations" if field == "iscrowd" else "images"][0].update({field: value}))
    images, logged = read(root)
    if accepted is not None:
        assert logged == []
        assert (len(images), images.sizes[0].tolist()) == (3, [60, 80])
        assert objects_of(images)[0][0]["iscrowd"] == accepted
    elif field == "iscrowd":
        assert logged == [f"objects whose iscrowd is neither 0 nor 1: 1 (annotation 1 of image 1: {value!r})"]
    else:
        assert logged == [f"images without height or width in whole pixels: 1 (1.jpg: height {value!r}, width 80)"]


def test_equal_objects_of_coco_are_kept(tmp_path):
    """Whatever their ids; lines of YOLO's files that repeat count once, see below."""
    images, logged = read(write_coco(tmp_path, [{"id": 0}] * 4))
    assert [len(objects) for objects in objects_of(images)] == [2, 1, 1]
    assert logged == []


# --- the category above all others


@pytest.mark.parametrize("name", ["pets", "cat"])
@pytest.mark.parametrize("above", [{"supercategory": "none"}, {"supercategory": None}, {}])
def test_the_root_category_is_no_class(tmp_path, name, above):
    classes = [{"id": 1, "name": "cat", "supercategory": name}, {"id": 2, "name": "dog", "supercategory": name}]
    root = write_coco(tmp_path, [{}, {"category_id": 2}, {}], categories=[{"id": 0, "name": name, **above}, *classes])
    (root / "val2017").symlink_to(root / "train2017")
    notes = root / "annotations"
    (notes / "instances_val2017.json").write_bytes((notes / "instances_train2017.json").read_bytes())
    logged: list[str] = []
    train, val = find_objects(str(root), log=logged.append)
    assert train.classes == val.classes == ("cat", "dog")
    assert train.class_ids == (1, 2)
    assert [[o["label"] for o in objects] for objects in objects_of(train)] == [[0], [1], [0]]
    assert logged == [
        f"{notes}/instances_train2017.json: category 0 ({name}) has no objects and is the supercategory of the others: "
        "it is not a class"
    ]


@pytest.mark.parametrize(
    ("categories", "annotations"),
    [
        ([(0, "pets", "none"), (1, "cat", "pets"), (2, "dog", "pets")], [{"category_id": 0}]),  # it has objects
        ([(0, "pets", "none"), (1, "cat", "none"), (2, "dog", "pets")], [{}]),  # it groups only some
        ([(0, "pets", "animals"), (1, "cat", "pets"), (2, "dog", "pets")], [{}]),
        ([(0, "pets", "none"), (1, "cat", "none"), (2, "dog", "none")], [{}]),
        ([(1, "pets", "none")], [{}]),
    ],
)
def test_other_categories_without_objects_are_classes(tmp_path, categories, annotations):
    listed = [{"id": id_, "name": name, "supercategory": above} for id_, name, above in categories]
    images, logged = read(write_coco(tmp_path, annotations, categories=listed))
    assert images.classes == tuple(name for _, name, _ in categories)
    assert logged == []


# --- YOLO


def write_yolo(root: Path, *labels: str, names: str = "[cat, dog]", more: str = "") -> Path:
    for number, text in enumerate(labels):
        for folder in ("images", "labels"):
            (root / folder / "train").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), "grey").save(root / "images" / "train" / f"{number}.jpg")
        (root / "labels" / "train" / f"{number}.txt").write_text(text)
    (root / "data.yaml").write_text(f"train: images/train\nnames: {names}\n{more}")
    return root


@pytest.mark.parametrize(
    ("names", "nc", "refused"),
    [
        ("[cat, dog]", "2", False),
        ("[cat, dog]", "2.0", False),
        ("[cat, dog]", "", False),
        ("{0: cat, 4: dog}", "2", False),
        ("{0: cat, 4: dog}", "5", False),
        ("[cat, dog]", "3", True),
        ("[cat, dog]", "two", True),
        ("{0: cat, 4: dog}", "4", True),
    ],
)
def test_the_number_of_classes_is_that_of_the_names(tmp_path, names, nc, refused):
    root = write_yolo(tmp_path, "0 0.5 0.5 0.5 0.5", names=names, more=f"nc: {nc}\n")
    if refused:
        assert refusal(root) == f"{root}/data.yaml: nc is {nc}, but there are 2 names: correct one of them"
    else:
        assert read(root)[0].classes[0] == "cat"


def boxes_of(images) -> list[list[tuple]]:
    """Class and box of each object."""
    return [
        [(images.classes[o["label"]], *(round(v, 2) for v in o["bbox"])) for o in objects]
        for objects in objects_of(images)
    ]


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ("[yes, no, on, off]", ("yes", "no", "on", "off")),
        ("[1, 2.0, 1e3, 0x10]", ("1", "2.0", "1e3", "0x10")),
        ("[2024-01-01, 2024-13-45, 12:30, ~]", ("2024-01-01", "2024-13-45", "12:30", "~")),
        ("{0: null, 1: true, 2: 'no', 3: \"007\"}", ("null", "true", "no", "007")),
        ("\n- yes\n- 010\n- .nan\n- cat  # one\n", ("yes", "010", ".nan", "cat")),
    ],
)
def test_names_are_as_they_are_written(tmp_path, names, classes):
    root = write_yolo(tmp_path, "3 0.5 0.5 0.25 0.5\n", names=names, more="path: null\nval: ~\ntest:\n")
    images, logged = read(root)
    assert logged == []
    assert images.classes == classes
    assert boxes_of(images) == [[(classes[3], 30, 15, 20, 30)]]
    assert read_objects(str(root), "val", optional=True) is None  # null is no folder


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("\n- 0: cat\n- 1: dog", "the name of class 0 is a dict, not text"),
        ("\n- [cat, dog]", "the name of class 0 is a list, not text"),
        ("\n  0: cat\n  0: dog", "0 is there twice"),
    ],
)
def test_names_that_are_none(tmp_path, names, reason):
    assert reason in refusal(write_yolo(tmp_path, "0 0.5 0.5 0.25 0.5", names=names))


@pytest.mark.parametrize("layout", ["coco", "yolo", "voc"])
def test_sets_in_capitals(tmp_path, layout):
    if layout == "coco":
        root = write_coco(tmp_path, [{}], images=1)
        (root / "train2017").rename(root / "Train")
        next((root / "annotations").iterdir()).rename(root / "annotations" / "instances_Train.json")
    elif layout == "yolo":
        root = write_yolo(tmp_path, "0 0.5 0.5 0.25 0.5")
        (root / "data.yaml").write_text("Train: images/train\nnames: [cat, dog]\n")
    else:
        root = write_voc(tmp_path, voc_object("cat"))
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "ImageSets" / "Main" / "Train.txt").write_text("0\n")
    images, _ = read(root)
    assert len(images.with_objects()) == 1


def test_a_class_without_a_name(tmp_path):
    assert "data.yaml: class 1 has no name" in refusal(
        write_yolo(tmp_path, "0 0.5 0.5 0.2 0.2", names="[cat, '', dog]")
    )


def test_absolute_coordinates_are_refused(tmp_path, capsys):
    root = write_yolo(tmp_path / "a", "0 40 30 20 20\n", "1 10 12 30 12 30 27 10 27\n")
    code, _, logged = train(root, tmp_path / "runs", capsys)
    assert code == 2
    assert (
        "has no objects that can be used: objects with coordinates above 1, which look like pixels: divide them by"
        in logged
    )
    assert f"2 ({root}/labels/train/0.txt line 1, {root}/labels/train/1.txt line 1)" in logged


def test_sub_pixel_polygons_and_lines_that_repeat(tmp_path):
    """A polygon of 0.1 px is an object no network can learn; the same line again is the same object."""
    tiny = "0 0.5 0.5 0.501 0.5 0.501 0.501"
    root = write_yolo(tmp_path, f"1 0.5 0.5 0.25 0.5\n{tiny}\n1 0.50 0.5 0.250 0.5\n1 0.5 0.5 0.25 0.5\n", f"{tiny}\n")
    images, logged = read(root)
    place = root / "labels" / "train"
    assert boxes_of(images) == [[("dog", 30, 15, 20, 30)], []]
    assert sorted(logged) == [
        f"boxes under 1 pixel: 2 ({place}/0.txt line 2, {place}/1.txt line 1)",
        f"objects that are annotated twice, and count once: 2 ({place}/0.txt line 3, {place}/0.txt line 4)",
    ]
    assert "boxes under 1 pixel: 1" in refusal(write_yolo(tmp_path / "alone", tiny))


POINTS = [(0.4, 0.4), (0.5, 0.5), (0.6, 0.6)]


@pytest.mark.parametrize("visibility", [True, False])
@pytest.mark.parametrize("shape", ["[3, 3]", "[3, 2]"])
def test_keypoints_are_no_polygons(tmp_path, visibility, shape):
    points = " ".join(f"{x} {y}{' 2' * visibility}" for x, y in POINTS)
    root = write_yolo(
        tmp_path,
        f"1 0.5 0.5 0.25 0.5 {points}\n0 0.5 0.5 0.5 0.5\n",
        f"0 0.5 0.5 0.25 0.5 {points}",
        more=f"kpt_shape: {shape}\n",
    )
    images, logged = read(root)
    assert boxes_of(images) == [[("dog", 30, 15, 20, 30), ("cat", 20, 15, 40, 30)], [("cat", 30, 15, 20, 30)]]
    assert images.mask_counts == (0, 3)
    assert logged == [f"{root}/data.yaml: keypoints are left out, boxes are used"]


def test_keypoints_that_are_not_declared(tmp_path):
    """An even number of columns is no polygon's: 17 keypoints with their visibility."""
    root = write_yolo(tmp_path / "a", "1 0.5 0.5 0.25 0.5 " + " ".join(["0.5 0.5 2"] * 17))
    images, logged = read(root)
    assert boxes_of(images) == [[("dog", 30, 15, 20, 30)]]
    assert images.mask_counts == (0, 1)
    assert len(logged) == 1
    # an odd number of columns may be a polygon's, unless a visibility of 2 is among them
    root = write_yolo(tmp_path / "d", "1 0.5 0.5 0.25 0.5 0.4 0.4 2.0 0.6 0.6 1.0")
    images, logged = read(root)
    assert boxes_of(images) == [[("dog", 30, 15, 20, 30)]]
    assert images.mask_counts == (0, 1)
    assert logged == [f"{root}/data.yaml: keypoints are left out, boxes are used"]
    for shape in ("17", "[17]", "[17, 4]", "[x, 2]", "[0, 3]"):
        assert "is not [number of keypoints, 2 or 3]" in refusal(
            write_yolo(tmp_path / "b", "0 0.5 0.5 0.2 0.2", more=f"kpt_shape: {shape}")
        )
    text = refusal(write_yolo(tmp_path / "c", "0 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6", more="kpt_shape: [17, 3]"))
    assert "line 1: 9 columns are neither a box nor one with 17 keypoints (kpt_shape)" in text


def test_oriented_boxes_are_polygons(tmp_path):
    images, logged = read(write_yolo(tmp_path, "1 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5"))
    assert logged == []
    assert boxes_of(images) == [[("dog", 20, 15, 40, 30)]]
    mask = make_target(images[0][2], masks=True)["masks"][0]
    assert mask[30, 21:59].all()
    assert mask[16:44, 40].all()
    assert not mask[17, 22:36].any()  # a rhombus, not its box
    assert mask.sum() == pytest.approx(40 * 30 / 2, rel=0.1)


def test_rounding_above_one_is_no_pixel(tmp_path):
    images, logged = read(write_yolo(tmp_path, "1 0.5 0.5 1.0000001 1.0\n", "0 0.75 0.5 0.502 0.5\n"))
    assert logged == []
    assert boxes_of(images) == [[("dog", 0, 0, 80, 60)], [("cat", 39.92, 15, 40.08, 30)]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 nonsense 0.1", "could not convert string to float: 'nonsense'"),
        ("cat 0.5 0.5 0.1 0.1", "Invalid class id 'cat'"),
        ("1.5 0.5 0.5 0.1 0.1", "Invalid class id '1.5'"),
        ("0 0.5 0.5", "Invalid YOLO annotation line '0 0.5 0.5'; expected at least 5 tokens"),
        ("0,0.5,0.5,0.1,0.1", "Invalid YOLO annotation line '0,0.5,0.5,0.1,0.1'"),
        ("# class x y width height", "Invalid class id '#'"),
        ("0 0.5 0.5 -0.1 0.1", "Invalid box extent ('-0.1', '0.1')"),
        ("0 0.5 0.5 nan 0.1", "Invalid box ('0.5', '0.5', 'nan', '0.1')"),
        ("0 0.1 0.1 0.5 0.1 0.5 x", "could not convert string to float: 'x'"),
        ("0 0.5 0.5 0.1 0." + "1" * 40, "a number of more than 40 characters"),
        ("\x01 0.5 0.5 0.1 0.1", "Invalid class id '\\x01'"),
    ],
)
def test_a_line_that_cannot_be_read_leaves_the_others(tmp_path, capsys, line, reason):
    good = "1 0.5 0.5 0.25 0.5"
    root = write_yolo(tmp_path / "a", f"{line}\n{good}\n\n{line}\n", f"{line}\n\n", "", good)
    place = root / "labels" / "train"
    images, logged = read(root)
    assert [Path(images.name(i)).stem for i in range(len(images))] == ["0", "2", "3"]
    assert boxes_of(images) == [[("dog", 30, 15, 20, 30)], [], [("dog", 30, 15, 20, 30)]]
    assert len(logged) == 2
    assert logged[0].startswith(f"objects that cannot be read: 2 ({place}/0.txt: line 1: {reason}")
    assert f", {place}/0.txt: line 4: {reason}" in logged[0]
    assert logged[1].startswith(f"images whose annotations cannot be read: 1 ({place}/1.txt: line 1: {reason}")
    code, _, errors = train(root, tmp_path / "runs", capsys, "--data.invalid-annotations", "error")
    assert code == 2
    assert f"objects that cannot be read: 2 ({place}/0.txt: line 1: {reason}" in errors
    assert errors.endswith("--data.invalid-annotations skip leaves these out")
    with pytest.raises(UserError, match="has no images that can be used: images whose annotations cannot be read: 1"):
        read(write_yolo(tmp_path / "b", line))


# --- Pascal VOC


def write_voc(root: Path, *objects: str, size: str = "") -> Path:
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(objects):
        Image.new("RGB", (WIDTH, HEIGHT), "grey").save(root / "JPEGImages" / f"{number}.jpg")
        (root / "Annotations" / f"{number}.xml").write_text(f"<annotation>{size}{text}</annotation>")
    return root


def voc_object(name: str, *corners: float) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners or (11, 13, 30, 27), strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def test_blanks_around_names(tmp_path):
    root = write_voc(
        tmp_path,
        *(voc_object(name) for name in ("cat", " cat ", "\n\tcat\n", "traffic light ")),
        size="<size><width>80.0</width><height> 60 </height></size>",
    )
    images, logged = read(root)
    assert logged == []
    assert images.classes == ("cat", "traffic light")
    assert [row[0][0] for row in boxes_of(images)] == ["cat"] * 3 + ["traffic light"]
    assert boxes_of(images)[0] == [("cat", *BOX)]


def test_what_pascal_voc_gets_wrong(tmp_path):
    root = write_voc(tmp_path / "a", voc_object("cat") * 2, voc_object(" "), voc_object("cat", 0.1, 0.1, 0.5, 0.5))
    images, logged = read(root)
    place = root / "Annotations"
    assert boxes_of(images) == [[("cat", *BOX)], []]
    assert sorted(logged) == [
        "boxes with coordinates from 0 to 1, which look like fractions: multiply them by the image's sides: 1 "
        f"({place}/2.xml object 1)",
        f"images whose annotations cannot be read: 1 ({place}/1.xml: object 1: it has no name)",
        f"objects that are annotated twice, and count once: 1 ({place}/0.xml object 2)",
    ]
    text = refusal(
        write_voc(tmp_path / "b", voc_object("cat"), size="<size><width>x</width><height>60</height></size>")
    )
    assert "0.xml: height 60, width x are no whole numbers" in text


CORRUPT = {
    "object 2: it has no name": voc_object(""),
    "object 2: Missing bndbox in Pascal VOC annotation.": "<object><name>dog</name></object>",
    "object 2: Missing 'ymax'": voc_object("dog").replace("ymax", "y_max"),
    "object 2: Invalid 'xmin' value 'left'": voc_object("dog").replace("11", "left"),
    "object 2: Invalid 'xmax' value 'nan'": voc_object("dog", 11, 13, float("nan"), 27),
    "object 2: Invalid 'xmax' value 'xxx": voc_object("dog", 11, 13, "x" * 10**6, 27),
}


@pytest.mark.parametrize("reason", list(CORRUPT))
def test_an_object_that_cannot_be_read_leaves_the_others(tmp_path, capsys, reason):
    good, corrupt = voc_object("cat"), CORRUPT[reason]
    root = write_voc(tmp_path, good + corrupt + good.replace("27", "25"), corrupt, good)
    place = root / "Annotations"
    images, logged = read(root)
    assert [Path(images.name(i)).stem for i in range(len(images))] == ["0", "2"]
    assert images.classes == ("cat",)
    assert boxes_of(images) == [[("cat", *BOX), ("cat", *BOX[:3], 13)], [("cat", *BOX)]]
    assert logged[0].startswith(f"objects that cannot be read: 1 ({place}/0.xml: {reason}")
    assert logged[1].startswith(f"images whose annotations cannot be read: 1 ({place}/1.xml: object 1")
    assert max(map(len, logged)) < 1000
    code, _, errors = train(root, tmp_path / "runs", capsys, "--data.invalid-annotations", "error")
    assert code == 2
    assert f"objects that cannot be read: 1 ({place}/0.xml: {reason}" in errors


def test_a_polygon_of_pascal_voc_that_cannot_be_read_leaves_its_box(tmp_path):
    """And objects without a polygon have none, rather than an empty one, beside those that have."""
    polygon = (
        "<polygon><x1>11</x1><y1>13</y1><x2>30</x2><y2>13</y2><x3>30</x3><y3>27</y3><x4>11</x4><y4>27</y4></polygon>"
    )
    drawn = voc_object("cat").replace("</object>", f"{polygon}</object>")
    root = write_voc(
        tmp_path, drawn + voc_object("dog"), drawn.replace("<y4>27</y4>", ""), drawn.replace("<x1>11", "<x1>x")
    )
    images, logged = read(root)
    assert boxes_of(images) == [[("cat", *BOX), ("dog", *BOX)], [("cat", *BOX)], [("cat", *BOX)]]
    assert images.mask_counts == (1, 3)
    place = root / "Annotations"
    assert logged == [
        "polygons or masks that cannot be used (the box is, if there is one): 2 ("
        f"{place}/1.xml object 1: an odd number of coordinates, "
        f"{place}/2.xml object 1: Invalid 'x1' value 'x' in Pascal VOC annotation.)"
    ]


@pytest.mark.parametrize("kind", ["dead link", "folder", "pipe"])
@pytest.mark.parametrize("only", [False, True])
def test_labels_that_are_no_file_are_no_image_without_objects(tmp_path, kind, only):
    root = write_yolo(tmp_path, "", *([] if only else ["1 0.5 0.5 0.25 0.5"]))
    labels = root / "labels" / "train" / "0.txt"
    labels.unlink()
    if kind == "dead link":
        labels.symlink_to("nothing")
    else:
        {"folder": os.mkdir, "pipe": os.mkfifo}[kind](labels)
    if only:
        assert f"{UNREADABLE}: 1 ({labels}" in refusal(root)
    else:
        images, logged = read(root)
        assert len(images) == 1
        assert [line.partition(":")[0] for line in logged] == [UNREADABLE]
        assert str(labels) in logged[0]


def test_labels_without_an_image_are_noted(tmp_path):
    label = "1 0.5 0.5 0.25 0.5"
    root = write_yolo(tmp_path, label, label, label)
    place = root / "labels" / "train"
    for name in ("classes.txt", ".hidden.txt", "1.json", "fff.txt"):
        (place / name).touch()
    (root / "images" / "train" / "fff.fff").touch()
    (root / "images" / "train" / "1.jpg").write_bytes(b"no image")
    assert not any("without an image" in line for line in read(root)[1])
    for name in ("77", "78", "79", "80"):
        (place / f"{name}.txt").write_text(label)
    want = f"labels without an image: 4 ({place}/77.txt, {place}/78.txt, {place}/79.txt, ...)"
    assert f"{root}/data.yaml: {want}" in read(root)[1]


# --- files that are not read


def test_what_is_not_read_of_yolo_is_counted_by_suffix(tmp_path):
    """Labels are read, whether they lie in a folder of their own or beside the images."""
    label = "1 0.5 0.5 0.25 0.5"
    root = write_yolo(tmp_path / "a", label, label)
    place = root / "images" / "train"
    for name in ("a.fff", "b.fff", "Thumbs.db", "0.txt", ".hidden", "x.tar.gz"):
        (place / name).touch()
    images, logged = read(root)
    assert len(images) == 2
    assert logged == [f"{root}/data.yaml: not read: 2 .fff, 1 .db, 1 .tar.gz, 1 .txt in {place}"]
    root = tmp_path / "b"
    root.mkdir()
    for name in ("0", "1"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / f"{name}.jpg")
        (root / f"{name}.txt").write_text(label)
    (root / "data.yaml").write_text("train: .\nnames: [cat, dog]\n")
    images, logged = read(root)
    assert [len(objects) for objects in objects_of(images)] == [1, 1]
    assert logged == []
    (root / "2.txt").write_text(label)
    (root / "3.kdc").touch()
    assert read(root)[1] == [f"{root}/data.yaml: not read: 1 .kdc, 1 .txt in {root}"]


def test_what_is_not_read_of_pascal_voc_is_counted_by_suffix(tmp_path):
    root = write_voc(tmp_path, voc_object("cat"), voc_object("cat"))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, name in (("train", 0), ("val", 1)):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
    for name in ("a.fff", "b.arw"):
        (root / "JPEGImages" / name).touch()
    logged: list[str] = []
    find_objects(str(root), log=logged.append)  # of two sets in one folder, once
    assert logged == [f"{root}/ImageSets/Main/train.txt: not read: 1 .arw, 1 .fff in {root}/JPEGImages"]


def test_images_of_other_formats_alone(tmp_path):
    root = write_yolo(tmp_path, "1 0.5 0.5 0.25 0.5")
    (root / "images" / "train" / "0.jpg").rename(root / "images" / "train" / "0.fff")
    assert refusal(root) == (
        f"{root}/data.yaml has no images that can be used: not read: 1 .fff in {root}/images/train"
    )


def test_a_set_of_which_nothing_can_be_used_is_one_line_that_names_every_reason(tmp_path):
    root = write_yolo(tmp_path, "0 30 15 20 30", "0 0.5 0.5")
    text = refusal(root)
    assert "has no objects that can be used: " in text
    assert PIXELS in text
    assert UNREADABLE in text


# --- images to evaluate on


def test_images_to_evaluate_on_of_which_no_object_can_be_used(tmp_path):
    root = write_coco(tmp_path / "train", [{}, {}, {}])
    other = write_coco(tmp_path / "val", [{"bbox": [0.1, 0.1, 0.3, 0.3]}])
    with pytest.raises(UserError, match="has no objects that can be used: boxes with coordinates from 0 to 1"):
        find_objects(str(root), str(other / "annotations" / "instances_train2017.json"), log=lambda line: None)
    edit(other, lambda c: c.update(annotations=[]))
    _, val = find_objects(str(root), str(other / "annotations" / "instances_train2017.json"), log=pytest.fail)
    assert np.array_equal(val.ids, [1, 2, 3])


# --- accidents


def refuse(number: int):
    def read(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    return read


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize(
    ("layout", "place"),
    [
        ("yolo", "itpn.system.text.read_bounded"),
        ("yolo", "itpn.data.layouts.read_size"),
        ("voc", "itpn.data.voc.read_bounded"),
        ("voc", "itpn.data.layouts.read_size"),
    ],
)
def test_annotations_on_a_lost_disk_are_not_corrupt(tmp_path, capsys, monkeypatch, layout, place, number):
    """A line that names the file, and exit code 1: nothing is left out, and no file is called corrupt."""
    if layout == "yolo":
        root = write_yolo(tmp_path / "a", "1 0.5 0.5 0.25 0.5")
        assert boxes_of(read(root)[0])
        if place == "itpn.system.text.read_bounded":  # the settings are read by it as well
            bounded = itpn.system.text.read_bounded

            def lost(path, *rest):
                return (refuse(number) if "labels" in str(path) else bounded)(path, *rest)

            monkeypatch.setattr(place, lost)
        else:
            monkeypatch.setattr(place, refuse(number))
    else:
        root = write_voc(tmp_path / "a", voc_object("cat"))
        monkeypatch.setattr(place, refuse(number))
    code, _, logged = train(root, tmp_path / "runs", capsys)
    assert code == 1
    assert re.search(rf"itpn: {root}/.*0\.(jpg|txt|xml) cannot be read: {os.strerror(number)}; ", logged), logged
    assert "left out" not in logged


# --- names


def test_a_yolo_set_of_several_folders(tmp_path):
    root = write_yolo(tmp_path, "1 0.5 0.5 0.25 0.5")
    for part in ("images", "labels"):
        (root / part / "more").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images" / "more" / "7.jpg")
    (root / "labels" / "more" / "7.txt").write_text("0 0.5 0.5 0.25 0.5")
    (root / "data.yaml").write_text("train: [images/train, images/more]\nval:\n- images/more\nnames: [cat, dog]\n")
    train, val = find_objects(str(root), log=pytest.fail)
    assert [row[0][0] for row in boxes_of(train)] == ["dog", "cat"]
    assert [row[0][0] for row in boxes_of(val)] == ["cat"]
    (root / "data.yaml").write_text("train: [images/train, images/none]\nnames: [cat, dog]\n")
    assert "names images in images/none, which is not a folder or list of images below" in refusal(root)
    (root / "data.yaml").write_text("train: [[images/train]]\nnames: [cat, dog]\n")
    assert "train and val must each be a folder, a list of images, or several of them" in refusal(root)


def test_a_yolo_set_of_listed_images(tmp_path):
    """As COCO is given in YOLO's form: paths relative to the list's folder or the set's, or absolute ones."""
    root = write_yolo(tmp_path, "1 0.5 0.5 0.25 0.5", "0 0.5 0.5 0.25 0.5", "1 0.5 0.5 0.25 0.5")
    (root / "lists").mkdir()
    listed = f"./images/train/0.jpg\r\n\r\nimages/train/0.jpg\r\n{root}/images/train/1.jpg\r\nimages\\train\\9.jpg\r\n"
    (root / "lists" / "train.txt").write_text(listed)
    (root / "val.txt").write_text("images/train/2.jpg")
    (root / "data.yaml").write_text("train: lists/train.txt\nval: val.txt\nnames: [cat, dog]\n")
    logged: list[str] = []
    train, val = find_objects(str(root), log=logged.append)
    assert [row[0][0] for row in boxes_of(train)] == ["dog", "cat"]
    assert [row[0][0] for row in boxes_of(val)] == ["dog"]
    assert "images not on disk: 1" in "\n".join(logged)
    (root / "lists" / "train.txt").write_text("images/train/8.jpg\nimages/train/9.jpg\n")
    assert "images not on disk" in refusal(root)


def test_half_characters_in_json(tmp_path, capsys):
    """Of a pair, as JSON may hold them: no file is called so, and every terminal takes the message."""
    root = write_coco(tmp_path / "a", [{}, {}, {}])
    edit(root, lambda c: c["images"][0].update(file_name="half \ud800.jpg"))
    images, logged = read(root)
    assert len(images) == 2
    assert logged == [f"images not on disk: 1 ({root}/train2017/half \\ud800.jpg)"]
    edit(root, lambda c: c["categories"][0].update(name="half \ud800"))
    code, _, logged = train(root, tmp_path / "runs", capsys)
    assert code == 0, logged


@pytest.mark.parametrize(
    "listed", ["my photo 1.jpg", "my photo 1", "my photo 1  -1", "my photo 1 1", "my photo 1.JPG 0"]
)
def test_lists_of_pascal_voc_name_images_in_any_form(tmp_path, listed):
    """With a suffix, with blanks, and with the 1, 0 or -1 that lists of a class have."""
    root = write_voc(tmp_path, voc_object("cat"), voc_object("cat"))
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (root / folder / f"0.{suffix}").rename(root / folder / f"my photo 1.{suffix}")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text(f"{listed}\n\n1\n")
    images, logged = read(root)
    assert logged == []
    assert [Path(images.name(i)).name for i in range(len(images))] == ["1.jpg", "my photo 1.jpg"]


def test_an_xml_of_another_form_is_no_image_without_objects(tmp_path):
    root = write_voc(tmp_path, *[voc_object("cat")] * 3, "")
    good = (root / "Annotations" / "0.xml").read_text()
    (root / "Annotations" / "1.xml").write_text(good.replace("<annotation>", '<annotation xmlns="http://x/y">'))
    (root / "Annotations" / "2.xml").write_text(f"<annotations>{good}</annotations>")
    images, logged = read(root)
    assert [Path(images.name(i)).stem for i in range(len(images))] == ["0", "3"]
    place = root / "Annotations"
    assert logged == [
        "images whose annotations cannot be read: 2 "
        f"({place}/1.xml: is of <{{http://x/y}}annotation>, not of <annotation>, "
        f"{place}/2.xml: is of <annotations>, not of <annotation>)"
    ]


def test_names_of_files_from_windows(tmp_path):
    root = write_coco(tmp_path, [{}, {}, {}])
    names = ("train2017\\1.jpg", ".\\2.jpg", "train2017/3.jpg")
    edit(root, lambda c: [one.update(file_name=name) for one, name in zip(c["images"], names, strict=True)])
    images, logged = read(root)
    assert logged == []
    assert [Path(images.name(i)).name for i in range(len(images))] == ["1.jpg", "2.jpg", "3.jpg"]
    (root / "train2017" / "a\\b.jpg").write_bytes((root / "train2017" / "1.jpg").read_bytes())
    edit(root, lambda c: c["images"][0].update(file_name="a\\b.jpg"))  # a name of its own elsewhere
    assert Path(read(root)[0].name(0)).name == "a\\b.jpg"
