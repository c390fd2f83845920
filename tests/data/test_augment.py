"""Augmentation: where crops lie, what colour jitter does, and that both views of an image are alike."""

import random
from collections import Counter

import pytest
import torch
from torchvision.transforms.v2 import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2.functional import InterpolationMode, resize

from itpn.data.augment import PretrainingTransform, center_crop, draw_crop, draw_jitter
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
