"""A frozen teacher, whatever network it has, and the builders of teachers that are no models of timm."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from itpn.models.position import Grid


class FeatureTeacher(nn.Module):
    """A frozen network: images to one feature vector per patch.

    Args:
        name: as the user gave it.
        tower: the network: normalized images [B, 3, h, w] -> features [B, rows, cols, D].
        grid: rows and columns of the student's patches.
        img_size: height and width in pixels of the teacher's images.
        width: size D of a feature vector.
        mean, std: normalization of its images in [0, 1], three numbers each.
    """

    mean: Tensor
    std: Tensor

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
            images: uint8 [B, 3, h, w], or float in [0, 1], of ``img_size``.

        Returns:
            float32 [B, N, D].

        Raises:
            ValueError: the images are of another size.
        """
        if tuple(images.shape[-2:]) != self.img_size:
            raise ValueError(f"the teacher wants images of {self.img_size} px, not {tuple(images.shape[-2:])}")
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return self.tower((x - self.mean) / self.std).flatten(1, 2).float()


# builders by --teacher.name: (checkpoint, grid of the student's patches) -> teacher; for grid (1, 1) its size is read
TEACHERS: dict[str, Callable[[str | None, Grid], FeatureTeacher]] = {}
