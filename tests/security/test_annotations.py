"""Rows of docs/security.md: COCO's JSON, YOLO's YAML and text, Pascal VOC's XML, class files, settings, recipes, the
environment.
"""

import json
import os

import pytest
from PIL import Image
from security.attack import limited, refused

from itpn.cli import main
from itpn.data.annotations import read_objects
from itpn.data.class_names import read_names
from itpn.data.files import find_images
from itpn.system import processes as peers
from itpn.system.yaml_files import load_yaml

BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 0, 20, 1], "iscrowd": 0}


def coco(folder, note, image=None, text=None):
    """A folder with one image, and one object in it beside a sound one."""
    (folder / "train").mkdir()
    os.rename(folder / "photos" / "0.jpg", folder / "train" / "0.jpg")
    entry = {"id": 1, "file_name": "0.jpg", "height": 48, "width": 64} | (image or {})
    content = {"images": [entry], "annotations": [{**BOX, "id": 2}, note], "categories": [{"id": 1, "name": "a"}]}
    path = folder / "train" / "x.json"
    path.write_text(text if text is not None else json.dumps(content))
    return path


def sound(folder, **limits) -> tuple[int, str]:
    """As `read`, which must not refuse."""
    answer, printed = limited(read, str(folder), **limits)
    assert isinstance(answer, tuple), printed
    return answer


def read(folder: str) -> tuple[int, str]:
    """How many objects there are, and what was left out."""
    lines: list[str] = []
    images = read_objects(folder, "train", "summary", lines.append)
    assert images is not None
    return sum(len(images.objects_of(index)) for index in range(len(images))), "\n".join(lines)


LINE = {"height": 1, "width": 2**27 - 1}  # 134 million pixels in a row


@pytest.mark.parametrize(
    ("note", "image"),
    [
        ({"segmentation": [[0, 0, 1e30, 0, 1e30, 1e30]]}, None),
        ({"segmentation": [[0, 0, 1e308, 0, 1e308, 1e308]]}, None),
        ({"segmentation": [[0, 0, 10**400, 0, 5, 5]]}, None),
        ({"segmentation": [[0, 0, 2**29, 0, 2**29, 1]], "bbox": [0, 0, 5, 1]}, LINE),
        ({"segmentation": [[0, 0, 600, 400] * 10**6]}, None),
        ({"segmentation": {"size": [48, 64], "counts": [0, 10**12]}}, None),
        ({"segmentation": {"size": [10**6, 10**6], "counts": [0, 10**12]}}, None),
        ({"segmentation": {"size": [10**6, 10**6], "counts": "PPPPPPP0"}}, None),
        ({"segmentation": {"size": [48, 64], "counts": "o" * 10**6}}, None),
        ({"segmentation": {"size": [48, 64], "counts": "PPPPPPPPPPPPPPPPPPP0"}}, None),
        ({"segmentation": {"size": [48, 64], "counts": "0P`_oooo3"}}, None),
        ({"segmentation": {"size": [48, 64], "counts": {"a": 1}}}, None),
        ({"bbox": [0, 0, 1e999, 1]}, None),
        ({"bbox": [0] * 10**6}, None),
        ({"iscrowd": [[[1]]]}, None),
    ],
)
def test_an_object_of_coco(tmp_path, photo, note, image):
    coco(tmp_path, {**BOX, **note}, image)
    count, printed = sound(tmp_path, memory=2**29)
    assert count == 1 + ("segmentation" in note)  # a box stays without its polygon or mask
    assert ": 1 (annotation 1" in printed


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        '{"a":' * 10**6,
        '{"images": [{"id": 1' + "0" * 10**6 + "}]}",
        '{"images": 3}',
        '{"images": [], "annotations": [], "categories": [{"id": ' + "[" * 900 + "]" * 900 + ', "name": "a"}]}',
        '{"images": [], "annotations": [{"image_id": 1, "category_id": 1, "id": ' + "[" * 960 + "]" * 960 + "}], "
        '"categories": [{"id": 1, "name": "a"}]}',
        "\ufeff[]",
        "",
    ],
)
def test_a_hostile_json(tmp_path, photo, text):
    path = coco(tmp_path, BOX, text=text)
    train = ["train", "detector_nano", "--data.root", tmp_path, "--model.scratch", "--model.name", "itpn_nano"]
    assert str(path) in refused(*train, memory=2**29)


