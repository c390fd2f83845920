"""Images with objects: layouts, invalid annotations, boxes and masks through every augmentation."""

import copy
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as theirs
from pycocotools.coco import COCO
from stored_pixels import make_pixels

from itpn.data.annotations import find_objects, read_objects
from itpn.data.batches import collect
from itpn.data.decode import UnreadableImage, decode_image
from itpn.data.image_type import PHOTOGRAPHS
from itpn.data.loader import TrainingLoader
from itpn.data.objects import DetectionTransform, draw_masks, encode_mask, make_target
from itpn.data.pixels import resize_pixels
from itpn.data.scenes import CLASSES
from itpn.data.shapes import write_shapes
from itpn.errors import UserError


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The sample set: 12 images to train on and 6 others."""
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=6, img_size=(64, 80)).coco


@pytest.fixture
def root(shapes, tmp_path):
    """A copy of the sample set that tests may change."""
    return Path(shutil.copytree(shapes, tmp_path / "coco"))


def edit(root: Path, change, split: str = "train") -> None:
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def silent(line: str) -> None:
    pass


# --- layouts


def test_coco(shapes):
    train, val = find_objects(str(shapes))
    assert (len(train), len(val)) == (12, 6)
    assert train.classes == val.classes == CLASSES
    assert train.class_ids == (1, 2, 3, 4, 5, 6)
    truth = json.loads((shapes / "annotations" / "instances_train2017.json").read_text())
    name, data, annotation = train[3]
    assert name == str(shapes / "train2017" / truth["images"][3]["file_name"])
    assert data == Path(name).read_bytes()
    assert annotation["size"] == (64, 80)
    wanted = [a for a in truth["annotations"] if a["image_id"] == annotation["id"]]
    assert [o["bbox"] for o in annotation["objects"]] == [a["bbox"] for a in wanted]
    assert [train.classes[o["label"]] for o in annotation["objects"]] == [CLASSES[a["category_id"] - 1] for a in wanted]
    assert train.has_masks
    assert train.groups.tolist() == [1] * 12


def test_a_folder_for_each_set(shapes, tmp_path):
    """As Roboflow exports COCO's form."""
    for split, folder in (("train", "train"), ("val", "valid")):
        shutil.copytree(shapes / f"{split}2017", tmp_path / folder)
        name = f"instances_{split}2017.json"
        shutil.copy(shapes / "annotations" / name, tmp_path / folder / "_annotations.coco.json")
    train, val = find_objects(str(tmp_path))
    assert (len(train), len(val)) == (12, 6)
    assert Path(val.name(0)).parent == tmp_path / "valid"


def write_yolo(shapes: Path, root: Path, polygons: bool) -> None:
    root.mkdir()
    folders = {"train": "images/train", "val": "images/val", "names": dict(enumerate(CLASSES))}
    (root / "data.yaml").write_text(yaml.safe_dump(folders))
    for split in ("train", "val"):
        shutil.copytree(shapes / f"{split}2017", root / "images" / split)
        (root / "labels" / split).mkdir(parents=True)
        coco = json.loads((shapes / "annotations" / f"instances_{split}2017.json").read_text())
        for image in coco["images"]:
            height, width = image["height"], image["width"]
            lines = []
            for one in coco["annotations"]:
                if one["image_id"] != image["id"]:
                    continue
                x, y, w, h = one["bbox"]
                numbers = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
                if polygons:
                    corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
                    numbers = [v for cx, cy in corners for v in (cx / width, cy / height)]
                lines.append(" ".join([str(one["category_id"] - 1), *(f"{v:.6f}" for v in numbers)]))
            labels = root / "labels" / split / Path(image["file_name"]).with_suffix(".txt")
            labels.write_text("\n".join(lines))


def write_voc(shapes: Path, root: Path) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val"):
        coco = json.loads((shapes / "annotations" / f"instances_{split}2017.json").read_text())
        stems = []
        for image in coco["images"]:
            stem = f"{split}_{Path(image['file_name']).stem}"
            stems.append(stem)
            shutil.copy(shapes / f"{split}2017" / image["file_name"], root / "JPEGImages" / f"{stem}.jpg")
            objects = ""
            for number, one in enumerate(a for a in coco["annotations"] if a["image_id"] == image["id"]):
                x, y, w, h = one["bbox"]
                objects += (
                    f"<object><name>{CLASSES[one['category_id'] - 1]}</name><difficult>{int(number == 1)}</difficult>"
                    f"<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox>"
                    "</object>"
                )
            (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))


