"""The plain composition: the masked model as it is usually written, to be compared with (see pretrain.py).

The same weights and the same loss, without what our own leaves out: all patches are embedded before the masked ones are
dropped, attention is written out, the decoder computes and predicts all patches and the loss forgets the visible ones.
"""

from collections.abc import Collection
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.masked.masked_model import MaskedImageModel
from itpn.models.layers import Attention, PatchEmbed

SAVINGS = ("visible patches embedded", "fused attention", "masked patches predicted", "fused optimizer")


def make_plain(model: MaskedImageModel, without: Collection[str] = SAVINGS) -> MaskedImageModel:
    """Take savings out of a model, in place; the optimiser's are not the model's."""
    if "masked patches predicted" in without:
        model._pick = lambda split, *names: None  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, Attention) and "fused attention" in without:
            module.forward = MethodType(attend, module)  # type: ignore[method-assign]
        elif isinstance(module, PatchEmbed) and "visible patches embedded" in without:
            module.forward = MethodType(embed, module)  # type: ignore[method-assign]
    return model


def embed(self: PatchEmbed, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """[B, C, H, W] -> [B, V, 4, 4, dim], by a convolution of the whole image."""
    x = self.proj(images).permute(0, 2, 3, 1)  # [B, H / 4, W / 4, dim]
    batch, rows, cols, dim = x.shape
    x = self.norm(x).reshape(batch, rows // 4, 4, cols // 4, 4, dim).transpose(2, 3).reshape(batch, -1, 4, 4, dim)
    if visible is None:
        return x
    return x.gather(1, visible[:, :, None, None, None].expand(-1, -1, 4, 4, dim))


def attend(self: Attention, x: Tensor, grid=None, rel_pos_index=None, windows=None, skip: int = 0) -> Tensor:
    """[B, N, C] -> [B, N - skip, C], for a network without relative positions or windows."""
    assert self.rel_pos_grid is None
    assert windows is None
    batch, tokens, dim = x.shape
    q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1)) * (dim // self.num_heads) ** -0.5
    x = F.softmax(scores[:, :, skip:], dim=-1) @ v
    return self.proj(x.transpose(1, 2).reshape(batch, tokens - skip, dim))


def make_plain_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