def test_a_file_of_annotations_that_is_none(tmp_path, photo):
    path = coco(tmp_path, BOX)
    train = ["train", "detector_nano", "--data.root", tmp_path, "--model.scratch", "--model.name", "itpn_nano"]
    os.truncate(path, 0)
    os.truncate(path, 6 * 2**30)  # zeros that take no room on disk
    assert "does not start with {" in refused(*train, memory=2**28)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refused(*train)


def test_a_name_that_leads_outside_is_only_read_as_an_image(tmp_path, photo):
    (tmp_path / "secret.txt").write_text("secret")
    coco(tmp_path, BOX, {"file_name": "../secret.txt"})
    (count, _), printed = limited(read, str(tmp_path))
    assert count == 2  # found as data sets refer to it, and never shown: it is no image
    assert "secret" not in printed.replace("secret.txt", "")
    coco_json = json.loads((tmp_path / "train" / "x.json").read_text())
    for name in ("/dev/zero", "../pipe.jpg", "x" * 10**6, "\0"):
        coco_json["images"][0]["file_name"] = name
        (tmp_path / "train" / "x.json").write_text(json.dumps(coco_json))
        if name == "../pipe.jpg":
            os.mkfifo(tmp_path / "pipe.jpg")
        answer, _ = limited(read, str(tmp_path))
        assert "has no images that can be used: images not on disk" in answer


# --- YOLO


LAUGHS = "a0: &a0 [" + ", ".join(["ha"] * 9) + "]\n"
LAUGHS += "".join(f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]\n" for n in range(1, 12))
YAMLS = {
    "laughs": LAUGHS + "names: {0: *a11}\ntrain: images\n",
    "a list in itself": "names: &a [*a, b]\ntrain: images\n",
    "nested": "names: " + "[" * 10**5 + "]" * 10**5 + "\ntrain: images\n",
    "a call": "names: !!python/object/apply:os.system ['touch CANARY']\ntrain: images\n",
    "a new object": "names: !!python/object/new:os.system ['touch CANARY']\ntrain: images\n",
    "a module": "!!python/module:antigravity\nnames: [a]\n",
    "digits": "names: {" + "9" * 10**5 + ": a}\ntrain: images\n",
    "too long": "names: [" + "a, " * 10**6 + "a]\ntrain: images\n",
}


@pytest.mark.parametrize("kind", list(YAMLS))
def test_a_hostile_yaml(tmp_path, photo, kind):
    canary = tmp_path / "canary"
    text = YAMLS[kind].replace("CANARY", str(canary))
    (tmp_path / "data.yaml").write_text(text)
    train = ["train", "detector_nano", "--data.root", tmp_path, "--model.scratch", "--model.name", "itpn_nano"]
    assert "data.yaml" in refused(*train, memory=2**28)
    (tmp_path / "config.yaml").write_text(f"recipe: x\ndata:\n  root: x\n{text}")
    logged = "bytes, more than the" if kind == "too long" else "is not a run's config.yaml"
    assert logged in refused("train", tmp_path / "config.yaml", memory=2**28)
    assert not canary.exists()


def test_plain_aliases_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a [0.5, 1.5]\nb: *a\nc: {<<: &d {e: 1}, f: *a}\n")
    assert load_yaml(tmp_path / "x.yaml") == {"a": [0.5, 1.5], "b": [0.5, 1.5], "c": {"e": 1, "f": [0.5, 1.5]}}


