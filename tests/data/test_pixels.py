"""Pixels of any channels and depth: resized, turned and changed as plain arithmetic says, without data or with."""

import itertools

import numpy as np
import pytest
import torch
from stored_pixels import make_pixels
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import adjust_brightness, adjust_contrast, resize

from itpn.data.pixels import (
    adjust_channels,
    drop_channels,
    mirror,
    pad_pixels,
    resize_pixels,
    turn,
)

DTYPES = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32]
DTYPES += [torch.float16, torch.float32, torch.float64]
RANGES = {torch.uint8: (3, 250), torch.int8: (-120, 120), torch.uint16: (9, 65000), torch.int16: (-9000, 32000)}
RANGES |= {torch.uint32: (2**31, 2**32 - 2), torch.int32: (2**29, 2**29 + 9), torch.float16: (-8, 8)}


def draw(dtype: torch.dtype, height: int = 20, width: int = 27, channels: int = 5) -> torch.Tensor:
    """Smooth noise over a range that the type has."""
    low, high = RANGES.get(dtype, (-3.5, 0.25))
    coarse = np.random.default_rng(0).uniform(low, high, (channels, height, width))
    values = torch.from_numpy(coarse)
    return values.to(dtype) if dtype.is_floating_point else values.round().to(torch.int64).to(dtype)


def exact(image: torch.Tensor) -> torch.Tensor:
    return image.to(torch.float64)


def weights(old: int, new: int, mode: str) -> torch.Tensor:
    """Of antialiased resizing along an axis, float64 [new, old], from its definition."""
    scale = old / new
    width = max(scale, 1.0)
    support = (2 if mode == "bicubic" else 1) * width
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        centre = scale * (row + 0.5)
        begin, end = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), old)
        for column in range(begin, end):
            x = abs((column + 0.5 - centre) / width)
            if mode == "bilinear":
                matrix[row, column] = max(0.0, 1 - x)
            elif x < 1:
                matrix[row, column] = (1.5 * x - 2.5) * x * x + 1  # Keys' cubic with a = -0.5
            elif x < 2:
                matrix[row, column] = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return matrix / matrix.sum(dim=1, keepdim=True)


def resize_by_hand(image: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """float64 [C, *size]."""
    rows, columns = (weights(old, new, mode) for old, new in zip(image.shape[-2:], size, strict=True))
    return rows @ exact(image) @ columns.T


# ---------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(8, 12), (33, 31), (20, 9)])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.uint8], ids=str)
def test_resizing_is_what_its_weights_say(dtype: torch.dtype, size: tuple[int, int], mode: str) -> None:
    image = draw(dtype)
    resized = resize_pixels(image, size, mode)
    assert (resized.dtype, tuple(resized.shape)) == (dtype, (5, *size))
    bounds = [edge(exact(image).flatten(1), dim=1)[:, None, None] for edge in (torch.amin, torch.amax)]
    wanted = resize_by_hand(image, size, mode).clamp(*bounds)
    # 32 bits give the place between two pixels to 2e-6 of their distance
    step = (1e-12 if dtype in (torch.float64, torch.int32, torch.uint32) else 2e-6) * (bounds[1] - bounds[0]).max()
    if dtype == torch.float16:
        step = torch.finfo(dtype).eps * 8
    if not dtype.is_floating_point:
        step += 0.5 + 1e-6
    assert (exact(resized) - wanted).abs().max() <= step


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3, 7])
def test_eight_bits_are_resized_by_torchvision(channels: int, mode: str) -> None:
    image = draw(torch.uint8, channels=channels)
    for size in ((8, 12), (33, 31), (20, 27)):
        theirs = resize(image, list(size), InterpolationMode(mode), antialias=True)
        assert torch.equal(resize_pixels(image, size, mode), theirs)