def boxes_of(images) -> list:
    found = []
    for index in range(len(images)):
        objects = images.objects_of(index)
        found.append(sorted((images.classes[o["label"]], *np.round(o["bbox"], 2).tolist()) for o in objects))
    return found


@pytest.mark.parametrize("polygons", [False, True])
def test_yolo(shapes, tmp_path, polygons):
    write_yolo(shapes, tmp_path / "yolo", polygons)
    ours, theirs_ = find_objects(str(tmp_path / "yolo"), log=pytest.fail), find_objects(str(shapes))
    for one, other in zip(ours, theirs_, strict=True):
        assert one.classes == other.classes
        for box, wanted in zip(boxes_of(one), boxes_of(other), strict=True):
            assert [row[0] for row in box] == [row[0] for row in wanted]
            np.testing.assert_allclose([r[1:] for r in box], [r[1:] for r in wanted], atol=0.02)
        assert one.has_masks is polygons
    if polygons:
        _, _, annotation = ours[0][0]
        target = make_target(annotation, masks=True)
        for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].round().int().tolist(), strict=True):
            assert mask[y0:y1, x0:x1].float().mean() > 0.98  # a rectangle, but for how its edge is drawn


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({str(i): f"name {i}" for i in range(12)}, "name 2"),  # quoted, of which '10' comes before '2'
        ({2: "b", 9: "c", 0: "a"}, "b"),
        ([f"name {i}" for i in range(6)], "name 2"),
    ],
)
def test_names_of_yolo_belong_to_their_numbers(shapes, tmp_path, names, expected):
    write_yolo(shapes, tmp_path / "yolo", False)
    file = tmp_path / "yolo" / "data.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "names": names}))
    for labels in (tmp_path / "yolo" / "labels" / "train").iterdir():
        labels.write_text("2 0.5 0.5 0.2 0.2")
    train = read_objects(str(tmp_path / "yolo"), "train", log=pytest.fail)
    assert {train.classes[o["label"]] for i in range(len(train)) for o in train.objects_of(i)} == {expected}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": None}, None),
        ({"train": 5}, "names images in 5, which is not a folder or list of images"),
        ({"names": "disk"}, "is not YOLO's: it needs names, train and val"),
        ({"names": {"disk": 1}}, "is not YOLO's: it needs names, train and val"),
    ],
)
def test_settings_of_yolo(shapes, tmp_path, change, words):
    write_yolo(shapes, tmp_path / "yolo", False)
    file = tmp_path / "yolo" / "data.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    if words is None:
        assert len(read_objects(str(tmp_path / "yolo"), "train", log=pytest.fail)) == 12
    else:
        with pytest.raises(UserError, match=words):
            read_objects(str(tmp_path / "yolo"), "train", log=pytest.fail)


def test_json_files_in_place_of_folders(root, shapes):
    notes = root / "annotations"
    train, val = find_objects(str(notes / "instances_train2017.json"), str(notes / "instances_val2017.json"))
    assert (len(train), len(val)) == (12, 6)
    assert Path(train.name(0)).parent == root / "train2017"
    assert find_objects(str(notes / "instances_train2017.json"))[1] is None  # not the same images once more


def test_images_of_the_test_server(root):
    """They come without annotations, in a file of their own."""
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    del content["annotations"]
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").unlink()
    (root / "val2017").rename(root / "test2017")
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content))
    images = read_objects(str(root), "val", log=pytest.fail)
    assert len(images) == 6
    assert not any(images.objects_of(index) for index in range(6))
    assert images.classes == CLASSES
    with pytest.raises(UserError, match="no annotations to train on"):
        read_objects(str(root), "train")


