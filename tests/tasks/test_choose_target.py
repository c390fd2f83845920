"""The target of pixels that images ask for (`--model.norm-pix-per auto`), and that a resumed run keeps it."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from itpn.errors import UserError
from itpn.tasks.pretraining.choose_target import FLAT, FLOOR, choose_target, flat_fraction, measure_statistics
from itpn.tasks.pretraining.data import find_data
from itpn.tasks.pretraining.network import build_masked_model, resolve
from itpn.tasks.recipe_files import list_recipes, read_recipe
from itpn.tasks.run import train
from itpn.training.config import read_yaml

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw_cells(noise=1.0, channels=3, size=64, seed=0) -> np.ndarray:
    """Dark grey noise with two bright squares in opposite corners, uint8 [size, size, channels]."""
    rng = np.random.default_rng(seed)
    image = rng.normal(6, noise, (size, size)).clip(0, 255)
    image[4:13, 4:13] = image[size - 13 : size - 4, size - 13 : size - 4] = 180
    return image.round().astype(np.uint8)[..., None].repeat(channels, axis=-1)


@pytest.fixture
def cells(tmp_path):
    (tmp_path / "cells").mkdir()
    for i in range(12):
        Image.fromarray(draw_cells(seed=i)).save(tmp_path / "cells" / f"{i:02d}.png")
    return tmp_path / "cells"


def resolve_for(folder, **model):
    config = read_recipe("itpn-pixel_nano")[1]
    config.data.root = (str(folder),)
    for name, value in model.items():
        setattr(config.model, name, value)
    return resolve(config, None, find_data(config))


def test_fraction_of_flat_patches():
    """Of an image of 2x4 patches, whose std is given in units of the data's, channel by channel."""
    checkers = torch.ones(8, 8)
    checkers[::2] = -1
    checkers /= checkers.std()
    stds = torch.tensor([[0.0, 0.5 * FLAT, 0.9 * FLAT, 1.05 * FLAT], [1.1 * FLAT, 1.0, 2.0, 0.2]])
    scale = torch.tensor([0.1, 0.2])
    image = torch.zeros(2, 16, 32)
    for row in range(2):
        for col in range(4):
            image[:, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] = (
                0.5 + stds[row, col] * scale[:, None, None] * checkers
            )
    image[:, :8, 31] += 1e-7  # rounding is no content
    assert flat_fraction([image], scale.tolist(), 8) == 3 / 8
    image[1, 0, 0] = float("nan")  # of the first patch, which does not count then
    assert flat_fraction([image], scale.tolist(), 8) == 2 / 7
    assert flat_fraction([image[:, :, :30]], scale.tolist(), 8) == 2 / 5  # nor what is left beside whole patches
    assert flat_fraction([torch.full((2, 8, 8), float("nan"))], scale.tolist(), 8) == 0


def test_statistics():
    images = [torch.randint(0, 256, (4, 16, side), dtype=torch.uint8) for side in (16, 16)]
    together = torch.cat([image.flatten(1) for image in images], dim=1).double() / 255
    for given in (images, [image / 255 for image in images]):
        mean, std = measure_statistics(given)
        torch.testing.assert_close(torch.tensor(mean).double(), together.mean(dim=1), atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.tensor(std).double(), together.std(dim=1, correction=0), atol=1e-6, rtol=0)
    assert min(measure_statistics([torch.zeros(1, 8, 8)])[1]) > 0


def test_dark_images_ask_for_a_target_of_each_channel():
    images = [torch.from_numpy(draw_cells(channels=5, seed=i)).permute(2, 0, 1) for i in range(3)]
    mean, std = measure_statistics(images)
    chosen = choose_target(images, mean, std, 8)
    assert chosen == ("channel", FLOOR, mean, std, f"{flat_fraction(images, std, 8):.0%} of the patches are flat")
    assert flat_fraction(images, std, 8) > 0.8


