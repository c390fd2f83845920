"""``--data.decode gpu``: JPEGs decoded and augmented by the GPU are what the CPU makes of them, nearly."""

from pathlib import Path

import pytest
import torch
from torchvision.io import decode_jpeg, read_file

from itpn.data.augment import PretrainingTransform
from itpn.data.files import find_training_images
from itpn.data.gpu_decoding import DeferredTransform, collate_deferred, finish
from itpn.data.loader import TrainingLoader

TRANSFORM = PretrainingTransform((64, 96), color_jitter=0.2, teacher_size=(56, 84))


def read(photos: Path, deferred: bool) -> list[dict]:
    transform, own = (DeferredTransform(TRANSFORM), {"collate": collate_deferred}) if deferred else (TRANSFORM, {})
    source = find_training_images([str(photos)])
    loader = TrainingLoader(source, transform, batch_size=5, num_workers=0, seed=3, **own)
    return list(loader)


def test_views_are_those_of_the_cpu(device, photos):
    """Two decoders may differ by some levels of 255, most where colours, kept at half the resolution, change.

    The CPU moreover decodes at a fraction of the size where a crop is much larger than its view. Crops, mirroring and
    jitter are the same: a mirror image differs by far more.
    """
    for batch, expected in zip(read(photos, True), read(photos, False), strict=True):
        views = finish(batch, TRANSFORM, device)
        assert views["key"] == expected["key"]
        assert views["broken"] == []
        for name in ("image", "teacher_image"):
            assert views[name].device.type == device.type
            assert views[name].dtype == torch.uint8
            theirs, ours = expected[name].float(), views[name].cpu().float()
            if device.type == "cpu":
                assert torch.equal(ours, theirs)
            apart = (ours - theirs).abs()
            assert apart.mean(dim=(1, 2, 3)).max() < 4
            assert apart.flatten(1).quantile(0.99, dim=1).max() < 20
            assert (ours.flip(-1) - theirs).abs().mean(dim=(1, 2, 3)).min() > 8


@pytest.mark.gpu
def test_whole_images_are_those_of_the_cpu(photos):
    """Without resizing: libjpeg-turbo and nvJPEG agree to a few levels."""
    for number in (0, 3, 4, 5):  # neither progressive nor grey
        encoded = read_file(str(photos / f"{number:02d}.jpg"))
        ours = decode_jpeg(encoded, mode="RGB", device="cuda").cpu().float()
        apart = (ours - decode_jpeg(encoded, mode="RGB").float()).abs()
        assert apart.mean() < 3
        assert apart.flatten().quantile(0.99) < 16
