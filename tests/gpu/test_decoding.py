"""``--data.decode gpu``: JPEGs decoded and augmented by the GPU are what the CPU makes of them, nearly."""

from pathlib import Path

import pytest
import torch
from torchvision.io import decode_jpeg, read_file

from itpn.data.augment import PretrainingTransform
from itpn.data.files import find_training_images
from itpn.data.gpu_decoding import GpuTransform, collate_encoded
from itpn.data.loader import TrainingLoader

TRANSFORM = PretrainingTransform((64, 96), color_jitter=0.2, teacher_size=(56, 84))


def read(photos: Path, device: torch.device | None = None) -> list[dict]:
    on_device = GpuTransform(TRANSFORM)
    own = {} if device is None else {"collate": collate_encoded, "finish_batch": on_device.finish_batch}
    source = find_training_images([str(photos)])
    transform = TRANSFORM if device is None else on_device
    loader = TrainingLoader(source, transform, batch_size=5, num_workers=0, seed=3, **own)
    return [batch if device is None else loader.finish(batch, device) for batch in loader]


def test_views_are_those_of_the_cpu(device, photos):
    """Two decoders may differ by some levels of 255, most where colours, kept at half the resolution, change.

    The CPU moreover decodes at a fraction of the size where a crop is much larger than its view. Crops, mirroring and
    jitter are the same: a mirror image differs by far more.
    """
    for views, expected in zip(read(photos, device), read(photos), strict=True):
        assert views["key"] == expected["key"]
        assert views["corrupt"] == []
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