def test_no_value_is_made_that_the_channel_has_not() -> None:
    """An edge from 0 to a ceiling: bicubic resizing alone would go below and above."""
    edge = torch.zeros(2, 12, 12, dtype=torch.float32)
    edge[0, :, 6:], edge[1, :, 6:] = 1.0, -4.0
    theirs = resize(edge, [30, 30], InterpolationMode.BICUBIC, antialias=True)
    assert theirs[0].min() < -0.01
    assert theirs[0].max() > 1.01
    ours = resize_pixels(edge, (30, 30))
    assert (ours[0].min(), ours[0].max(), ours[1].min(), ours[1].max()) == (0, 1, -4, 0)
    whole = (edge[:1] * 65535).to(torch.uint16)  # an overshoot would wrap
    high = resize_pixels(whole, (30, 30)).to(torch.int32)
    assert (high[0, :, 20:] == 65535).all()
    assert (high[0, :, :10] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_of_that_size_stays_as_it_is(dtype: torch.dtype) -> None:
    image = draw(dtype)
    assert resize_pixels(image, (20, 27)) is image


# ---------------------------------------------------------------------------------------------- pixels without data


CASES = [(torch.uint8, 0), (torch.uint16, 0), (torch.int16, -9999), (torch.int32, -1), (torch.uint32, 2**32 - 1)]
CASES += [(torch.float32, None), (torch.float64, None)]


def punch(image: torch.Tensor, nodata: float | None) -> torch.Tensor:
    """Take the data of some pixels: a block of all channels, single pixels of one."""
    holes = torch.zeros(image.shape, dtype=torch.bool)
    holes[:, 3:9, 5:14] = True
    holes[2, ::5, ::4] = True
    value = float("nan") if nodata is None else nodata
    filled = exact(image).masked_fill(holes, value)
    return filled.to(image.dtype) if image.is_floating_point() else filled.to(torch.int64).to(image.dtype)


def without_data(image: torch.Tensor, nodata: float | None) -> torch.Tensor:
    return exact(image).isnan() if nodata is None else exact(image) == nodata


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(9, 12), (31, 40)])
@pytest.mark.parametrize(("dtype", "nodata"), CASES, ids=str)
def test_what_has_no_data_has_no_weight(dtype, nodata, size, mode) -> None:
    image = punch(draw(dtype), nodata)
    empty = without_data(image, nodata)
    rows, columns = (weights(old, new, mode) for old, new in zip(image.shape[-2:], size, strict=True))
    share = rows @ (~empty).to(torch.float64) @ columns.T
    sums = rows @ exact(image).masked_fill(empty, 0) @ columns.T
    low = exact(image).masked_fill(empty, float("inf")).amin((1, 2), True)
    high = exact(image).masked_fill(empty, -float("inf")).amax((1, 2), True)
    resized = resize_pixels(image, size, mode, nodata)
    lost = without_data(resized, nodata)
    sure = (share - 0.5).abs() > 1e-5
    assert torch.equal(lost[sure], (share < 0.5)[sure])
    assert lost.any()
    kept = ~lost & sure
    step = 1.01 if not dtype.is_floating_point else 1e-5
    assert (exact(resized) - (sums / share).clamp(low, high))[kept].abs().max() <= step


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_in_memory_does_not_matter(dtype: torch.dtype) -> None:
    """Crops of photographs have their channels last, crops of a window are cut from longer rows."""
    image = punch(draw(dtype), 77) if dtype not in (torch.float16, torch.float32, torch.float64) else draw(dtype)
    last = torch.from_numpy(np.ascontiguousarray(image.numpy().transpose(1, 2, 0))).permute(2, 0, 1)
    cut = pad_pixels(image, 5, 6, [1.0])[:, :20, :27]
    pixels = make_pixels(5, dtype, (0,), (1,), (2.4,), 77)
    for function in (
        lambda one: resize_pixels(one, (9, 40), "bicubic", 77),
        lambda one: adjust_channels(one, [0.9] * 5, [0.8] * 5, pixels),
        lambda one: drop_channels(one, [2], pixels),
    ):
        assert torch.equal(function(last), function(image))
        assert torch.equal(function(cut), function(image))


