"""From uint8 pixels to the normalized input of a network, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """uint8 [B, 3, H, W] -> float32 [B, channels, H, W] around zero.

    Args:
        channels: 3, or 1 for grey.
        mean, std: of pixels in [0, 1], one number or one per channel.
    """

    def __init__(self, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.channels = channels
        self.mean: Tensor
        self.std: Tensor
        for name, values in {"mean": mean, "std": std}.items():
            # a copy: an expanded tensor cannot be sent between processes
            own = torch.tensor(values).expand(channels).reshape(-1, 1, 1).clone()
            self.register_buffer(name, own, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        if self.channels == 1:
            x = (x * x.new_tensor([0.299, 0.587, 0.114]).reshape(-1, 1, 1)).sum(dim=1, keepdim=True)  # ITU-R BT.601
        return (x - self.mean) / self.std

    def undo(self, images: Tensor) -> Tensor:
        """float [B, channels, H, W] -> uint8 [B, 3, H, W]."""
        x = (images * self.std + self.mean).clamp(0, 1) * 255
        return x.round().to(torch.uint8).expand(-1, 3, -1, -1)
