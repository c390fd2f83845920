"""Unreadable images are counted, named once, and too many end a run."""

import pytest

from itpn.data.skipped import SkippedImages
from itpn.errors import UserError


def test_skipped_images_are_named_once() -> None:
    skipped = SkippedImages(100)
    assert skipped.update([("a.jpg", "empty file"), ("b.jpg", "cut off")]) == ["a.jpg: empty file", "b.jpg: cut off"]
    assert skipped.update([("a.jpg", "empty file"), ("c.jpg", "cut off")]) == ["c.jpg: cut off"]
    assert skipped.count == 3
    restored = SkippedImages(100)
    restored.load_state_dict(skipped.state_dict())
    assert restored.update([("b.jpg", "cut off")]) == []
    assert restored.count == 3


def test_state_of_older_checkpoints_is_read() -> None:
    restored = SkippedImages(100)
    restored.load_state_dict({"broken": {"a.jpg": "empty file"}})
    assert restored.count == 1
    assert restored.state_dict() == {"corrupt": {"a.jpg": "empty file"}}


def test_limit_for_files_is_a_fraction_of_all() -> None:
    skipped = SkippedImages(100)
    skipped.update([(f"{i}.jpg", "cut off") for i in range(5)])
    skipped.check(images_read=5, epoch_ended=True)  # 5 % is allowed
    skipped.update([("5.jpg", "cut off")])
    with pytest.raises(UserError, match=r"6 of 100 images .* 5%; the first is 0.jpg: cut off") as error:
        skipped.check(images_read=6)
    assert "\n" not in str(error.value)


def test_limit_for_shards_is_a_fraction_of_those_read() -> None:
    skipped = SkippedImages(None)
    skipped.update([(f"{i}.jpg", "cut off") for i in range(20)])
    skipped.check(images_read=199)  # too few to judge
    skipped.check(images_read=400)
    with pytest.raises(UserError, match="20 of 399 images"):
        skipped.check(images_read=399)
    with pytest.raises(UserError, match="20 of 30 images"):
        skipped.check(images_read=30, epoch_ended=True)