@pytest.mark.parametrize("alike", [True, False])
def test_channels_that_lose_the_same_pixels_are_like_any_others(alike: bool) -> None:
    image = draw(torch.float32, channels=2)
    image[:, 3:9, 5:14] = float("nan")
    if not alike:
        image[1, 0, 0] = float("nan")
    whole = resize_pixels(image, (9, 12))
    for channel in range(2):
        alone = resize_pixels(image[channel : channel + 1], (9, 12))[0]
        assert torch.equal(whole[channel].nan_to_num(99), alone.nan_to_num(99))


def test_data_that_rounds_to_the_value_of_none_keeps_being_data() -> None:
    """Between -1 and 1 lies 0, which is the value of no data here."""
    image = torch.tensor([[-1, 1] * 8], dtype=torch.int16).expand(1, 16, 16)
    assert (resize_pixels(image, (8, 8), "bilinear") == 0).any()
    assert (resize_pixels(image, (8, 8), "bilinear", nodata=0) == 1).any()
    assert not (resize_pixels(image, (8, 8), "bilinear", nodata=0) == 0).any()
    pixels = make_pixels(1, torch.uint16, (0,), (1000,), (0,), nodata=0)
    dark = torch.tensor([[[1, 2, 0, 5]]], dtype=torch.uint16)
    assert adjust_channels(dark, [0.1], [1.0], pixels).tolist() == [[[1, 1, 0, 1]]]
    assert drop_channels(dark, [0], pixels).tolist() == [[[1, 1, 0, 1]]]
    assert (pad_pixels(torch.full((1, 1, 1), 255, dtype=torch.uint8), 1, 0, [255], nodata=255)[0, 0, 1]) == 254


def test_an_image_without_any_data() -> None:
    for image, nodata in ((torch.full((2, 9, 9), float("nan")), None), (torch.zeros(2, 9, 9, dtype=torch.uint16), 0)):
        pixels = make_pixels(2, image.dtype, (0,), (1,), (0.5,), nodata)
        for changed in (
            resize_pixels(image, (4, 5), "bicubic", nodata),
            adjust_channels(image, [2.0, 0.5], [2.0, 0.5], pixels),
            drop_channels(image, [1], pixels),
        ):
            assert without_data(changed, nodata).all()
            assert changed.dtype == image.dtype


def test_infinite_values_do_not_spread() -> None:
    image = torch.rand(1, 32, 32)
    image[0, 8, 8] = float("inf")
    assert resize_pixels(image, (16, 16)).isfinite().all()


# ---------------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint64, torch.bool], ids=str)
def test_turns_and_mirrors_are_those_of_numpy(dtype: torch.dtype) -> None:
    image = draw(torch.int32).to(dtype)
    assert turn(image, 0) is image
    for quarters in range(5):
        turned = turn(image, quarters)
        assert turned.dtype == dtype
        assert np.array_equal(turned.numpy(), np.rot90(image.numpy(), quarters, (1, 2)))
    assert np.array_equal(mirror(image).numpy(), image.numpy()[..., ::-1])
    assert mirror(image).dtype == dtype


def test_turns_and_mirrors_are_the_eight_symmetries() -> None:
    image = draw(torch.uint8)
    seen = {mirrored.numpy().tobytes() + bytes(mirrored.shape) for mirrored in symmetries(image)}
    assert len(seen) == 8


def symmetries(image: torch.Tensor) -> list[torch.Tensor]:
    turned = [turn(image, quarters) for quarters in range(4)]
    return [one.contiguous() for one in (*turned, *map(mirror, turned))]


# ---------------------------------------------------------------------------------------------- single channels


