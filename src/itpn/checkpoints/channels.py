"""Weights for images of some channels, made to fit images of others."""

import torch
from timm.models._manipulate import adapt_input_conv
from torch import Tensor

from itpn.errors import UserError
from itpn.system.checks import ChannelMap


def check_map(channel_map: ChannelMap, old: int, new: int) -> None:
    """Raise :class:`UserError` for a map that does not lead from ``old`` channels to ``new`` ones."""
    what = f"--model.channel-map {show_map(channel_map)}"
    if len(channel_map) != new:
        raise UserError(f"{what} is of {len(channel_map)} channels, the images have {new}: give one for each")
    if outside := [index for index in kept_channels(channel_map) if not 0 <= index < old]:
        raise UserError(f"{what}: the checkpoint has no channel {outside[0]}, but {old}, counted from 0")
    if not kept_channels(channel_map):
        raise UserError(f"{what} takes no channel of the checkpoint: give at least one")


def show_map(channel_map: ChannelMap) -> str:
    """As on the command line."""
    return " ".join(map(str, channel_map))


def kept_channels(channel_map: ChannelMap) -> list[int]:
    return [index for index in channel_map if index != "-"]


def adapt_channels(weight: Tensor, channels: int, channel_map: ChannelMap | None = None) -> Tensor:
    """A convolution of images, [width, old, h, w], for images of other channels: [width, channels, h, w].

    By a map, what is kept is scaled by timm's rule, the old number of channels over that of the kept ones. Channels
    that are "-" get zeros, so that the network begins as what it was on the others; zero weights of a convolution have
    a gradient, and are learned. Without a map, as timm does it: colours summed, or repeated.
    """
    if channel_map is not None:
        kept = kept_channels(channel_map)
        places = [place for place, index in enumerate(channel_map) if index != "-"]
        mapped = weight.new_zeros(len(weight), channels, *weight.shape[2:])
        scale = weight.shape[1] / len(kept)
        mapped[:, places] = weight[:, kept] if scale == 1 else (weight[:, kept].float() * scale).to(weight.dtype)
        return mapped
    if weight.shape[1] != 3:  # which timm starts from: the same answer to a grey image
        weight = weight.sum(dim=1, keepdim=True).repeat(1, 3, 1, 1) / 3
    return adapt_input_conv(channels, weight)


def adapt_predicted(tensor: Tensor, old: int, new: int, channel_map: ChannelMap | None = None) -> Tensor:
    """Weight or bias that predicts a patch's pixels, (row, col, channel) along the first axis, for other channels.

    Each is predicted as the old one of the map was, or where there is none as their mean.
    """
    values = tensor.unflatten(0, (-1, old))  # [p * p, old, ...]
    mean = values.mean(dim=1, keepdim=True)
    if channel_map is None:
        return mean.expand(-1, new, *mean.shape[2:]).flatten(0, 1)
    columns = [mean if index == "-" else values[:, index : index + 1] for index in channel_map]
    return torch.cat(columns, dim=1).flatten(0, 1)