def test_grey_images_ask_for_their_own_statistics():
    grey = [torch.from_numpy(draw_cells(noise=60, seed=i)).permute(2, 0, 1) for i in range(3)]
    mean, std = measure_statistics(grey)
    assert choose_target(grey, mean, std, 8) == ("patch", 0.0, mean, std, "all images are grey")
    # neither one image in colour among them, nor images of one channel, which has no offset from others
    coloured = [*grey[:2], grey[2] // torch.tensor([1, 1, 2], dtype=torch.uint8)[:, None, None]]
    assert choose_target(coloured, *measure_statistics(coloured), 8) == ("patch", 0.0, None, None, "")
    single = [image[:1] for image in grey]
    assert choose_target(single, *measure_statistics(single), 8) == ("patch", 0.0, None, None, "")


def test_a_run_on_dark_images(cells):
    config, notes = resolve_for(cells)
    assert (config.model.norm_pix_per, config.model.norm_pix_floor) == ("channel", FLOOR)
    whole = torch.cat([torch.from_numpy(draw_cells(seed=i)).flatten(0, 1) for i in range(12)]).double() / 255
    torch.testing.assert_close(torch.tensor(config.data.mean), whole.mean(dim=0).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(config.data.std), whole.std(dim=0).float(), atol=1e-4, rtol=0)
    (note,) = notes
    assert "% of the patches are flat: pixels are normalized by mean 0." in note
    assert f"per patch and channel with a noise floor of {FLOOR} (--model.norm-pix-per patch" in note
    config, _ = resolve_for(cells, in_chans=1)
    assert config.model.norm_pix_per == "channel"
    assert len(config.data.mean) == len(config.data.std) == 1


def test_what_is_given_stays(cells):
    config, notes = resolve_for(cells, norm_pix_per="patch")
    assert (config.model.norm_pix_per, config.model.norm_pix_floor, [*notes]) == ("patch", 0.0, [])
    assert (config.data.mean, config.data.std) == IMAGENET
    assert resolve_for(cells, norm_pix_floor=0.3)[0].model.norm_pix_floor == 0.3
    config, notes = resolve_for(cells, norm_pix_loss=False)
    assert (config.model.norm_pix_per, config.data.mean, [*notes]) == ("patch", IMAGENET[0], [])
    config = read_recipe("itpn-pixel_nano")[1]
    config.data.root, config.data.mean, config.data.std = (str(cells),), (0.5,), (0.25,)
    config, (note,) = resolve(config, None, find_data(config))
    assert (config.model.norm_pix_per, config.data.mean, config.data.std) == ("channel", (0.5,), (0.25,))
    assert "normalized by mean 0.500 and std 0.250" in note


def test_a_run_on_grey_images(tmp_path):
    for i in range(4):
        Image.fromarray(draw_cells(noise=60, seed=i)[..., 0]).save(tmp_path / f"{i}.png")
    config, (note,) = resolve_for(tmp_path)
    assert (config.model.norm_pix_per, config.model.norm_pix_floor) == ("patch", 0.0)
    assert len({*config.data.mean}) == len({*config.data.std}) == 1
    assert note.startswith("all images are grey: pixels are normalized by mean 0.")
    assert "floor" not in note


def test_photographs_stay_as_published(photos):
    config, notes = resolve_for(photos)
    assert (config.model.norm_pix_per, config.model.norm_pix_floor, [*notes]) == ("patch", 0.0, [])
    assert (config.data.mean, config.data.std) == IMAGENET


def test_which_recipes_look_at_the_images():
    own = {"itpn-pixel_nano", "itpn-pixel_tiny", "itpn-mfm_nano", "itpn-mfm_tiny", "fast-itpn-pixel_nano"}
    own |= {"fast-itpn-mfm_nano"}
    models = {name: read_recipe(name)[1].model for name in list_recipes()}
    assert {name for name, model in models.items() if getattr(model, "norm_pix_per", "") == "auto"} == own
    # without images it is the published target
    assert build_masked_model(models["itpn-pixel_nano"], (64, 64)).objective.norm_pix_per == "patch"


def make_run(settings, cells):
    config = settings()
    config.model.norm_pix_per, config.data.root = "auto", (str(cells),)
    return config


def test_a_resumed_run_keeps_what_it_chose(settings, cells, train_until, capsys):
    train_until(make_run(settings, cells), 2)
    assert capsys.readouterr().out.count("of the patches are flat") == 1
    for i in range(12):  # other images now, which ask for another target
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(cells / f"{i:02d}.png")
    config = make_run(settings, cells)
    folder = train(config, "test")
    assert "of the patches are flat" not in capsys.readouterr().out
    stored = read_yaml(folder / "config.yaml").values
    assert (stored["model"]["norm_pix_per"], stored["model"]["norm_pix_floor"]) == ("channel", FLOOR)
    assert max(stored["data"]["mean"]) < 0.1
    # what is given now is not what was chosen
    config.trainer.max_epochs, config.data.mean = 4, (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match=r"holds a run with --data\.mean .*, not \[0\.5, 0\.5, 0\.5\]"):
        train(config, "test")


def test_a_run_that_began_before_there_was_a_choice_stays_as_it_was(settings, cells, train_until):
    config = make_run(settings, cells)
    train_until(dataclasses.replace(config, model=dataclasses.replace(config.model, norm_pix_per="patch")), 2)
    folder = train(config, "test")
    stored = read_yaml(folder / "config.yaml").values
    assert (stored["model"]["norm_pix_per"], tuple(stored["data"]["mean"])) == ("patch", IMAGENET[0])
