"""From stored pixels to the normalized input of a network, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from itpn.data.image_type import PHOTOGRAPH, ImageType, ValueRange, dtype_range


class Normalize(nn.Module):
    """Stored pixels [B, C, H, W] -> float32 [B, channels, H, W] around zero.

    Photographs, uint8 [B, 3, H, W], are divided by 255, and become grey where ``channels`` is 1. Of other images the
    value range is clipped and scaled to [0, 1]; pixels without data become 0, the mean.

    Args:
        channels: of the network.
        mean, std: of pixels in [0, 1], one number or one per channel.
        images: what the pixels are.
        value_range: the values that become 0 and 1, of all channels or of each; None for what the type can hold.
        nodata: value of integers without data; floats without data are NaN.
    """

    def __init__(
        self,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        images: ImageType = PHOTOGRAPH,
        value_range: Sequence[ValueRange] | None = None,
        nodata: float | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.images, self.nodata = channels, images, nodata
        self.mean: Tensor
        self.std: Tensor
        self.low: Tensor
        self.span: Tensor
        ranges = list(value_range or [dtype_range(images)])
        low, span = [low for low, _ in ranges], [high - low for low, high in ranges]
        for name, values in {"mean": mean, "std": std, "low": low, "span": span}.items():
            # a copy: an expanded tensor cannot be sent between processes
            own = torch.tensor(values, dtype=torch.float32).expand(channels).reshape(-1, 1, 1).clone()
            self.register_buffer(name, own, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (self.scale(images) - self.mean) / self.std

    def scale(self, images: Tensor) -> Tensor:
        """Stored pixels [..., C, H, W] -> float32 in [0, 1], and the mean where there is no data."""
        if self.images.is_photo:
            x = images.float() / 255
            if self.channels == 1:
                x = (x * x.new_tensor([0.299, 0.587, 0.114]).reshape(-1, 1, 1)).sum(dim=-3, keepdim=True)  # BT.601
            return x
        x = ((images.float() - self.low) / self.span).clamp(0, 1)
        valid = self.find_valid(images)
        return x if valid is None else torch.where(valid, x, self.mean)

    def find_valid(self, images: Tensor) -> Tensor | None:
        """bool [..., C, H, W], True where stored pixels have data; None where all have."""
        if images.is_floating_point():
            return images.isfinite()
        return None if self.nodata is None else images.float() != self.nodata

    def undo(self, images: Tensor) -> Tensor:
        """float [B, channels, H, W] -> stored pixels: of photographs uint8 [B, 3, H, W], of others float32."""
        x = (images * self.std + self.mean).clamp(0, 1)
        if not self.images.is_photo:
            return x * self.span + self.low
        return (x * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
