"""Augmentation: where crops lie, what jitter does, that both views of an image are alike, and what is no photograph."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from stored_pixels import make_pixels
from torchvision.transforms.v2 import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2.functional import InterpolationMode, resize

from itpn.data.augment import (
    ClassificationTransform,
    EvaluationTransform,
    PretrainingTransform,
    center_crop,
    draw_channels,
    draw_crop,
    draw_jitter,
)
from itpn.data.image_type import PHOTOGRAPHS, Pixels
from itpn.data.pixels import adjust_channels, drop_channels, mirror, resize_pixels, turn
from itpn.errors import UserError

TRANSFORM = PretrainingTransform((8, 12))
JITTER = PretrainingTransform((24, 32), color_jitter=0.4, teacher_size=(21, 28))


def noise(height: int = 60, width: int = 80) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def crop_by_hand(image: torch.Tensor, size: tuple[int, int], rng: random.Random) -> torch.Tensor:
    """Crop and flip with the default settings; ``rng`` then stands where jitter begins."""
    top, left, height, width = draw_crop(*image.shape[1:], (0.2, 1.0), (3 / 4, 4 / 3), rng)
    crop = image[:, top : top + height, left : left + width]
    crop = resize(crop, list(size), InterpolationMode.BICUBIC, antialias=True)
    return crop.flip(-1) if rng.random() < 0.5 else crop


# ---------------------------------------------------------------------------------------------- crops


def test_crop_depends_on_its_random_numbers_only() -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    a, b, c = (TRANSFORM(image, random.Random(seed))["image"] for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_crops_have_the_distribution_of_torchvision() -> None:
    reference = RandomResizedCrop(8, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    image, rng = torch.empty(3, 90, 130, dtype=torch.uint8), random.Random(0)
    ours = torch.tensor([draw_crop(90, 130, (0.2, 1.0), (3 / 4, 4 / 3), rng) for _ in range(4000)]).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [reference.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in drawn]).double()
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert (ours.quantile(quantile, dim=0) - theirs.quantile(quantile, dim=0)).abs().max() <= 3
    assert (ours[:, 0] + ours[:, 2] <= 90).all()
    assert (ours[:, 1] + ours[:, 3] <= 130).all()


def test_crop_is_cut_resized_and_mirrored() -> None:
    ramp = torch.arange(60, dtype=torch.uint8).expand(3, 60, 60)  # brightness is the column
    plain = PretrainingTransform((16, 16), scale=(0.25, 0.25), ratio=(1, 1), hflip=0)
    mirrored = PretrainingTransform((16, 16), scale=(0.25, 0.25), ratio=(1, 1), hflip=1)
    a, b = plain(ramp, random.Random(3))["image"], mirrored(ramp, random.Random(3))["image"]
    assert torch.equal(a.flip(-1), b)
    _, left, height, width = draw_crop(60, 60, (0.25, 0.25), (1, 1), random.Random(3))
    assert (height, width) == (30, 30)
    assert abs(int(a[0, 8, 0]) - left) <= 1
    assert abs(int(a[0, 8, -1]) - (left + 29)) <= 1


@pytest.mark.parametrize("size", [(1, 1), (20, 4000), (4000, 20), (2, 3)])
def test_extreme_shapes_can_be_cropped(size: tuple[int, int]) -> None:
    image = torch.full((3, *size), 77, dtype=torch.uint8)
    for crop in (TRANSFORM(image, random.Random(0))["image"], center_crop(image, (8, 12))):
        assert crop.shape == (3, 8, 12)
        assert (crop == 77).all()


def test_center_crop() -> None:
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)
    image[:, :, 30:70] = 200  # the centre square
    assert (center_crop(image, (16, 16)) == 200).all()
    assert (center_crop(image, (16, 40))[0, 8, ::39] == 0).all()  # the whole width


def test_impossible_settings() -> None:
    for settings in (
        {"interpolation": "cubic"},
        {"scale": (0.5, 1.5)},
        {"scale": (0, 1)},
        {"ratio": (2, 1)},
        {"color_jitter": -0.1},
        {"color_jitter": 1.1},
        {"color_jitter": float("nan")},
        {"channel_jitter": 1.1},
        {"channel_drop": -0.1},
        {"teacher_size": (196, 0)},
    ):
        with pytest.raises(UserError):
            PretrainingTransform(**settings)


# ---------------------------------------------------------------------------------------------- colour jitter


def jitter_by_torchvision(image: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """What torchvision makes of the numbers that `draw_jitter` draws."""
    names = ["brightness", "contrast", "saturation"]
    drawn = {adjust.__name__.removeprefix("adjust_"): factor for adjust, factor in draw_jitter(0.4, rng)}
    factors = {f"{name}_factor": drawn[name] for name in names}
    order = {"fn_idx": torch.tensor([names.index(name) for name in drawn]), "hue_factor": None}
    return ColorJitter(0.4, 0.4, 0.4).transform(image, {**factors, **order})


def test_jitter_is_that_of_torchvision() -> None:
    image = noise()
    for seed in range(20):
        views, rng = JITTER(image, random.Random(seed)), random.Random(seed)
        plain = crop_by_hand(image, (24, 32), rng)
        assert torch.equal(views["image"], jitter_by_torchvision(plain, rng))
        assert not torch.equal(views["image"], plain)
        assert views["image"].dtype == torch.uint8


def test_jitter_factors_are_uniform_and_in_any_order() -> None:
    rng = random.Random(0)
    drawn = [draw_jitter(0.4, rng) for _ in range(6000)]
    orders = Counter(tuple(adjust.__name__ for adjust, _ in jitter) for jitter in drawn)
    assert len(orders) == 6
    assert all(abs(count - 1000) < 5 * 30 for count in orders.values())  # five std
    for name in ("adjust_brightness", "adjust_contrast", "adjust_saturation"):
        factors = torch.tensor([factor for jitter in drawn for adjust, factor in jitter if adjust.__name__ == name])
        for quantile in (0.0, 0.25, 0.5, 0.75, 1.0):
            assert abs(factors.quantile(quantile) - (0.6 + 0.8 * quantile)) < 0.03
        assert 0.6 <= factors.min() <= factors.max() <= 1.4


def test_no_jitter_draws_no_number() -> None:
    image = noise()
    for seed in range(5):
        used, rng = random.Random(seed), random.Random(seed)
        view = PretrainingTransform((24, 32), teacher_size=(21, 28))(image, used)["image"]
        assert torch.equal(view, crop_by_hand(image, (24, 32), rng))
        assert used.getstate() == rng.getstate()


def test_the_strongest_jitter() -> None:
    transform = PretrainingTransform((24, 32), color_jitter=1.0)
    means = [transform(noise(), random.Random(seed))["image"].float().mean().item() for seed in range(100)]
    assert min(means) < 20
    assert max(means) > 200


# ---------------------------------------------------------------------------------------------- two views


def test_both_views_are_cut_from_the_same_crop() -> None:
    image = noise()
    transform = PretrainingTransform((24, 32), teacher_size=(21, 28))
    for seed in range(10):
        views = transform(image, random.Random(seed))
        for name, size in (("image", (24, 32)), ("teacher_image", (21, 28))):
            assert torch.equal(views[name], crop_by_hand(image, size, random.Random(seed)))
            assert views[name].is_contiguous()


def test_both_views_show_the_same_place() -> None:
    rows = torch.arange(120, dtype=torch.uint8)[:, None].expand(120, 200)
    columns = torch.arange(200, dtype=torch.uint8).expand(120, 200)
    transform = PretrainingTransform((48, 64), teacher_size=(42, 56))
    flips = set()
    for seed in range(20):
        views = transform(torch.stack((rows, columns, columns)), random.Random(seed))
        larger = resize(views["teacher_image"], [48, 64], InterpolationMode.BICUBIC, antialias=True)
        assert (larger.int() - views["image"].int()).abs().max() <= 2
        flips.add(bool(views["image"][1, 0, 0] > views["image"][1, 0, -1]))
    assert flips == {False, True}


def test_both_views_have_the_same_jitter() -> None:
    image = noise()
    colour = torch.tensor([200, 120, 40], dtype=torch.uint8)[:, None, None].expand(3, 60, 80)
    crops = set()
    for seed in range(20):
        views, rng = JITTER(image, random.Random(seed)), random.Random(seed)
        assert torch.equal(views["teacher_image"], jitter_by_torchvision(crop_by_hand(image, (21, 28), rng), rng))
        # of a single colour the two differ by no more than rounding
        one, other = (view.flatten(1).int() for view in JITTER(colour, random.Random(seed)).values())
        assert (one[:, :1] - other[:, :1]).abs().max() <= 1
        assert (one == one[:, :1]).all()
        crops.add(tuple(one[:, 0].tolist()))
    assert len(crops) == 20


def test_views_depend_on_their_random_numbers_only() -> None:
    image = noise()
    state = random.getstate(), torch.get_rng_state()
    a, b, c = (JITTER(image, random.Random(seed)) for seed in (5, 5, 6))
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert list(a) == ["image", "teacher_image"]
    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]) for name in a)


def test_a_second_view_of_the_same_size_is_none() -> None:
    assert list(TRANSFORM(noise(), random.Random(0))) == ["image"]
    for size in ((8, 12), [8, 12]):
        transform = PretrainingTransform((8, 12), teacher_size=size)
        assert list(transform(noise(), random.Random(0))) == ["image"]


# ---------------------------------------------------------------------------------------------- other images


BANDS = make_pixels(7, torch.int16, (0,), (10_000,), tuple(range(900, 1600, 100)), nodata=-9999)
COUNTS = make_pixels(5, torch.float32, (0.0,) * 5, (9.0,) * 5, (0.5,))
DEEP = make_pixels(1, torch.uint16, (100,), (4095,), (700,))
KINDS = {"bands": BANDS, "counts": COUNTS, "deep": DEEP}


def scene(pixels: Pixels, height: int = 60, width: int = 80) -> torch.Tensor:
    """Noise in the value range, with a corner without data where there is a value for that."""
    rng = np.random.default_rng(0)
    values = rng.uniform(pixels.low[0], pixels.high[0], (pixels.type.channels, height, width))
    if pixels.nodata is not None:
        values[:, :20, :30] = pixels.nodata
    return torch.from_numpy(values).to(getattr(torch, pixels.type.dtype))


class Stored:
    """As an encoded image that is no photograph: what it is asked for is remembered."""

    def __init__(self, image: torch.Tensor) -> None:
        self.image, (self.height, self.width), self.targets = image, image.shape[1:], []
        self.warnings: dict[str, str] = {}

    def decode(self) -> torch.Tensor:
        return self.image

    def decode_crop(self, top: int, left: int, height: int, width: int, target: tuple[int, int]) -> torch.Tensor:
        self.targets.append(target)
        return self.image[:, top : top + height, left : left + width]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and np.array_equal(one.numpy(), other.numpy(), equal_nan=one.is_floating_point())


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_channels_are_cropped_resized_and_mirrored(kind: str) -> None:
    pixels, image = KINDS[kind], scene(KINDS[kind])
    transform = PretrainingTransform((24, 32), teacher_size=(21, 28), pixels=pixels)
    flips = 0
    for seed in range(10):
        rng = random.Random(seed)
        top, left, height, width = draw_crop(60, 80, (0.2, 1.0), (3 / 4, 4 / 3), rng)
        crop, flip = image[:, top : top + height, left : left + width], rng.random() < 0.5
        used = random.Random(seed)
        views = transform(image, used)
        assert used.getstate() == rng.getstate()  # nothing more is drawn
        for name, size in (("image", (24, 32)), ("teacher_image", (21, 28))):
            view = resize_pixels(crop, size, "bicubic", pixels.nodata)
            assert same(views[name], mirror(view) if flip else view)
            assert views[name].is_contiguous()
        assert same(transform(Stored(image), random.Random(seed))["image"], views["image"])
        flips += flip
    assert 0 < flips < 10


@pytest.mark.parametrize("kind", KINDS)
def test_turned_crops_are_crops_of_the_turned_image(kind: str) -> None:
    """A gradient from left to right, and the ratio of the crop, in the image as it is shown."""
    pixels = KINDS[kind]
    image, seen = scene(pixels, 200, 300), set()
    wide = PretrainingTransform((8, 24), (0.1, 0.3), (2.0, 3.0), hflip=0, rotate90=True, pixels=pixels)
    for seed in range(40):
        params = wide.draw_params(200, 300, random.Random(seed))
        top, left, height, width = params.box
        assert 0 <= top <= 200 - height
        assert 0 <= left <= 300 - width
        height, width = (width, height) if params.turns % 2 else (height, width)
        assert 1.9 < width / height < 3.1
        stored = Stored(image)
        view = wide(stored, random.Random(seed))["image"]
        assert view.shape == (pixels.type.channels, 8, 24)
        assert stored.targets == [(24, 8) if params.turns % 2 else (8, 24)]
        before = resize_pixels(turn(params.crop(image), params.turns), (8, 24), "bicubic", pixels.nodata)
        difference = (view.double() - before.double()).abs()
        assert difference.max() <= (1 if pixels.nodata is not None or pixels is DEEP else 1e-4)
        seen.add(params.turns)
    assert seen == {0, 1, 2, 3}


def test_turns_and_mirrors_are_all_eight_symmetries_each_as_often() -> None:
    image = noise(16, 16)
    transform = PretrainingTransform((16, 16), (1.0, 1.0), (1.0, 1.0), rotate90=True)
    counts = Counter(transform(image, random.Random(seed))["image"].numpy().tobytes() for seed in range(1600))
    assert len(counts) == 8
    assert all(abs(count - 200) < 5 * 13.3 for count in counts.values())  # five std


@pytest.mark.parametrize("kind", [*KINDS, "photographs"])
def test_channels_are_jittered_and_dropped_after_crops_that_stay(kind: str) -> None:
    pixels = KINDS.get(kind, PHOTOGRAPHS)
    image = scene(pixels) if kind in KINDS else noise()
    plain = PretrainingTransform((24, 32), teacher_size=(21, 28), pixels=pixels)
    changed = PretrainingTransform((24, 32), teacher_size=(21, 28), channel_jitter=0.4, channel_drop=0.3, pixels=pixels)
    dropped = 0
    for seed in range(20):
        views, others, rng = (
            plain(image, random.Random(seed)),
            changed(image, random.Random(seed)),
            random.Random(seed),
        )
        draw_crop(60, 80, (0.2, 1.0), (3 / 4, 4 / 3), rng)
        rng.random()
        drawn = draw_channels(pixels.type.channels, 0.4, 0.3, rng)
        dropped += len(drawn.dropped)
        for name in ("image", "teacher_image"):
            wanted = adjust_channels(views[name], drawn.brightness, drawn.contrast, pixels)
            wanted = drop_channels(wanted, drawn.dropped, pixels) if drawn.dropped else wanted
            assert same(others[name], wanted)
            assert not same(others[name], views[name])
            if pixels.nodata is not None:
                assert torch.equal(others[name] == pixels.nodata, views[name] == pixels.nodata)
    assert dropped > 0 or pixels.type.channels == 1


def test_each_channel_has_numbers_of_its_own() -> None:
    rng = random.Random(0)
    drawn = [draw_channels(3, 0.4, 0.2, rng) for _ in range(3000)]
    for name in ("brightness", "contrast"):
        factors = torch.tensor([getattr(params, name) for params in drawn])
        assert factors.shape == (3000, 3)
        assert 0.6 <= factors.min() < 0.61
        assert 1.39 < factors.max() <= 1.4
        assert (factors.mean(dim=0) - 1).abs().max() < 5 * 0.231 / 3000**0.5
        assert torch.corrcoef(factors.T).fill_diagonal_(0).abs().max() < 0.1
    counts = Counter(channel for params in drawn for channel in params.dropped)
    assert all(abs(counts[channel] - 592) < 5 * 22 for channel in range(3))  # less those of all three, a third of each
    assert draw_channels(9, 0.0, 0.0, rng) == ((), (), ())


def test_one_channel_stays_at_least() -> None:
    rng = random.Random(0)
    kept = Counter(tuple(sorted({0, 1, 2} - {*draw_channels(3, 0.0, 1.0, rng).dropped})) for _ in range(300))
    assert set(kept) == {(0,), (1,), (2,)}
    assert draw_channels(1, 0.0, 1.0, rng).dropped == ()


def test_colours_are_for_photographs() -> None:
    words = r"^--data.{} is for RGB photographs, not for images of 7 channels of int16: leave it out, or give --data.ch"
    with pytest.raises(UserError, match=words.format("color-jitter")):
        PretrainingTransform(color_jitter=0.4, pixels=BANDS)
    with pytest.raises(UserError, match=words.format("color-jitter")):
        ClassificationTransform((8, 8), color_jitter=0.4, pixels=BANDS)
    with pytest.raises(UserError, match=words.format("auto-augment")):
        ClassificationTransform((8, 8), auto_augment="rand-m9-mstd0.5-inc1", pixels=BANDS)
    with pytest.raises(UserError, match="not for images of 1 channel of uint16"):
        PretrainingTransform(color_jitter=0.4, pixels=DEEP)


@pytest.mark.parametrize("kind", KINDS)
def test_classifiers_see_other_images_as_pre_training_does(kind: str) -> None:
    pixels, image = KINDS[kind], scene(KINDS[kind])
    options = {"rotate90": True, "channel_jitter": 0.3, "channel_drop": 0.2, "pixels": pixels}
    ours = ClassificationTransform((24, 32), (0.3, 0.9), (0.5, 2.0), "bilinear", 0.3, **options)
    crops = PretrainingTransform((24, 32), (0.3, 0.9), (0.5, 2.0), "bilinear", 0.3, **options)
    for seed in range(5):
        for sample in (image, Stored(image)):
            view = ours(sample, random.Random(seed), 4)
            assert same(view["image"], crops(image, random.Random(seed))["image"])
            assert int(view["label"]) == 4


def test_photographs_of_classifiers_are_turned_before_timm_and_jittered_after() -> None:
    image = noise()
    own = ClassificationTransform((24, 32), auto_augment="rand-m9-mstd0.5-inc1", rotate90=True, channel_jitter=0.3)
    timms = ClassificationTransform((24, 32), auto_augment="rand-m9-mstd0.5-inc1")
    for seed in range(8):
        rng = random.Random(seed)
        turned = turn(image, rng.randrange(4))
        drawn = draw_channels(3, 0.3, 0.0, rng)
        wanted = drawn.apply(timms(turned, rng, 0)["image"], PHOTOGRAPHS)
        assert torch.equal(own(image, random.Random(seed), 0)["image"], wanted)


@pytest.mark.parametrize("size", [(24, 24), (24, 32), (40, 24)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_the_evaluation_of_other_images_sees_what_that_of_photographs_sees(size, crop_pct) -> None:
    """The same place in the same size: timm's own crop of an 8-bit copy differs by rounding alone."""
    for height, width in ((50, 70), (71, 50), (33, 33), (200, 31), (24, 24)):
        coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(1)) * 200 + 20
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 255)
        image = smooth.round().to(torch.uint8)
        photograph = EvaluationTransform(size, crop_pct, "bilinear")(image)
        deep = make_pixels(3, torch.uint16, (0,), (65535,), (0,))
        view = EvaluationTransform(size, crop_pct, "bilinear", deep)(image.to(torch.int32).mul(257).to(torch.uint16))
        assert (view.dtype, view.shape, view.is_contiguous()) == (torch.uint16, photograph.shape, True)
        assert (view.double() / 257 - photograph.double()).abs().max() < 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_centre_crops_of_other_images(kind: str) -> None:
    pixels, image = KINDS[kind], scene(KINDS[kind])
    view = center_crop(image, (16, 16), pixels.nodata)
    assert same(view, resize_pixels(image[:, :, 10:70], (16, 16), "bicubic", pixels.nodata))
    assert view.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluation_knows_what_has_no_data(kind: str) -> None:
    pixels, image = KINDS[kind], scene(KINDS[kind])
    if pixels is COUNTS:
        image[:, :20, :30] = float("nan")
    for view in (
        EvaluationTransform((30, 30), 1.0, pixels=pixels)(image),
        center_crop(image, (30, 30), pixels.nodata),
    ):
        assert view.shape == (pixels.type.channels, 30, 30)
        assert view.dtype == getattr(torch, pixels.type.dtype)
        empty = view.isnan() if pixels is COUNTS else view == (pixels.nodata if pixels.nodata is not None else -1)
        assert bool(empty[:, :8, :8].all()) == (pixels is not DEEP)
        assert not empty[:, 12:].any()
        values = view[~empty].double()
        assert pixels.low[0] <= values.min()
        assert values.max() <= pixels.high[0]
