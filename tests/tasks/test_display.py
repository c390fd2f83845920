"""Images of any channels and depth as a person looks at them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from stored_pixels import make_pixels

from itpn.data.channels import find_percentiles
from itpn.errors import UserError
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.display import Display, make_display, stored_display


def show(images, channels=None, value_range=None, nodata=None):
    pixels = make_pixels(images.shape[-3], images.dtype, nodata=nodata)
    return Display(pixels, channels, value_range)(images)


def test_photographs_are_shown_as_they_are():
    images = torch.randint(0, 100, (2, 3, 8, 8), dtype=torch.uint8)
    assert Display()(images) is images
    assert Display(channels=(0, 1, 2)).fit(images)(images) is images
    assert torch.equal(Display(channels=(2, 1, 0))(images[0]), images[0].flip(0))


def test_three_stains_of_8_bits_are_no_photograph():
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8).expand(3, 8, 8)
    shown = Display(make_pixels(3, torch.uint8))(images)
    assert (shown.min(), shown.max()) == (0, 255)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.float32])
def test_three_channels_are_stretched_by_percentiles(dtype):
    """Each by its own, over all images: of 1000 values 0 to 99 the lowest and highest hundredth are black and white."""
    ramp = torch.arange(100.0).repeat(10).reshape(2, 1, 20, 25)
    images = torch.cat([ramp, ramp.flip(-1), torch.zeros_like(ramp), 2 * ramp + 7], dim=1).to(dtype)  # [2, 4, 20, 25]
    shown = show(images, (3, 0, 2))
    assert shown.dtype == torch.uint8
    assert shown.shape == (2, 3, 20, 25)
    low, high = np.percentile(ramp, (1, 99))
    expected = ((ramp - low) / (high - low)).clamp(0, 1).mul(255).round()
    for place in (0, 1):
        assert (shown[:, place : place + 1].float() - expected).abs().max() <= 1
    assert not shown[:, 2].any()  # of one value
    one = show(images[0], (3, 0, 2), ([0, 0, 0, 7], [198, 1, 1, 205]))
    assert torch.equal(one[0], (images[0, 0].float() / 99 * 255).round().to(torch.uint8))
    assert show(images).shape == (2, 3, 20, 25)


def test_one_and_two_channels():
    grey = torch.arange(64.0).reshape(1, 8, 8)
    shown = show(grey, value_range=([0], [63]))
    assert torch.equal(shown, (grey / 63 * 255).round().to(torch.uint8).expand(3, 8, 8))
    painted = show(torch.cat([torch.zeros_like(grey), grey]), (1,), value_range=([0], [63]))
    table = (np.array(colormaps["viridis"].colors) * 255).round()
    assert np.abs(painted[:, 0, 0].numpy() - table[0]).max() <= 1
    assert np.abs(painted[:, 7, 7].numpy() - table[255]).max() <= 1
    two = show(torch.cat([grey, grey.flip(1)]))
    assert two.shape == (3, 8, 8)
    assert two[0].max() == two[1].max() == 255
    assert not two[2].any()


@pytest.mark.parametrize("channels", [None, (0,), (1, 1, 0)])
def test_no_data_is_black_and_stretches_nothing(channels):
    images = torch.rand(3, 16, 16) + 5
    missing = torch.zeros(16, 16, dtype=torch.bool)
    missing[:8, 3] = True
    whole = show(images.masked_fill(missing, float("nan")), channels)
    assert not whole[:, missing].any()
    assert whole[:, ~missing].amax(dim=1).min() > 100  # the blue of viridis ends at 142
    stored = (images * 1000).round().to(torch.int16).masked_fill(missing, -9999)
    assert not show(stored, channels, nodata=-9999)[:, missing].any()
    difference = show(stored, channels, nodata=-9999).float() - whole.float()
    assert difference.abs().max() <= 3
    nothing = torch.full((3, 8, 8), float("nan"))
    assert not show(nothing, channels).any()


def test_a_value_without_data_is_one_of_integers():
    """Of what a network makes of them, in floats, the same value is a value: the brightest here."""
    stored = torch.tensor([0, 2000, 4000], dtype=torch.int16).reshape(1, 1, 3)
    for channels in (None, (0,)):
        display = Display(make_pixels(1, stored.dtype, nodata=4000), channels, ([0.0], [4000.0]))
        assert display(stored)[..., 2].max() == 0
        assert (
            display(stored.float())[..., 2].max() == 255 if channels is None else display(stored.float())[..., 2].any()
        )
        assert torch.equal(display(stored)[..., :2], display(stored.float())[..., :2])
    low, high = find_percentiles(stored.float(), (0, 100), 4000)
    assert (low, high) == ([0], [4000])
    assert find_percentiles(stored, (0, 100), 4000) == ([0], [2000])


@pytest.mark.parametrize(
    ("stored", "channels"),
    [(None, None), ([3, 2, 1], [3, 2, 1]), ("321", None), ([1, 2], None), (5, None), (["a"], None)],
)
def test_channels_of_a_checkpoint(stored, channels):
    """What cannot be is not shown."""
    checkpoint = SimpleNamespace(
        settings={"data": {"show_channels": stored}}, preprocessing={"dtype": "int16", "channels": 4, "nodata": 5.0}
    )
    display = stored_display(checkpoint)
    assert (display.channels, display.pixels.nodata) == (channels, 5.0)


def test_what_is_beside_images_is_stretched_as_they_are():
    images = 100 + 50 * torch.rand(4, 2, 8, 8)
    display = Display(make_pixels(2, torch.float32)).fit(images)
    assert (display(images + 500)[:, :2] == 255).all()
    assert torch.equal(display(images), show(images))


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ((0, 1), "--data.show-channels needs one channel or three, not 2"),
        ((2, 1, -1), "--data.show-channels must be at least 0, not -1"),
        ((5, 1, 0), "--data.show-channels 5 1 0: there is no channel 5, the images have 4 channels, 0 to 3"),
        ((4,), "--data.show-channels 4: there is no channel 4, the images have 4 channels, 0 to 3"),
    ],
)
def test_channels_that_cannot_be_shown(channels, message):
    config = PretrainingConfig()
    config.data.show_channels, config.data.dtype, config.model.in_chans = channels, "uint16", 4

    def start():
        config.check()
        make_display(config)

    with pytest.raises(UserError) as error:
        start()
    assert str(error.value) == message