def test_sizes_of_objects_without_an_area(root, shapes):
    """Areas are those of the masks, by which COCO's metrics class objects as small or large."""
    edit(root, lambda c: [one.pop("area") for one in c["annotations"]])
    ours, theirs_ = (read_objects(str(folder), "train", log=pytest.fail) for folder in (root, shapes))
    for index in range(len(ours)):
        for one, other in zip(ours.objects_of(index), theirs_.objects_of(index), strict=True):
            assert one["area"] == pytest.approx(other["area"], rel=0.25)  # of polygons, it is not of whole pixels
            assert one["area"] < one["bbox"][2] * one["bbox"][3] or one["label"] == CLASSES.index("square")


def test_pascal_voc(shapes, tmp_path):
    write_voc(shapes, tmp_path)
    train, val = find_objects(str(tmp_path), log=pytest.fail)
    assert train.classes == tuple(sorted(CLASSES))
    for one, other in zip((train, val), find_objects(str(shapes)), strict=True):
        assert boxes_of(one) == boxes_of(other)
    second = [objects[1]["iscrowd"] for i in range(12) if len(objects := train.objects_of(i)) > 1]
    assert second == [1] * len(second)  # difficult objects are ignored


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_annotations_in_any_form_of_utf_8(root, shapes, tmp_path, encoding):
    """As Windows' editors save them."""
    write_yolo(shapes, tmp_path / "yolo", False)
    write_voc(shapes, tmp_path / "voc")
    texts = [*(tmp_path / "yolo").rglob("*.txt"), tmp_path / "yolo" / "data.yaml"]
    texts += [*(tmp_path / "voc" / "ImageSets").rglob("*.txt"), *(root / "annotations").glob("*.json")]
    for path in texts:
        path.write_bytes((path.read_text().replace("\n", "\r\n") + "\r\n\r\n").encode(encoding))
    for path in [*(tmp_path / "voc" / "Annotations").iterdir()][::2]:
        path.rename(path.with_suffix(".XML"))
    for path in (root / "annotations").glob("*.json"):
        path.rename(path.with_suffix(".JSON"))
    want = [boxes_of(images) for images in find_objects(str(shapes))]
    for place in (root, tmp_path / "yolo", tmp_path / "voc"):
        assert [boxes_of(images) for images in find_objects(str(place), log=pytest.fail)] == want
    assert len(read_objects(str(root / "annotations" / "instances_val2017.JSON"), "val", log=pytest.fail)) == 6


