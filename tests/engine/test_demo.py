"""`itpn demo`, with fewer images and steps."""

import dataclasses

from PIL import Image

from itpn.cli import main
from itpn.data.shapes import write_shapes
from itpn.engine import demo


def test_the_whole_story(monkeypatch, tmp_path, capsys):
    def write_few(root, *, train, val, img_size):
        return write_shapes(root, train=8, val=6, img_size=img_size)

    monkeypatch.setattr(demo, "write_shapes", write_few)
    monkeypatch.setattr(demo, "TASKS", tuple(dataclasses.replace(task, steps=2) for task in demo.TASKS))
    assert main(["demo", "--output-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for task in ("classify", "detect", "segment"):
        (row,) = [line for line in lines if line.startswith(f"│ {task} ")]
        assert row.count("%") == 2  # from scratch and pre-trained
        (weights,) = [line.split()[1] for line in lines if line.startswith(f"{task}:")]
        assert (tmp_path / weights).is_file()
        assert weights.endswith("pre-trained/model.safetensors")
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 5 * 320
        assert picture.height > 4 * 320
        assert len(picture.getcolors(2**24)) > 1000
