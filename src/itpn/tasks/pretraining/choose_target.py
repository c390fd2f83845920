"""Which target of pixels the images ask for: the published one, or one of each channel with a noise floor."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from itpn.masked.targets import patchify

FLAT = 0.05  # std of a patch, in units of the data's, below which it is flat: noise is, nuclei and textures are not
MANY = 0.25  # fraction of flat patches: 6 % in photographs of ImageNet and COCO, 45 % in micrographs of nuclei
FLOOR = 0.1  # of the target then, see benchmarks/RESULTS.md


class PixelTarget(NamedTuple):
    """What is predicted, as of the settings of the same names.

    Attributes:
        mean, std: that images are normalized by; None to leave them as they are.
        reason: why it is not the published target; empty for that.
    """

    norm_pix_per: Literal["patch", "channel"] = "patch"
    norm_pix_floor: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    reason: str = ""


def choose_target(
    images: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], patch_size: int
) -> PixelTarget:
    """The published target, unless it would be more of the channels' offsets than of what is in a patch.

    Normalized over all channels, a flat patch is little more than their offsets; and so are half of the values of any
    patch of a grey image that was normalized by statistics of colour images.

    Args:
        images: a sample, each [C, H, W] at the size of a run's crops: uint8, or float in [0, 1] with NaN for no data.
        mean, std: of each channel of the data, of pixels in [0, 1].
    """
    flat = flat_fraction(images, std, patch_size)
    if flat >= MANY:
        return PixelTarget("channel", FLOOR, tuple(mean), tuple(std), f"{flat:.0%} of the patches are flat")
    if len(mean) > 1 and all(torch.equal(image, image[:1].expand_as(image)) for image in images):
        return PixelTarget("patch", 0.0, tuple(mean), tuple(std), "all images are grey")
    return PixelTarget()


def flat_fraction(images: Iterable[Tensor], std: Sequence[float], patch_size: int) -> float:
    """Fraction of the patches whose std, averaged over channels, is below `FLAT` of the data's; of images as above.

    Patches with pixels without data do not count; 0 where there are no others.
    """
    flat = count = 0
    scale = torch.tensor(std).clamp(min=1e-6)
    for image in images:
        height, width = (side // patch_size * patch_size for side in image.shape[-2:])
        x = _to_unit_range(image[None, :, :height, :width])
        own = patchify(x, patch_size).unflatten(-1, (-1, len(image))).std(dim=2) / scale  # [1, N, C]
        own = own.mean(dim=-1)
        flat += int((own < FLAT).sum())
        count += int(own.isfinite().sum())
    return flat / max(count, 1)


def measure_statistics(images: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel of images [C, H, W], uint8 or float in [0, 1], each counting alike."""
    x = [_to_unit_range(image).double().flatten(1) for image in images]
    mean = torch.stack([one.mean(dim=1) for one in x]).mean(dim=0)
    variance = torch.stack([one.square().mean(dim=1) for one in x]).mean(dim=0) - mean**2
    return tuple(mean.tolist()), tuple(variance.clamp(min=1e-12).sqrt().tolist())


def _to_unit_range(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()
