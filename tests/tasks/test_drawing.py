"""Drawings of objects, and images beside one another."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw

from itpn.errors import UserError
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.drawing import (
    HEADER,
    PADDING,
    Display,
    caption_files,
    draw_objects,
    make_display,
    name_colour,
    stored_display,
    tile_images,
    to_display,
)


def test_a_small_object_in_a_large_one_shows_its_colour():
    """Whichever is the likelier; torchvision paints black what two masks have in common."""
    image = torch.full((3, 320, 320), 128, dtype=torch.uint8)
    masks = torch.zeros(2, 1, 320, 320)
    masks[0, 0, 100:310, 100:310] = 1
    masks[1, 0, 200:260, 200:260] = 1
    for scores in (torch.tensor([0.9, 0.8]), torch.tensor([0.8, 0.9])):
        found = {
            "boxes": torch.tensor([[100.0, 100, 310, 310], [200, 200, 260, 260]]),
            "labels": torch.tensor([1, 2]),
            "scores": scores,
            "masks": masks,
        }
        drawn = draw_objects(image, found, ("cat", "dog"), 0.5)
        for place, label in (((150, 150), 1), ((230, 250), 2)):
            expected = [0.55 * 128 + 0.45 * value for value in name_colour(label)]
            assert all(abs(a - b) <= 1 for a, b in zip(drawn.getpixel(place), expected, strict=True))
        assert drawn.getpixel((20, 20)) == (128, 128, 128)
    found["scores"] = torch.tensor([0.9, 0.1])
    assert draw_objects(image, found, ("cat", "dog"), 0.5).getpixel((230, 250))[0] == int(
        0.55 * 128 + 0.45 * name_colour(1)[0]
    )


def test_images_have_the_names_of_their_files_below(monkeypatch):
    """Long ones without their middle; above, long titles without their end."""
    written = {}
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, place, text, **options: (written.update({place: text}), draw(self, place, text, **options)),
    )
    name = "a photo with a long name of the 28th of November.jpg"
    images = [Image.new("RGB", (100, 60), "green")] * 3
    board = tile_images(images, ["cat", name, "dog"], per_row=2, captions=caption_files(["p/1.png", f"p/{name}", "2"]))
    row = HEADER + 60 + PADDING + HEADER
    assert board.size == (2 * 104 + PADDING, 2 * row + PADDING)
    below = row - HEADER + 4
    assert (written[PADDING, below], written[PADDING, row + below]) == ("1.png", "2")
    start, _, end = written[2 * PADDING + 100, below].partition("\u2026")
    assert name.startswith(start)
    assert name.endswith(end)
    assert min(len(start), len(end)) > 4
    title = written[2 * PADDING + 100, 4]
    assert title.endswith("\u2026")
    assert name.startswith(title[:-1])
    pixels = board.crop((104 + PADDING, below - 4 + PADDING, 104 + PADDING + 100, below - 4 + HEADER))
    assert min(pixels.convert("L").tobytes()) < 100  # the text is there
    assert not any(value < 255 for value in board.crop((208, below, 212, below + 12)).convert("L").tobytes())


def test_files_of_the_same_name_are_told_apart():
    assert caption_files(["a/cat/1.png", "a/dog/1.png"]) == ["cat/1.png", "dog/1.png"]
    assert caption_files(["a/1\n.png", "b/2.png"]) == ["1\\n.png", "2.png"]


def test_photographs_are_shown_as_they_are():
    images = torch.randint(0, 100, (2, 3, 8, 8), dtype=torch.uint8)
    assert to_display(images) is images
    assert Display((0, 1, 2)).fit(images)(images) is images
    assert torch.equal(to_display(images[0], (2, 1, 0)), images[0].flip(0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.float32])
def test_three_channels_are_stretched_by_percentiles(dtype):
    """Each by its own, over all images: of 1000 values 0 to 99 the lowest and highest hundredth are black and white."""
    ramp = torch.arange(100.0).repeat(10).reshape(2, 1, 20, 25)
    images = torch.cat([ramp, ramp.flip(-1), torch.zeros_like(ramp), 2 * ramp + 7], dim=1).to(dtype)  # [2, 4, 20, 25]
    shown = to_display(images, (3, 0, 2))
    assert shown.dtype == torch.uint8
    assert shown.shape == (2, 3, 20, 25)
    low, high = np.percentile(ramp, (1, 99))
    expected = ((ramp - low) / (high - low)).clamp(0, 1).mul(255).round()
    for place in (0, 1):
        assert (shown[:, place : place + 1].float() - expected).abs().max() <= 1
    assert not shown[:, 2].any()  # of one value
    one = to_display(images[0], (3, 0, 2), low=[0, 0, 0, 7], high=[198, 1, 1, 205])
    assert torch.equal(one[0], (images[0, 0].float() / 99 * 255).round().to(torch.uint8))
    assert to_display(images).shape == (2, 3, 20, 25)


def test_one_and_two_channels():
    grey = torch.arange(64.0).reshape(1, 8, 8)
    shown = to_display(grey, low=0, high=63)
    assert torch.equal(shown, (grey / 63 * 255).round().to(torch.uint8).expand(3, 8, 8))
    painted = to_display(torch.cat([torch.zeros_like(grey), grey]), (1,), low=0, high=63)
    table = (np.array(colormaps["viridis"].colors) * 255).round()
    assert np.abs(painted[:, 0, 0].numpy() - table[0]).max() <= 1
    assert np.abs(painted[:, 7, 7].numpy() - table[255]).max() <= 1
    two = to_display(torch.cat([grey, grey.flip(1)]))
    assert two.shape == (3, 8, 8)
    assert two[0].max() == two[1].max() == 255
    assert not two[2].any()


@pytest.mark.parametrize("channels", [None, (0,), (1, 1, 0)])
def test_no_data_is_black_and_stretches_nothing(channels):
    images = torch.rand(3, 16, 16) + 5
    missing = torch.zeros(16, 16, dtype=torch.bool)
    missing[:8, 3] = True
    whole = to_display(images.masked_fill(missing, float("nan")), channels)
    assert not whole[:, missing].any()
    assert whole[:, ~missing].amax(dim=1).min() > 100  # the blue of viridis ends at 142
    stored = (images * 1000).round().to(torch.int16).masked_fill(missing, -9999)
    assert not to_display(stored, channels, nodata=-9999)[:, missing].any()
    difference = to_display(stored, channels, nodata=-9999).float() - whole.float()
    assert difference.abs().max() <= 3
    nothing = torch.full((3, 8, 8), float("nan"))
    assert not to_display(nothing, channels).any()


@pytest.mark.parametrize(
    ("stored", "channels"),
    [(None, None), ([3, 2, 1], [3, 2, 1]), ("321", None), ([1, 2], None), (5, None), (["a"], None)],
)
def test_channels_of_a_checkpoint(stored, channels):
    """What cannot be is not shown."""
    checkpoint = SimpleNamespace(settings={"data": {"show_channels": stored}}, preprocessing={"nodata": 5.0})
    assert stored_display(checkpoint) == Display(channels, 5.0)


def test_what_is_beside_images_is_stretched_as_they_are():
    images = 100 + 50 * torch.rand(4, 2, 8, 8)
    display = Display().fit(images)
    assert (display(images + 500)[:, :2] == 255).all()
    assert torch.equal(display(images), to_display(images))


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
