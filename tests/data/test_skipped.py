"""Unreadable images are counted, named once, and too many end a run."""

import errno
import os

import pytest

from itpn.data.skipped import SkippedImages, none_readable, nothing_readable
from itpn.errors import MachineError, UserError


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


def test_a_missing_reader_is_no_corrupt_file() -> None:
    reason = "HDF5 is read by h5py: pip install 'itpn[science]'"
    assert (
        str(nothing_readable([("a.h5", reason)]))
        == f"none of 1 images in a row can be read; the first is a.h5: {reason}"
    )
    assert str(nothing_readable([("a.h5", "cut off.")])).endswith(
        ": cut off. Repair or remove the corrupt files, or check that the data root is right"
    )


def test_where_none_can_be_read_an_accident_is_none_of_the_images() -> None:
    """A file that may not be read is an accident of the machine, a corrupt one a mistake."""
    error = none_readable("the images in a", ("a/b\n.tif", "cut off"))
    assert isinstance(error, UserError)
    assert str(error) == r"none of the images in a can be read; the first is a/b\n.tif: cut off"
    error = none_readable("the images in a", ("a/b.tif", os.strerror(errno.EACCES)))
    assert isinstance(error, MachineError)
    assert str(error).endswith("a/b.tif: Permission denied; check the permissions of the file and of its folders")
    assert str(none_readable("the images in a", None)) == "none of the images in a can be read"
