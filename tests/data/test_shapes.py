import contextlib
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from torchvision.datasets import ImageFolder

from itpn.data.scenes import CLASSES, GROUNDS, draw_scene
from itpn.data.shapes import _polygons, _run_lengths, write_shapes
from itpn.errors import UserError

SIZE = (64, 96)
COUNTS = {"train": 40, "val": 12}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), **COUNTS, img_size=SIZE, seed=3)


def hashes(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_scene_depends_on_its_arguments_alone():
    scene = draw_scene(0, "train", 5)
    draw_scene(0, "train", 4)
    assert np.array_equal(scene.image, draw_scene(0, "train", 5).image)
    for other in ((1, "train", 5), (0, "val", 5), (0, "train", 6)):
        assert not np.array_equal(scene.image, draw_scene(*other).image)


@pytest.mark.parametrize("size", [32, 96, (48, 80), (200, 120)])
def test_masks_boxes_and_labels_agree(size):
    height, width = (size, size) if isinstance(size, int) else size
    for index in range(30):
        scene = draw_scene(0, "train", index, img_size=size)
        assert scene.image.shape == (height, width, 3)
        assert scene.image.dtype == np.uint8
        assert 1 <= len(scene.instances) <= 5
        assert scene.instances[0].category == CLASSES[index % len(CLASSES)]
        assert np.sum([i.mask for i in scene.instances], axis=0).max() == 1  # a pixel shows one shape
        shown = np.zeros((height, width), int)
        for instance in scene.instances:
            x0, y0, x1, y1 = instance.box
            inside = instance.mask[y0:y1, x0:x1]
            assert inside.sum() == instance.mask.sum() > 0
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            shown[instance.mask] = 1 + len(GROUNDS) + CLASSES.index(instance.category)
        assert np.array_equal(np.where(shown, shown, scene.ground), scene.labels)
        assert scene.ground.max() <= len(GROUNDS)


def test_another_size_shows_the_same_scene():
    small = draw_scene(0, "val", 7, img_size=64, category="star")
    large = draw_scene(0, "val", 7, img_size=128, category="star")
    resized = np.asarray(Image.fromarray(large.image).resize((64, 64), Image.Resampling.BOX))
    assert np.abs(small.image.astype(int) - resized).mean() < 8
    assert np.allclose(np.array(small.instances[0].box) * 2, large.instances[0].box, atol=3)


def test_a_category_gives_one_shape_of_good_size():
    for index in range(24):
        category = CLASSES[index % len(CLASSES)]
        (instance,) = draw_scene(0, "val", index, category=category).instances
        assert instance.category == category
        assert instance.mask.mean() > 0.015


def test_colour_does_not_tell_the_class():
    """The nearest mean colour of a class must guess little better than chance, 1 in 6."""
    labels = np.arange(480) % len(CLASSES)
    colours = np.array(
        [draw_scene(0, "train", i, img_size=32, category=CLASSES[c]).image.mean((0, 1)) for i, c in enumerate(labels)]
    )
    means = np.array([colours[:240][labels[:240] == c].mean(0) for c in range(len(CLASSES))])
    guesses = ((colours[240:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guesses == labels[240:]).mean() < 0.3


def test_image_folder(folders):
    for split, count in COUNTS.items():
        dataset = ImageFolder(folders.imagefolder / split)
        assert dataset.classes == sorted(CLASSES)
        assert len(dataset) == count
        assert dataset[0][0].size == (SIZE[1], SIZE[0])


def test_coco_masks_are_the_drawn_ones(folders):
    kinds = set()
    for split, count in COUNTS.items():
        coco = load_coco(folders.coco / "annotations" / f"instances_{split}2017.json")
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
        assert len(coco.imgs) == count
        assert {a["category_id"] for a in coco.anns.values()} == set(coco.cats)
        for index, image_id in enumerate(sorted(coco.imgs)):
            image = coco.imgs[image_id]
            with Image.open(folders.coco / f"{split}2017" / image["file_name"]) as image_file:
                assert image_file.size == (image["width"], image["height"]) == (SIZE[1], SIZE[0])
            scene = draw_scene(3, split, index, img_size=SIZE)
            annotations = coco.loadAnns(coco.getAnnIds(image_id))
            for instance, annotation in zip(scene.instances, annotations, strict=True):
                mask = coco.annToMask(annotation).astype(bool)
                assert np.array_equal(mask, instance.mask)
                assert annotation["area"] == mask.sum()
                x, y, width, height = annotation["bbox"]
                assert (x, y, x + width, y + height) == instance.box
                assert annotation["category_id"] == 1 + CLASSES.index(instance.category)
                kinds.add(type(annotation["segmentation"]))
    assert kinds == {list, dict}  # readers meet polygons and run lengths


def test_polygons_and_run_lengths_of_any_mask_are_exact():
    """Specks, corner contacts, holes, borders: all that occlusion can leave."""
    rng = np.random.default_rng(0)
    coco = COCO()
    coco.imgs = {1: {"height": 9, "width": 7}}
    with_polygons = 0
    for density in (0.1, 0.2, 0.3, 0.5, 0.9):
        for _ in range(60):
            mask = rng.random((9, 7)) < density
            mask[4, 3] = True
            forms = [form for form in (_polygons(mask), _run_lengths(mask)) if form]
            with_polygons += len(forms) == 2
            for form in forms:
                assert np.array_equal(coco.annToMask({"image_id": 1, "segmentation": form}), mask)
    assert with_polygons > 60
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    assert _polygons(ring) is None


def test_ade20k_labels_are_the_scene(folders):
    assert (folders.ade20k / "classes.txt").read_text().split() == [*GROUNDS, *CLASSES]
    found = set()
    for split, folder in (("train", "training"), ("val", "validation")):
        images = sorted((folders.ade20k / "images" / folder).iterdir())
        annotations = sorted((folders.ade20k / "annotations" / folder).iterdir())
        assert [p.stem for p in images] == [p.stem for p in annotations]
        assert len(images) == COUNTS[split]
        for index, path in enumerate(annotations):
            with Image.open(path) as image_file:
                assert image_file.mode == "L"
                labels = np.asarray(image_file)
            assert np.array_equal(labels, draw_scene(3, split, index, img_size=SIZE).labels)
            found |= set(np.unique(labels).tolist())
    assert found == set(range(1 + len(GROUNDS) + len(CLASSES)))


def test_same_arguments_same_bytes(tmp_path):
    for name, counts in (("a", (6, 6)), ("b", (6, 6)), ("more", (9, 6))):
        write_shapes(tmp_path / name, train=counts[0], val=counts[1], img_size=32)
    a, b, more = (hashes(tmp_path / name) for name in ("a", "b", "more"))
    assert a == b
    own = {name for name in a if name.endswith((".jpg", ".png"))}
    assert len(own) == 4 * 12
    assert all(a[name] == more[name] for name in own)
    write_shapes(tmp_path / "seed", train=6, val=6, img_size=32, seed=1)
    seed = hashes(tmp_path / "seed")
    assert all(a[name] != seed[name] for name in own)


def test_a_complete_set_is_kept_and_an_incomplete_one_mended(tmp_path):
    arguments = {"train": 6, "val": 6, "img_size": 32}
    folders = write_shapes(tmp_path, **arguments)
    whole = hashes(tmp_path)
    image = folders.imagefolder / "val" / "ring" / "0000.jpg"
    image.write_bytes(b"mine")
    assert write_shapes(tmp_path, **arguments) == folders
    assert image.read_bytes() == b"mine"  # complete: nothing is written

    (folders.ade20k / "classes.txt").unlink()
    stranger = folders.coco / "notes.txt"
    stranger.write_text("mine")
    write_shapes(tmp_path, **arguments)
    assert stranger.read_text() == "mine"
    stranger.unlink()
    assert hashes(tmp_path) == whole

    marker = tmp_path / "shapes.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "complete": False}))  # an interrupted run
    image.unlink()
    write_shapes(tmp_path, **arguments)
    assert hashes(tmp_path) == whole


def test_an_interrupted_run_resumes(tmp_path, monkeypatch):
    calls = []

    def break_off(*args, **kwargs):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return draw_scene(*args, **kwargs)

    arguments = {"train": 6, "val": 6, "img_size": 32}
    with monkeypatch.context() as patch:
        patch.setattr("itpn.data.shapes.draw_scene", break_off)
        with pytest.raises(KeyboardInterrupt):
            write_shapes(tmp_path / "a", **arguments)
    write_shapes(tmp_path / "a", **arguments)
    write_shapes(tmp_path / "b", **arguments)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"train": 0}, "at least 6"),
        ({"val": 5}, "at least 6"),
        ({"img_size": 16}, "at least 32"),
        ({"img_size": (64, 31)}, "64x31"),
        ({"seed": -1}, "negative"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        write_shapes(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_other_data_is_left_alone(tmp_path):
    write_shapes(tmp_path / "set", train=6, val=6, img_size=32)
    before = hashes(tmp_path)
    with pytest.raises(UserError, match="other arguments"):
        write_shapes(tmp_path / "set", train=12, val=6, img_size=32)
    real = tmp_path / "real" / "coco" / "annotations" / "instances_train2017.json"
    real.parent.mkdir(parents=True)
    real.write_text("{}")
    with pytest.raises(UserError, match="other data"):
        write_shapes(tmp_path / "real", train=6, val=6, img_size=32)
    real.unlink()
    assert hashes(tmp_path) == before
    with pytest.raises(UserError, match="cannot make folders"):
        write_shapes(tmp_path / "set" / "shapes.json", train=6, val=6, img_size=32)


def test_unknown_split_class_or_index():
    with pytest.raises(UserError, match="'test'"):
        draw_scene(0, "test", 0)
    with pytest.raises(UserError, match="'heart'"):
        draw_scene(0, "train", 0, category="heart")
    with pytest.raises(UserError, match="negative"):
        draw_scene(0, "train", -1)