def test_annotations_in_latin_1(root, shapes, tmp_path):
    write_yolo(shapes, tmp_path / "yolo", False)
    write_voc(shapes, tmp_path / "voc")
    for path, place in (
        (root / "annotations" / "instances_train2017.json", root),
        (tmp_path / "yolo" / "data.yaml", tmp_path / "yolo"),
        (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt", tmp_path / "voc"),
    ):
        path.write_bytes(path.read_bytes() + "\n# café".encode("latin-1"))
        with pytest.raises(UserError, match=rf"{path.name} is not text in UTF-8 \(byte 0xe9 in line \d+\)"):
            find_objects(str(place))
    labels = next((tmp_path / "voc" / "Annotations").iterdir())
    head = '<?xml version="1.0" encoding="ISO-8859-1"?>'
    labels.write_bytes((head + labels.read_text().replace("</annotation>", "<a>é</a></annotation>")).encode("latin-1"))
    (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt").write_text(labels.stem)
    assert len(read_objects(str(tmp_path / "voc"), "train", log=pytest.fail)) == 1  # it names its encoding


def test_names_of_sets_in_other_spellings(shapes, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(shapes / f"{split}2017", tmp_path / f"{split.title()}_Images")
        shutil.copy(shapes / "annotations" / f"instances_{split}2017.json", tmp_path / f"{split.title()}_Images")
    assert [len(images) for images in find_objects(str(tmp_path))] == [12, 6]


def test_formats_need_their_package(shapes, tmp_path, monkeypatch):
    write_voc(shapes, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "supervision.dataset.formats.pascal_voc", None)
    with pytest.raises(UserError, match=r"needs supervision: pip install 'itpn\[formats\]'"):
        find_objects(str(tmp_path))


# --- invalid annotations


def first(content) -> dict:
    return content["annotations"][0]


INVALID = {
    "boxes of no area": lambda c: first(c).update(bbox=[3, 4, 0, 5], segmentation=[]),
    "boxes outside their image": lambda c: first(c).update(bbox=[200, 4, 5, 5]),
    "boxes partly outside their image, which were clipped": lambda c: first(c).update(bbox=[70, 4, 50, 5]),
    "objects whose box is not four numbers": lambda c: first(c).update(bbox=[1, 2, float("nan"), 3], segmentation=[]),
    "objects of an unknown class": lambda c: first(c).update(category_id=77),
    "objects of an image that is not listed": lambda c: first(c).update(image_id=777),
    "objects of an image that is not listed: 1 (annotation 1 of image [1])": lambda c: first(c).update(image_id=[1]),
    "images whose id is neither a whole number nor text: 1 (1180591620717411303424": lambda c: c["images"][0].update(
        id=2**70
    ),
    "images of more pixels than --data.max-pixels": lambda c: c["images"][0].update(height=10**12),
    "objects whose iscrowd is neither 0 nor 1": lambda c: first(c).update(iscrowd=2),
    "objects without image_id or category_id": lambda c: first(c).pop("category_id"),
    "images not on disk": lambda c: c["images"][0].update(file_name="nowhere.jpg"),
    "images that are listed twice": lambda c: c["images"].__setitem__(1, c["images"][0]),
    "images without height or width in whole pixels": lambda c: c["images"][0].pop("height"),
    "images without id or file_name": lambda c: c["images"][0].pop("file_name"),
    "images whose id is neither a whole number nor text": lambda c: c["images"][0].update(id=[1]),
}


@pytest.mark.parametrize("kind", INVALID)
def test_each_invalid_annotation_is_found_named_and_left_out(root, kind):
    edit(root, INVALID[kind])
    logged: list[str] = []
    train = read_objects(str(root), "train", "summary", logged.append)
    assert any(line.strip().startswith(kind if "(" in kind else f"{kind}: 1 (") for line in logged), logged
    whole = read_objects(str(root), "val", "summary", pytest.fail)
    assert len(whole) == 6
    clipped = "clipped" in kind
    assert len(train) == (11 if kind.startswith("images") else 12)
    count = sum(len(train.objects_of(i)) for i in range(len(train)))
    truth = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    assert clipped == (count == len(truth["annotations"]))
    for index in range(len(train)):
        height, width = train.sizes[index]
        for one in train.objects_of(index):
            x, y, w, h = one["bbox"]
            assert w > 0 < h
            assert x >= 0 <= y
            assert x + w <= width
            assert y + h <= height
    with pytest.raises(UserError, match=re.escape(kind)) as error:
        read_objects(str(root), "train", "error", pytest.fail)
    assert "\n" not in str(error.value)
    logged = []
    read_objects(str(root), "train", "skip", logged.append)
    assert len(logged) == 1
    assert "left out (--data.invalid-annotations summary shows" in logged[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(annotations=[]), "has no objects"),
        (lambda c: c.update(images=[]), "has no images that can be used"),
        (lambda c: c.update(images=[], annotations=[]), "has no images"),
        (lambda c: c.update(categories=[]), "has no classes"),
        (lambda c: c["categories"][1].update(name=None), "has categories without id or name"),
        (lambda c: [i.update(file_name="x" * 5000) for i in c["images"]], "images not on disk: 12"),
        (lambda c: c.pop("categories"), "is not in COCO's form: it needs lists of images, annotations and categories"),
        (lambda c: c["categories"][1].update(id=1), "has two categories of id 1"),
        (lambda c: c["categories"][1].update(name="disk"), "has two categories of name disk"),
        (lambda c: c["categories"][1].pop("name"), "has categories without id or name"),
        (lambda c: c["categories"][1].update(id="x"), "has categories without id or name|are no whole numbers"),
        (lambda c: [i.update(file_name="no.jpg") for i in c["images"]], "images not on disk: 12"),
    ],
)
def test_annotations_of_no_use(root, change, words):
    edit(root, change)
    with pytest.raises(UserError, match=words) as error:
        find_objects(str(root), log=silent)
    assert "\n" not in str(error.value)


def test_what_is_no_set(root, tmp_path):
    (root / "annotations" / "instances_train2017.json").write_text("[" * 100000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        find_objects(str(root))
    (root / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        find_objects(str(root))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no annotations to train on in .*: give a folder of COCO's"):
        find_objects(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="does not exist"):
        find_objects(str(tmp_path / "nowhere"))


def test_gaps_in_the_classes_and_classes_of_one_set(root):
    def gap(content):
        for one in content["categories"]:
            one["id"] *= 10
        for one in content["annotations"]:
            one["category_id"] *= 10

    edit(root, gap)
    edit(root, gap, "val")
    train, val = find_objects(str(root), log=pytest.fail)
    assert train.class_ids == val.class_ids == (10, 20, 30, 40, 50, 60)
    assert {o["label"] for i in range(12) for o in train.objects_of(i)} == set(range(6))

    def add(content):
        content["categories"].append({"id": 7, "name": "blob"})

    edit(root, add, "val")
    find_objects(str(root), log=pytest.fail)  # listed alone, it does no harm
    edit(root, lambda c: first(c).update(category_id=7), "val")
    with pytest.raises(UserError, match="class blob of the images to evaluate on is not among those to train on"):
        find_objects(str(root))


def test_a_corrupt_file_of_labels(shapes, tmp_path):
    write_yolo(shapes, tmp_path / "yolo", False)
    files = sorted((tmp_path / "yolo" / "labels" / "train").iterdir())
    files[0].write_text("0 0.5 0.5 0.1 0.1\n0 0.5 0.5 nonsense 0.1")
    files[1].unlink()
    (tmp_path / "yolo" / "images" / "train" / "extra.jpg").write_bytes(b"no image")
    logged: list[str] = []
    train = read_objects(str(tmp_path / "yolo"), "train", "summary", logged.append)
    assert len(train) == 12
    assert [o["label"] for o in train.objects_of(0)] == [0]  # the other line of the file
    assert not train.objects_of(1)  # an image without a file has no objects
    text = " ".join(logged)
    assert f"objects that cannot be read: 1 ({files[0]}: line 2: could not convert" in text
    assert "images that cannot be read: 1" in text


def test_lines_of_labels_are_named(shapes, tmp_path):
    write_yolo(shapes, tmp_path / "yolo", False)
    file = sorted((tmp_path / "yolo" / "labels" / "train").iterdir())[0]
    file.write_text("0 0.5 0.5 0.2 0.2\n\n77 0.5 0.5 0.2 0.2\n1 5 5 2 2")
    logged: list[str] = []
    train = read_objects(str(tmp_path / "yolo"), "train", "summary", logged.append)
    assert len(train.objects_of(0)) == 1
    assert any(f"unknown class: 1 ({file} line 3: class 77)" in line for line in logged), logged
    assert any(
        f"which look like pixels: divide them by the image's width and height: 1 ({file} line 4)" in s for s in logged
    )
    shutil.rmtree(tmp_path / "yolo" / "labels")
    with pytest.raises(UserError, match=r"but no labels: .*000000000001\.txt does not exist"):
        read_objects(str(tmp_path / "yolo"), "train")


def test_objects_without_a_mask(root):
    """Stay: boxes are learned from all, masks from the others."""
    edit(root, lambda c: [one.pop("segmentation") for one in c["annotations"][1:]])
    train = read_objects(str(root), "train", log=pytest.fail)
    count = sum(len(train.objects_of(i)) for i in range(len(train)))
    assert train.mask_counts == (1, count - 1)
    assert train.has_masks
    rest = train.with_masks()
    assert rest.mask_counts == (1, 0)
    assert len(rest) == 12
    assert len(rest.with_objects()) == 1


def test_images_of_another_size_than_pascal_voc_says(shapes, tmp_path):
    write_voc(shapes, tmp_path)
    path = sorted((tmp_path / "Annotations").glob("train*.xml"))[0]
    text = path.read_text()
    path.write_text(text.replace("<annotation>", "<annotation><size><width>160</width><height>128</height></size>"))
    logged: list[str] = []
    assert len(read_objects(str(tmp_path), "train", "summary", logged.append)) == 11
    assert any("is of 160x128 pixels, the image of 80x64" in line for line in logged)
    path.write_text(text.replace("<annotation>", "<annotation><size><width>80</width><height>64</height></size>"))
    (tmp_path / "ImageSets" / "Main" / "train.txt").rename(tmp_path / "ImageSets" / "Main" / "trainval.txt")
    assert len(read_objects(str(tmp_path), "train", log=pytest.fail)) == 12


# --- masks


def test_masks_in_all_forms_are_those_of_pycocotools(shapes):
    """Polygons, run lengths and compressed run lengths, of every object of the sample set."""
    coco = COCO(str(shapes / "annotations" / "instances_train2017.json"))
    forms = set()
    for one in coco.dataset["annotations"]:
        wanted = coco.annToMask(one)
        compressed = theirs.encode(np.asfortranarray(wanted))
        plain = {"size": [64, 80], "counts": run_lengths(wanted)}
        compressed["counts"] = compressed["counts"].decode()
        for segmentation in (one["segmentation"], plain, compressed):
            assert np.array_equal(draw_masks([{"segmentation": segmentation}], 64, 80)[0].numpy(), wanted)
        forms.add(type(one["segmentation"]))
    assert forms == {list, dict}


def run_lengths(mask) -> list[int]:
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


def test_masks_of_another_image():
    for segmentation in ({"size": [3, 4], "counts": [12]}, {"size": [4, 4], "counts": [3, 4]}, [[1, 2, 3, 4]], []):
        with pytest.raises(ValueError, match=r"run lengths|polygons of three"):
            encode_mask(segmentation, 4, 4)


def test_crowds_are_no_targets(shapes):
    _, _, annotation = find_objects(str(shapes))[0][0]
    annotation = copy.deepcopy(annotation)
    count = len(annotation["objects"])
    annotation["objects"][0]["iscrowd"] = 1
    assert len(make_target(annotation, masks=True)["labels"]) == count - 1
    for one in annotation["objects"]:
        one["iscrowd"] = 1
    target = make_target(annotation, masks=True)
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 64, 80)


# --- augmentation


def paint(masks) -> np.ndarray:
    """An image in which object n has colour n + 1."""
    image = np.zeros((*masks.shape[1:], 3), np.uint8)
    for number, mask in enumerate(masks.numpy(), start=1):
        image[mask > 0] = (40 * number, 255 - 40 * number, 10 * number)
    return image


TRANSFORMS = {
    "scales": {"crop_prob": 0.0},
    "crops": {"crop_prob": 1.0},
    "flips": {"crop_prob": 0.0, "hflip": 1.0, "scales": (1.0, 1.0)},
    "jitter": {"large_scale_jitter": (0.3, 2.0)},
    "turns": {"crop_prob": 0.0, "rotate90": True},
    "all": {"rotate90": True},
}


@pytest.mark.parametrize("which", TRANSFORMS)
def test_boxes_and_masks_go_where_the_pixels_go(shapes, which):
    """The masks painted as an image, through the same transform: colours are still under the masks."""
    train, _ = find_objects(str(shapes))
    transform = DetectionTransform(128, 213, interpolation="bilinear", **TRANSFORMS[which])
    objects, sizes = 0, set()
    for index in range(12):
        _, _, annotation = train[index]
        painted = torch.from_numpy(paint(make_target(annotation, masks=True)["masks"])).permute(2, 0, 1)
        numbered = copy.deepcopy(annotation)
        for number, one in enumerate(numbered["objects"]):
            one["label"] = number  # so that the target says which object it was
        for seed in range(4):
            view = transform(painted, random.Random(seed), numbered)
            image, target = view["image"], view["target"]
            sizes.add(tuple(image.shape[1:]))
            height, width = image.shape[1:]
            assert max(height, width) <= 213
            assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
            for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
                objects += 1
                x0, y0, x1, y1 = box.tolist()
                assert 0 <= x0 < x1 <= width
                assert 0 <= y0 < y1 <= height
                rows, cols = (mask.any(dim=dim).nonzero().flatten() for dim in (1, 0))
                # the mask fills its box, to a pixel; a crop may have taken the part that reached the box's side
                assert cols[0] >= x0 - 1.5
                assert cols[-1] <= x1 + 0.5
                assert rows[0] >= y0 - 1.5
                assert rows[-1] <= y1 + 0.5
                if which in ("scales", "flips", "turns"):
                    assert abs(cols[0] - x0) < 2.5
                    assert abs(cols[-1] + 1 - x1) < 2.5
                    assert abs(rows[0] - y0) < 2.5
                    assert abs(rows[-1] + 1 - y1) < 2.5
                colour = torch.tensor([40.0 * label, 255 - 40 * label, 10 * label])
                inner = torch.nn.functional.avg_pool2d(mask[None].float(), 3, 1, 1)[0] > 0.99  # edges are blended
                if inner.sum() > 20:
                    near = (image[:, inner].float() - colour[:, None]).abs().amax(dim=0) < 30
                    assert near.float().mean() > 0.85
    assert objects > 50
    assert len(sizes) >= (1 if which == "flips" else 3)
    same = [transform(painted, random.Random(7), numbered)["image"] for _ in range(2)]
    assert torch.equal(*same)


def test_turns_are_all_four_each_with_its_boxes():
    """A mark in the upper left: an object and its box are found in each corner."""
    mark = [[2, 3, 12, 3, 12, 9, 2, 9]]
    one = {"bbox": [2, 3, 10, 6], "label": 0, "area": 60, "iscrowd": 0, "segmentation": mark}
    annotation, image = {"id": 1, "size": (40, 60), "objects": [one]}, torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 3:9, 2:12] = 200
    transform = DetectionTransform(40, 60, (1.0, 1.0), 0.0, hflip=0.0, rotate90=True)
    found = {}
    for seed in range(20):
        view = transform(image, random.Random(seed), annotation)
        target, pixels = view["target"], view["image"]
        box = target["boxes"][0].tolist()
        found[tuple(box)] = tuple(pixels.shape[1:])
        x0, y0, x1, y1 = map(int, box)
        wanted = torch.zeros(pixels.shape[1:], dtype=torch.bool)
        wanted[y0:y1, x0:x1] = True
        assert torch.equal(pixels[0] == 200, wanted)
        assert torch.equal(target["masks"][0] > 0, wanted)
    assert found == {
        (2, 3, 12, 9): (40, 60),
        (3, 48, 9, 58): (60, 40),
        (48, 31, 58, 37): (40, 60),
        (31, 2, 37, 12): (60, 40),
    }


@pytest.mark.parametrize("options", [{}, {"large_scale_jitter": (0.3, 2.0)}, {"rotate90": True}])
def test_images_of_any_channels_go_where_photographs_go(shapes, options):
    """Of seven bands with a corner without data: the objects are those of a photograph with the same seed."""
    train, _ = find_objects(str(shapes))
    bands = make_pixels(7, torch.int16, (0,), (10_000,), (500,), nodata=-1)
    annotation = train[0][2]
    photograph = torch.zeros(3, 64, 80, dtype=torch.uint8)
    image = torch.arange(64 * 80, dtype=torch.int16).reshape(1, 64, 80).expand(7, -1, -1).clone()
    image[:, :20, :20] = -1
    for seed in range(10):
        ours, theirs = (
            DetectionTransform(128, 213, pixels=pixels, **options)(one, random.Random(seed), annotation)
            for one, pixels in ((image, bands), (photograph, PHOTOGRAPHS))
        )
        assert ours["image"].dtype == torch.int16
        assert ours["image"].shape == (7, *theirs["image"].shape[1:])
        assert all(torch.equal(value, theirs["target"][name]) for name, value in ours["target"].items())
        assert ours["image"].min() >= -1
    plain = DetectionTransform(128, 213, (1.0, 1.0), 0.0, hflip=1.0, pixels=bands)
    changed = replace(plain, channel_jitter=0.4, channel_drop=0.3)
    view, other = (one(image, random.Random(1), annotation)["image"] for one in (plain, changed))
    assert torch.equal(view, resize_pixels(image, (128, 160), "bilinear", -1).flip(-1))
    assert torch.equal(view == -1, other == -1)
    assert (view == -1).any()
    assert not torch.equal(view, other)


def test_short_sides_are_the_published_ones():
    """480 to 800 in steps of 32, the longest at most 1333."""
    transform = DetectionTransform(crop_prob=0.0, masks=False)
    annotation = {"id": 1, "size": (60, 80), "objects": []}
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    short = {min(transform(image, random.Random(seed), annotation)["image"].shape[1:]) for seed in range(300)}
    assert sorted(short) == list(range(480, 801, 32))
    annotation["size"], image = (60, 200), torch.zeros(3, 60, 200, dtype=torch.uint8)
    shapes = {tuple(transform(image, random.Random(seed), annotation)["image"].shape[1:]) for seed in range(30)}
    assert {shape[1] for shape in shapes} == {1333}
    # what is cropped has been resized to 400, 500 or 600 px however long the other side is
    cropped = DetectionTransform(crop_prob=1.0, scales=(1.0, 1.0), masks=False)
    ramp = torch.linspace(0, 255, 4000).expand(3, 100, 4000).to(torch.uint8)
    annotation["size"] = (100, 4000)
    views = [cropped(ramp, random.Random(seed), annotation)["image"].float() for seed in range(9)]
    for view in views:  # 384 to 600 of 16,000 to 24,000 columns
        assert 255 * 380 / 24000 < view.amax() - view.amin() + 1 < 255 * 604 / 16000 + 3
    annotation["size"], image = (600, 800), torch.zeros(3, 600, 800, dtype=torch.uint8)
    assert {min(cropped(image, random.Random(seed), annotation)["image"].shape[1:]) for seed in range(9)} == {800}


def test_an_image_of_another_size_than_its_annotations(root):
    name = root / "train2017" / "000000000001.jpg"
    Image.open(name).resize((40, 30)).save(name)
    train, _ = find_objects(str(root))
    transform = DetectionTransform(64, 106)
    turned = torch.zeros(3, 80, 64, dtype=torch.uint8)
    with pytest.raises(UnreadableImage, match="; if EXIF rotates the image, they must be of the rotated one"):
        transform(turned, random.Random(0), train[0][2])
    with pytest.raises(UnreadableImage, match="40x30 pixels, and 80x64 in the annotations"):
        transform(decode_image(name.read_bytes()), random.Random(0), train[0][2])
    loader = TrainingLoader(train, transform, batch_size=4, num_workers=0, seed=0, collate=collect)
    corrupt = [name for batch in loader for name, _ in batch["corrupt"]]
    assert corrupt == [str(name)]


def test_batches_are_of_one_shape(shapes, tmp_path):
    """Wide images with wide ones and high ones with high ones, on all processes, each once."""
    tall = write_shapes(tmp_path, train=9, val=6, img_size=(80, 64)).coco
    both = tmp_path / "both"
    (both / "train2017").mkdir(parents=True)
    (both / "annotations").mkdir()
    joined: dict = {"images": [], "annotations": []}
    for number, source in enumerate((shapes, tall)):
        coco = json.loads((source / "annotations" / "instances_train2017.json").read_text())
        joined["categories"] = coco["categories"]
        for image in coco["images"]:
            name = f"{number}_{image['file_name']}"
            shutil.copy(source / "train2017" / image["file_name"], both / "train2017" / name)
            joined["images"].append({**image, "file_name": name, "id": 100 * number + image["id"]})
        for one in coco["annotations"]:
            own = {"id": len(joined["annotations"]), "image_id": 100 * number + one["image_id"]}
            joined["annotations"].append({**one, **own})
    (both / "annotations" / "instances_train2017.json").write_text(json.dumps(joined))
    train, val = find_objects(str(both))
    assert val is None
    assert sorted(train.groups.tolist()) == [0] * 9 + [1] * 12
    transform = DetectionTransform(64, 106, crop_prob=0.0)
    loaders = [
        TrainingLoader(train, transform, batch_size=2, num_workers=0, seed=1, rank=rank, world_size=2, collate=collect)
        for rank in range(2)
    ]
    for _ in range(2):  # epochs
        keys, mixed = [], 0
        for batches in zip(*loaders, strict=True):
            wide = {image.shape[2] > image.shape[1] for batch in batches for image in batch["image"]}
            mixed += len(wide) > 1
            keys += [key for batch in batches for key in batch["key"]]
        assert len(keys) == len(set(keys)) == 20
        assert mixed <= 1  # what was left over of both