def yolo(folder, label: bytes | None):
    pytest.importorskip("supervision")
    (folder / "data.yaml").write_text("names: [a]\ntrain: images\n")
    (folder / "labels").mkdir()
    (folder / "images").mkdir()
    for name in ("0", "1"):
        os.rename(folder / "photos" / f"{name}.jpg", folder / "images" / f"{name}.jpg")
    (folder / "labels" / "0.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    if label is not None:
        (folder / "labels" / "1.txt").write_bytes(label)
    return folder / "labels" / "1.txt"


@pytest.mark.parametrize(
    "label",
    [
        b"0 " + b"0.5 " * 10**6,
        b"0 " + b"1e30 " * 8,
        b"0 " + b"9" * 10**6 + b" 0.5 0.5 0.5",
        b"9" * 10**6 + b" 0.5 0.5 0.5 0.5",
        b"0 nan inf 0.5 0.5",
        b"\xff\xfe\0\0x",  # of a text in UTF-32 that breaks off
        b"0 0.5 0.5 0.5 0.5\n" * 10**4 + b"x",
    ],
)
def test_a_label_of_yolo(tmp_path, photo, label):
    yolo(tmp_path, label)
    count, printed = sound(tmp_path, memory=2**29)
    if label.endswith(b"\nx"):
        assert count == 2  # of the other lines
        assert "objects that cannot be read: 1 (" in printed
    else:
        assert count in (1, 2) if label.startswith(b"0 0.5 0.5 0.5 0.5 ") else count == 1
    assert printed or count == 2


def test_a_label_without_end(tmp_path, photo):
    path = yolo(tmp_path, b"")
    os.truncate(path, 2**33)
    count, printed = sound(tmp_path, memory=2**28)
    assert count == 1
    assert "bytes, more than the" in printed
    path.unlink()
    os.mkfifo(path)
    assert sound(tmp_path)[0] == 1


# --- Pascal VOC


def voc(folder, text: str | None):
    pytest.importorskip("supervision")
    (folder / "Annotations").mkdir()
    os.rename(folder / "photos", folder / "JPEGImages")
    for path in (folder / "JPEGImages").glob("[2-9].jpg"):
        path.unlink()
    sound = (
        "<annotation><object><name>a</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
        "</bndbox></object></annotation>"
    )
    (folder / "Annotations" / "0.xml").write_text(sound)
    if text is not None:
        (folder / "Annotations" / "1.xml").write_text(text.replace("SOUND", sound))
    return folder / "Annotations" / "1.xml"


NAMES = "<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        f"<!DOCTYPE x [{NAMES}]><annotation><object><name>&a11;</name></object></annotation>",
        "<!DOCTYPE x [<!ENTITY a SYSTEM 'file://SECRET'>]><annotation><object><name>&a;</name></object></annotation>",
        "<!DOCTYPE x SYSTEM 'http://127.0.0.1:9/x.dtd'><annotation>&a;</annotation>",
        "<!DOCTYPE x [<!ENTITY % a SYSTEM 'file://SECRET'> %a;]>SOUND",
        "<a>" * 10**6,
        "<a " + " ".join(f"b{n}='c'" for n in range(10**5)) + "/>x",
    ],
)
def test_a_hostile_xml(tmp_path, photo, text):
    secret = tmp_path / "secret"
    secret.write_text("hidden words")
    path = voc(tmp_path, text.replace("SECRET", str(secret)))
    (count, printed), output = limited(read, str(tmp_path), memory=2**29)
    assert count == 1
    assert f"images whose annotations cannot be read: 1 ({path}" in printed
    assert "hidden words" not in printed + output


def test_an_xml_without_end(tmp_path, photo):
    path = voc(tmp_path, "<annotation>")
    os.truncate(path, 2**33)
    count, printed = sound(tmp_path, memory=2**28)
    assert "bytes, more than the" in printed
    path.unlink()
    os.mkfifo(path)
    count, printed = sound(tmp_path)
    assert count == 1
    assert "not a regular file" in printed


# --- text, settings, recipes


@pytest.mark.parametrize("kind", ["pipe", "device", "gigabytes"])
def test_a_class_file(tmp_path, kind):
    path = tmp_path / "classes.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 2**33)
    answer, _ = limited(read_names, str(path), ".", memory=2**28)
    assert "not a regular file" in answer or "bytes, more than the" in answer
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    assert limited(count_images, str(tmp_path))[0] == 2


def count_images(folder: str) -> int:
    return len(find_images([folder]).images)


def test_settings_of_a_run_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    assert "config.yaml is a pipe, not a file" in refused("train", tmp_path / "config.yaml")
    os.remove(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").touch()
    os.truncate(tmp_path / "config.yaml", 2**33)
    assert "bytes, more than the" in refused("train", tmp_path / "config.yaml", memory=2**28)


def test_a_recipe_file_is_a_program_and_is_run(tmp_path):
    """On purpose: docs/security.md says so."""
    (tmp_path / "x.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()")
    assert "must set `config`" in refused("train", tmp_path / "x.py")
    assert (tmp_path / "canary").exists()


# --- the environment


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "RANK", "SLURM_NTASKS", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", "x", "9" * 10, "9" * 10_000])
@pytest.mark.parametrize("others", [{}, {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}])
def test_variables_of_torchrun_and_slurm(tmp_path, photo, monkeypatch, capsys, name, value, others):
    monkeypatch.setattr(peers, "_watching", False)  # as in a process of its own
    for variable, number in {**others, name: value}.items():
        monkeypatch.setenv(variable, number)
    options = ["--data.root", str(photo.parent), "--output-dir", str(tmp_path / "runs")]
    assert main(["train", "itpn-pixel_nano", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"itpn: the environment variable {name} must be a number")
    assert error.count("\n") == 1
    assert len(error) < 200
    assert not (tmp_path / "runs").exists()
