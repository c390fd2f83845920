"""What a teacher of photographs sees of images of other channels and depths."""

from dataclasses import replace

import pytest
import torch
from stored_pixels import make_pixels
from torch import nn

from itpn.commands.parsing import parse_with_recipe
from itpn.commands.train import Train
from itpn.errors import UserError
from itpn.tasks.configs import TeacherConfig
from itpn.tasks.pixels import pixels_of
from itpn.tasks.pretraining.config import check_teacher
from itpn.tasks.pretraining.data import make_frozen_teacher, show_to_teacher
from itpn.teachers.feature_teacher import TEACHERS, FeatureTeacher, RGBView, choose_channels

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class Pixels(nn.Module):
    """Its features are its images."""

    def forward(self, images):
        return images.permute(0, 2, 3, 1)


def make_teacher(checkpoint=None, grid=(4, 4)):
    return FeatureTeacher("pixels", Pixels(), grid, (8, 8), 3, MEAN, STD)


def expected(rgb):
    normalized = (rgb - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    return normalized.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.float32])
def test_three_channels_scaled_from_their_range(dtype):
    images = torch.randint(0, 200, (2, 5, 8, 8)).to(dtype)
    teacher, low, high = make_teacher(), (0, 20, 40, 10, 0), (250, 120, 90, 160, 1)
    teacher.view = RGBView((3, 2, 1), make_pixels(5, dtype, low, high))
    rgb = torch.empty(2, 3, 8, 8)
    for place, index in enumerate((3, 2, 1)):
        rgb[:, place] = ((images[:, index].float() - low[index]) / (high[index] - low[index])).clamp(0, 1)
    torch.testing.assert_close(teacher(images), expected(rgb))
    assert rgb.min() == 0  # values beyond the range were among them
    assert rgb.max() == 1


def test_grey_is_repeated_and_no_data_is_black():
    teacher = make_teacher()
    teacher.view = RGBView((0, 0, 0), make_pixels(1, torch.int16, (-100,), (100,), nodata=-9999))
    images = torch.randint(-100, 100, (1, 1, 8, 8)).to(torch.int16)
    images[..., 0, 0] = -9999
    rgb = ((images.float() + 100) / 200).clamp(0, 1).expand(1, 3, 8, 8)
    assert not rgb[..., 0, 0].any()
    torch.testing.assert_close(teacher(images), expected(rgb))
    floats = images.float()
    floats[..., 0, 0] = float("nan")
    torch.testing.assert_close(teacher(floats), expected(rgb))


def test_photographs_are_as_they_were():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(make_teacher()(images), expected(images.float() / 255))
    teacher = make_teacher()
    teacher.view = RGBView((2, 1, 0))
    torch.testing.assert_close(teacher(images), expected(images.flip(1).float() / 255))


def test_which_channels():
    assert choose_channels("x", None, 3) == (0, 1, 2)
    assert choose_channels("x", (4, 2, 1), 5) == (4, 2, 1)
    assert choose_channels("x", (0, 0, 0), 1) == (0, 0, 0)


@pytest.mark.parametrize(
    ("channels", "count", "message"),
    [
        (
            None,
            7,
            "teacher x sees red, green and blue, and the images have 7 channels: say which it sees as these, counted "
            "from 0, e.g. --teacher.channels 3 2 1",
        ),
        (
            None,
            1,
            "teacher x sees red, green and blue, and the images have one channel: say which it sees as these, counted "
            "from 0, e.g. --teacher.channels 0 0 0",
        ),
        ((3, 2, 1), 3, "--teacher.channels 3 2 1: there is no channel 3, the images have 3 channels, 0 to 2"),
        ((0, 1, 2), 1, "--teacher.channels 0 1 2: there is no channel 1, the images have one channel, number 0"),
    ],
)
def test_channels_that_are_not_there(channels, count, message):
    with pytest.raises(UserError) as error:
        choose_channels("x", channels, count)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["ema", None])
def test_a_teacher_that_sees_all_channels(name):
    with pytest.raises(UserError) as error:
        check_teacher(TeacherConfig(name, channels=(2, 1, 0)), features=name is not None)
    assert str(error.value) == (
        "--teacher.channels is for a teacher of photographs; the EMA of the network sees all channels"
    )


def test_from_the_command_line(settings, monkeypatch):
    """To the teacher of a run, with the run's range of values."""
    monkeypatch.setitem(TEACHERS, "pixels", make_teacher)
    words = ["itpn-pixel_nano", "--teacher.name", "pixels", "--teacher.channels", "2", "1", "0"]
    teacher = parse_with_recipe(Train, words, "itpn train").config.teacher
    assert teacher.channels == (2, 1, 0)
    config = settings()
    config.teacher = teacher
    frozen = make_frozen_teacher(config)
    show_to_teacher(config, frozen)
    assert frozen.view == RGBView((2, 1, 0))
    config.model.in_chans, config.data.dtype, config.data.nodata = 4, "uint16", 7.0
    config.data.value_range = ("0", "100", "0", "200", "50", "300", "0", "400")
    show_to_teacher(config, frozen)
    assert frozen.view == RGBView((2, 1, 0), pixels_of(config))
    own = frozen.view.pixels
    assert (own.low, own.high, own.nodata) == ((0, 0, 50, 0), (100, 200, 300, 400), 7)
    config.teacher = replace(teacher, channels=None)
    with pytest.raises(UserError, match=r"^teacher pixels sees red, green and blue, and the images have 4 channels"):
        show_to_teacher(config, frozen)
    config.data.dtype, config.model.in_chans = "photo", 1  # grey for the network alone
    show_to_teacher(config, frozen)
    assert frozen.view is None
    with pytest.raises(UserError, match=r"^--teacher.channels must be three whole numbers, not '2', '1'$"):
        parse_with_recipe(Train, [*words[:3], "--teacher.channels", "2", "1"], "itpn train")
