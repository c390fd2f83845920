"""Images that workers only read: they are decoded, cropped and augmented on the device, by nvJPEG on a GPU."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from itpn.data.augment import Drawn, PretrainingTransform
from itpn.data.decode import EncodedImage, UnreadableImage, decode_image, reason_of
from itpn.data.loader import stack
from itpn.errors import UserError


class Deferred(NamedTuple):
    """An encoded JPEG, uint8 [bytes], and what is to be done to it; or for other files the finished views."""

    encoded: Tensor | None
    drawn: Drawn | None
    views: dict[str, Tensor]


class DeferredTransform:
    """In a worker: reads the header and draws random numbers, the same as ``transform`` does.

    What nvJPEG does not know (other formats, JPEGs in ink or turned by EXIF) is finished here.
    """

    def __init__(self, transform: PretrainingTransform) -> None:
        self.transform = transform

    def __call__(self, image: EncodedImage, rng: random.Random) -> dict[str, Any]:
        if not image.is_upright_jpeg:
            return {"image": Deferred(None, None, self.transform(image, rng))}
        encoded = torch.frombuffer(bytearray(image.data), dtype=torch.uint8)  # a copy: bytes are read-only
        return {"image": Deferred(encoded, self.transform.draw(image.height, image.width, rng), {})}


def finish(batch: dict[str, Any], transform: PretrainingTransform, device: torch.device) -> dict[str, Any]:
    """In the training process: the views of a batch of :class:`Deferred` images, on the device.

    A file that turns out to be broken is added to "broken", and the one before it (or after) takes its place.

    Returns:
        The batch with "image" uint8 [B, 3, H, W], and "teacher_image" where ``transform`` makes one.

    Raises:
        UserError: not one image of the batch can be read.
    """
    deferred: list[Deferred] = batch["image"]
    encoded = [one.encoded for one in deferred if one.encoded is not None]
    decoded = iter(_decode(encoded, device))
    views: list[dict[str, Tensor] | None] = []
    broken = list(batch["broken"])
    for key, one in zip(batch["key"], deferred, strict=True):
        if one.drawn is None:
            views.append({name: view.to(device, non_blocking=True) for name, view in one.views.items()})
            continue
        image = next(decoded)
        if isinstance(image, UnreadableImage):
            broken.append((key, str(image)))
            views.append(None)
        else:
            views.append(transform.make_views(one.drawn.cut(image), one.drawn))
    readable = [view for view in views if view is not None]
    if not readable:
        raise UserError(f"no image of a batch can be decoded; the first is {broken[0][0]}: {broken[0][1]}")
    latest = readable[0]
    filled = []
    for view in views:
        latest = latest if view is None else view
        filled.append(latest)
    return {**batch, **stack(filled), "broken": broken}


def _decode(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor | UnreadableImage]:
    """JPEGs to uint8 [3, height, width] on the device: together, or one by one where they do not go together."""
    if not encoded:
        return []
    try:
        return [*decode_jpeg(list(encoded), mode=ImageReadMode.RGB, device=device)]
    except RuntimeError:
        return [_decode_one(one, device) for one in encoded]


def _decode_one(encoded: Tensor, device: torch.device) -> Tensor | UnreadableImage:
    try:
        return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        try:  # there are kinds that nvJPEG does not know
            return decode_image(encoded.numpy().tobytes()).to(device)
        except UnreadableImage:
            return UnreadableImage(reason_of(error))