def test_channels_are_changed_as_torchvision_changes_grey_images() -> None:
    """In a value range of its own, wherever nothing is cut off."""
    unit = torch.rand(4, 11, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.2
    low, high = (torch.tensor(ends, dtype=torch.float64)[:, None, None] for ends in ([-30, 0, 5, -1], [10, 1, 9, 1]))
    pixels = make_pixels(4, torch.float64, (-30, 0, 5, -1), (10, 1, 9, 1), (0,))
    brightness, contrast = [1.3, 0.7, 1.0, 1.1], [0.8, 1.2, 1.3, 1.0]
    changed = (adjust_channels(low + unit * (high - low), brightness, contrast, pixels) - low) / (high - low)
    for channel, (bright, contrasted) in enumerate(zip(brightness, contrast, strict=True)):
        grey = unit[channel : channel + 1]
        theirs = adjust_brightness(adjust_contrast(grey, contrasted), bright)
        other = adjust_contrast(adjust_brightness(grey, bright), contrasted)
        assert (changed[channel] - theirs[0]).abs().max() < 1e-6  # torchvision computes the mean in 32 bits
        assert (changed[channel] - other[0]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_changed_channels_stay_in_their_type(dtype: torch.dtype) -> None:
    image = draw(dtype)
    pixels = make_pixels(5, dtype, (0,), (1,), (2.4,))
    same = adjust_channels(image, [1.0] * 5, [1.0] * 5, pixels)
    assert torch.equal(same, image) if not dtype.is_floating_point else torch.allclose(same, image, rtol=1e-3)
    brighter = adjust_channels(image, [1.9] * 5, [1.9] * 5, pixels)  # beyond what whole numbers hold
    assert brighter.dtype == dtype
    dropped = drop_channels(image, [1, 4], pixels)
    assert dropped.dtype == dtype
    for channel in range(5):
        wanted = image[channel] if channel not in (1, 4) else torch.full((20, 27), 2.4, dtype=torch.float64).to(dtype)
        assert torch.equal(dropped[channel], wanted)
    if dtype.is_floating_point:
        return
    limits, doubled = torch.iinfo(dtype), 1.9 * exact(image)
    mean = doubled.mean((1, 2), True)
    wanted = (mean + 1.9 * (doubled - mean)).round().clamp(limits.min, limits.max)
    assert (exact(brighter) - wanted).abs().max() <= max(1, 2e-7 * wanted.abs().max())


@pytest.mark.parametrize(("dtype", "nodata"), CASES, ids=str)
def test_channels_are_changed_where_there_is_data(dtype, nodata) -> None:
    image = punch(draw(dtype), nodata)
    empty = without_data(image, nodata)
    pixels = make_pixels(5, dtype, (-1.0,), (3.0,), (1.0, 2.0, 3.0, 4.0, 5.0), nodata)
    changed = adjust_channels(image, [0.9] * 5, [0.8] * 5, pixels)
    assert torch.equal(without_data(changed, nodata), empty)
    for channel in range(5):
        valid = exact(image)[channel][~empty[channel]]
        wanted = -1 + 0.9 * (valid.mean() + 0.8 * (valid - valid.mean()) + 1)
        if not dtype.is_floating_point:
            wanted = wanted.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        step = 1.01 if not dtype.is_floating_point else 1e-5
        assert (exact(changed)[channel][~empty[channel]] - wanted).abs().max() <= step
    dropped = drop_channels(image, range(5), pixels)
    assert torch.equal(without_data(dropped, nodata), empty)
    for channel in range(5):
        assert (exact(dropped)[channel][~empty[channel]] == channel + 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding(dtype: torch.dtype) -> None:
    image = draw(dtype)
    for right, below in itertools.product((0, 3), (0, 2)):
        padded = pad_pixels(image, right, below, [1.0, 2.0, 3.0, 4.6, 5.0])
        assert (padded.dtype, tuple(padded.shape)) == (dtype, (5, 20 + below, 27 + right))
        assert torch.equal(padded[:, :20, :27], image)
        fill = exact(torch.tensor(4.6 if dtype.is_floating_point else 5).to(dtype))
        beside = torch.cat((exact(padded[3, 20:]).flatten(), exact(padded[3, :20, 27:]).flatten()))
        assert len(beside) == below * (27 + right) + 20 * right
        assert torch.allclose(beside, fill.expand_as(beside), rtol=1e-6)
    assert (exact(pad_pixels(image, 1, 1, [7.0]))[:, -1, -1] == 7).all()
