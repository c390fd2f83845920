"""torch.jit.script for networks whose Python it does not read."""

import warnings

import torch
from torch import Tensor, nn


class Traced(nn.Module):
    """What torch.jit.script makes of a network: its trace, for images of one height and width in any number.

    The network's mode, train or eval, becomes the trace's for good, and so do its parameters' values.

    Args:
        model: what takes images [B, in_chans, H, W].
        shape: of an image, (in_chans, H, W).
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        parameter = next(model.parameters())
        images = torch.zeros(2, *shape, device=parameter.device, dtype=parameter.dtype)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of deprecation, and of sizes becoming constants, which is what is meant
            # nothing random may be checked by running it twice
            self.traced = torch.jit.trace(model, images, strict=False, check_trace=False)

    # torch infers what it returns: a tensor, or maps by name
    def forward(self, images: Tensor):  # type: ignore[no-untyped-def]
        return self.traced(images)
