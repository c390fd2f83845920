"""Images that the training process decodes and augments equal those of the worker processes."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stored_pixels import make_pixels
from torch.utils._pytree import tree_leaves

from itpn.cli import main
from itpn.data.augment import PretrainingTransform
from itpn.data.decode import EncodedImage
from itpn.data.files import find_images
from itpn.data.gpu_decoding import DECODED_AT_ONCE, GpuTransform, collate_encoded
from itpn.data.loader import TrainingLoader
from itpn.errors import UserError
from itpn.tasks.configs import (
    OptimizerConfig,
    PretrainingConfig,
    PretrainingDataConfig,
    PretrainingModelConfig,
    TrainerConfig,
)
from itpn.tasks.pretraining import data as pretraining
from itpn.tasks.run import train
from itpn.training.launch import Devices

TRANSFORM = PretrainingTransform((24, 32), color_jitter=0.4, teacher_size=(21, 28))
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    """JPEGs of many kinds, and other formats."""
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "images").mkdir()
    for number in range(20):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        image = coarse.resize((61, 43), Image.Resampling.BICUBIC)
        kinds = [
            ("jpg", {}),
            ("jpg", {"progressive": True}),
            ("jpg", {"exif": turned}),
            ("jpg", {"mode": "L"}),
            ("jpg", {"mode": "CMYK"}),
            ("png", {}),
        ]
        suffix, options = kinds[number % len(kinds)]
        options = dict(options)
        image.convert(options.pop("mode", "RGB")).save(tmp_path / f"images/{number:02d}.{suffix}", **options)
    return tmp_path / "images"


def load(
    folder: Path, on_device: bool, num_workers: int = 0, batches: int = 6, views: PretrainingTransform = TRANSFORM
) -> list[dict]:
    options = {"batch_size": 4, "num_workers": num_workers, "seed": 3}
    source = find_images([folder])
    if not on_device:
        loader = TrainingLoader(source, views, **options)
        return [batch for _, batch in zip(range(batches), (b for _ in range(9) for b in loader), strict=False)]
    transform = GpuTransform(views)
    loader = TrainingLoader(source, transform, collate=collate_encoded, finish_batch=transform.finish_batch, **options)
    taken = [batch for _, batch in zip(range(batches), (b for _ in range(9) for b in loader), strict=False)]
    loader.close()
    return [loader.finish(batch, CPU) for batch in taken]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_batches(folder, num_workers):
    for one, other in zip(load(folder, False), load(folder, True, num_workers), strict=True):
        assert one["key"] == other["key"]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["teacher_image"], other["teacher_image"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_turned_crops_with_channels_of_their_own(folder, num_workers):
    views = replace(TRANSFORM, rotate90=True, channel_jitter=0.3, channel_drop=0.3)
    for one, other in zip(load(folder, False, 0, 6, views), load(folder, True, num_workers, 6, views), strict=True):
        assert one["image"].shape == (4, 3, 24, 32)
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["teacher_image"], other["teacher_image"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_that_are_no_photographs_are_left_to_the_workers(tmp_path, num_workers):
    rng = np.random.default_rng(0)
    for number in range(9):
        np.save(tmp_path / f"{number}.npy", rng.integers(0, 5000, (4, 50, 60), dtype=np.uint16))
    pixels = make_pixels(4, torch.uint16, (0,), (5000,), (2000,), nodata=0)
    views = PretrainingTransform((24, 32), teacher_size=(21, 28), rotate90=True, channel_jitter=0.3, pixels=pixels)
    batches = load(tmp_path, False, 0, 4, views), load(tmp_path, True, num_workers, 4, views)
    for one, other in zip(*batches, strict=True):
        assert one["key"] == other["key"]
        assert (other["image"].dtype, other["image"].shape) == (torch.uint16, (4, 4, 24, 32))
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["teacher_image"], other["teacher_image"])


def test_a_corrupt_file_is_replaced_and_named(folder):
    path = folder / "00.jpg"
    path.write_bytes(path.read_bytes()[:700])  # its header is whole
    found = False
    for whole, batch in zip(load(folder, False), load(folder, True), strict=True):
        assert batch["image"].shape == whole["image"].shape == (4, 3, 24, 32)
        if str(path) in batch["key"]:
            found = True
            place = batch["key"].index(str(path))
            assert [name for name, _ in batch["corrupt"]] == [str(path)]
            assert torch.equal(batch["image"][place], batch["image"][place - 1 if place else 1])
    assert found


def test_nothing_readable(folder):
    data = (folder / "00.jpg").read_bytes()[:700]
    sample = GpuTransform(TRANSFORM)(EncodedImage(data), random.Random(0))
    batch = {**collate_encoded([sample]), "key": ["a.jpg"], "corrupt": [], "warnings": {}}
    with pytest.raises(UserError, match=r"^no image of a batch can be decoded; the first is a.jpg: "):
        GpuTransform(TRANSFORM).finish_batch(batch, CPU)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_large_batch_needs_few_descriptors(folder, suffix):
    """Between processes each tensor takes one, and many systems allow a thousand."""
    path = next(path for path in sorted(folder.iterdir()) if path.suffix == f".{suffix}")
    samples = [GpuTransform(TRANSFORM)(EncodedImage(path.read_bytes()), random.Random(n)) for n in range(300)]
    batch = collate_encoded(samples)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(batch)) <= 3
    assert len(samples) > 2 * DECODED_AT_ONCE
    batch |= {"key": [str(n) for n in range(300)], "corrupt": [], "warnings": {}}
    views = GpuTransform(TRANSFORM).finish_batch(batch, CPU)
    for number in (0, DECODED_AT_ONCE, 299):
        own = TRANSFORM(EncodedImage(path.read_bytes()), random.Random(number))
        assert torch.equal(views["image"][number], own["image"])


def test_without_a_gpu(folder, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["train", "itpn-pixel_nano", "--data.root", str(folder), "--data.decode", "gpu"]) == 2
    assert "--data.decode gpu needs a GPU, and none is used here: leave it out" in capsys.readouterr().err


def test_a_run(folder, tmp_path, monkeypatch):
    """On a CPU, in place of nvJPEG: the weights equal those of a run with decoding in the worker processes."""
    monkeypatch.setattr(pretraining, "choose_devices", lambda *_: Devices(1, 1, 1, True))
    monkeypatch.setattr(pretraining, "check_nvjpeg", lambda: None)
    weights = []
    for decode in ("workers", "gpu"):
        config = PretrainingConfig(
            model=PretrainingModelConfig(
                "itpn_nano", patch_size=8, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
            ),
            data=PretrainingDataConfig(root=(str(folder),), img_size=32, batch_size=4, num_workers=0, decode=decode),
            optimizer=OptimizerConfig(lr=1e-3),
            trainer=TrainerConfig(max_steps=4, visualize_every_n_steps=100),
            output_dir=str(tmp_path / "runs"),
            name=decode,
        )
        weights.append(load_file(train(config, "test") / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
