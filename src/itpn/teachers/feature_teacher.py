"""A frozen teacher, whatever network it has, and the builders of teachers that are no models of timm."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from itpn.data.channels import check_channels, scale_channels
from itpn.data.image_type import PHOTOGRAPHS, Pixels
from itpn.errors import UserError
from itpn.models.position import Grid


@dataclass(frozen=True)
class RGBView:
    """What a teacher of photographs sees of images of any channels and depth.

    Attributes:
        channels: those that are its red, green and blue, by index.
        pixels: of the images: the value range is from black to white, and pixels without data are black.
    """

    channels: tuple[int, int, int]
    pixels: Pixels = PHOTOGRAPHS

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] of any dtype -> float32 [B, 3, H, W] in [0, 1]."""
        own = self.pixels
        return scale_channels(images, self.channels, own.low, own.high, own.nodata)


def choose_channels(teacher: str, channels: tuple[int, int, int] | None, count: int) -> tuple[int, int, int]:
    """The channels that a teacher of photographs sees of images.

    Args:
        teacher: its name.
        channels: of `--teacher.channels`, if they are given.
        count: channels of the images.

    Raises:
        UserError: they are not given and not clear, or images have no such channel.
    """
    if channels is None:
        if count != 3:
            example = "0 0 0" if count == 1 else "3 2 1"
            have = "one channel" if count == 1 else f"{count} channels"
            raise UserError(
                f"teacher {teacher} sees red, green and blue, and the images have {have}: say which it sees as these, "
                f"counted from 0, e.g. --teacher.channels {example}"
            )
        return (0, 1, 2)
    check_channels("--teacher.channels", channels, count)
    return channels


class FeatureTeacher(nn.Module):
    """A frozen network: images to one feature vector per patch.

    Args:
        name: as the user gave it.
        tower: the network: normalized images [B, 3, h, w] -> features [B, rows, cols, D].
        grid: rows and columns of the student's patches.
        img_size: height and width in pixels of the teacher's images.
        width: size D of a feature vector.
        mean, std: normalization of its images in [0, 1], three numbers each.

    Attributes:
        view: what it sees of images that are not photographs; None for photographs as they are.
        sha256: of the file or files of its weights; None where there are none to be seen.
        licence: of its weights, and who says so; None where it is not known.
    """

    mean: Tensor
    std: Tensor
    view: RGBView | None = None
    sha256: str | None = None
    licence: str | None = None

    def __init__(
        self,
        name: str,
        tower: nn.Module,
        grid: Grid,
        img_size: tuple[int, int],
        width: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.name = name
        self.tower = tower
        self.grid = grid
        self.img_size = img_size
        self.width = width
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FeatureTeacher":
        """Stay in eval mode, also when a parent module switches to training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of all patches, row-major.

        Args:
            images: uint8 [B, 3, h, w], or float in [0, 1], of ``img_size``; with a view, what that is of.

        Returns:
            float32 [B, N, D].

        Raises:
            ValueError: the images are of another size.
        """
        if tuple(images.shape[-2:]) != self.img_size:
            raise ValueError(f"the teacher wants images of {self.img_size} px, not {tuple(images.shape[-2:])}")
        if self.view is not None:
            x = self.view(images)
        else:
            x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return self.tower((x - self.mean) / self.std).flatten(1, 2).float()


# builders by --teacher.name: (checkpoint, grid of the student's patches) -> teacher; for grid (1, 1) its size is read
TEACHERS: dict[str, Callable[[str | None, Grid], FeatureTeacher]] = {}
