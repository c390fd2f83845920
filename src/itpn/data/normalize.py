"""From stored pixels to the normalized input of a network, and back."""

import torch
from torch import Tensor, nn

from itpn.data.channels import is_valid
from itpn.data.image_type import PHOTOGRAPHS, Pixels

WIDE = ("int32", "uint32")  # which float32 does not hold


class Normalize(nn.Module):
    """Stored pixels [B, C, H, W] -> float32 [B, channels, H, W] around zero.

    Photographs, uint8 [B, 3, H, W], become grey where ``channels`` is 1. Of all images the value range is clipped and
    scaled to [0, 1]; pixels without data become 0, the mean.

    Args:
        pixels: what they are.
        channels: of the network; None for those of the images.
    """

    def __init__(self, pixels: Pixels = PHOTOGRAPHS, channels: int | None = None) -> None:
        super().__init__()
        self.pixels, self.channels = pixels, channels or pixels.type.channels
        self.mean: Tensor
        self.std: Tensor
        self.low: Tensor
        self.span: Tensor
        number = torch.float64 if pixels.type.dtype in WIDE else torch.float32
        low, high = (torch.tensor(own, dtype=number) for own in (pixels.low, pixels.high))
        mean, std = (torch.tensor(own, dtype=torch.float32) for own in (pixels.mean, pixels.std))
        for name, values in {"mean": mean, "std": std, "low": low, "span": high - low}.items():
            # a copy: an expanded tensor cannot be sent between processes
            self.register_buffer(name, values.expand(self.channels).reshape(-1, 1, 1).clone(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (self.scale(images) - self.mean) / self.std

    def scale(self, images: Tensor) -> Tensor:
        """Stored pixels [..., C, H, W] -> float32 in [0, 1], and the mean where there is no data."""
        if self.pixels.type.is_photo:
            x = images.float() / 255
            if self.channels == 1:
                x = (x * x.new_tensor([0.299, 0.587, 0.114]).reshape(-1, 1, 1)).sum(dim=-3, keepdim=True)  # BT.601
            return x
        x = ((images.to(self.low.dtype) - self.low) / self.span).clamp(0, 1).float()
        valid = self.find_valid(images)
        return x if valid is None else torch.where(valid, x, self.mean)

    def find_valid(self, images: Tensor) -> Tensor | None:
        """bool [..., C, H, W], True where stored pixels have data; None where all have."""
        if self.pixels.nodata is None and not images.is_floating_point():
            return None
        return is_valid(images, self.pixels.nodata)

    def undo(self, images: Tensor) -> Tensor:
        """float [B, channels, H, W] -> stored pixels: of photographs uint8 [B, 3, H, W], of others float32."""
        x = (images * self.std + self.mean).clamp(0, 1)
        if not self.pixels.type.is_photo:
            return (x * self.span + self.low).float()
        return (x * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
