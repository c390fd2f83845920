"""Images that workers only read: they are decoded, cropped and augmented on the device, by nvJPEG on a GPU."""

import io
import random
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from itpn.data.augment import PretrainingTransform
from itpn.data.decode import EncodedImage, UnreadableImage, decode_image, reason_of
from itpn.data.loader import stack
from itpn.errors import UserError

AT_A_TIME = 32  # whole images are in the device's memory together


class DeferredTransform:
    """In a worker: reads the header and draws random numbers, the same as ``transform`` does.

    What nvJPEG does not know (other formats, JPEGs in ink or turned by EXIF) is finished here.
    """

    def __init__(self, transform: PretrainingTransform) -> None:
        self.transform = transform

    def __call__(self, image: EncodedImage, rng: random.Random) -> dict[str, Any]:
        """A JPEG as "encoded", uint8 [bytes], and what is "drawn" for it; of other files the finished "views"."""
        if not image.is_upright_jpeg:
            return {"encoded": None, "drawn": None, "views": self.transform(image, rng)}
        encoded = torch.frombuffer(bytearray(image.data), dtype=torch.uint8)  # a copy: bytes are read-only
        return {"encoded": encoded, "drawn": self.transform.draw(image.height, image.width, rng), "views": None}


def collate_deferred(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch for :func:`finish`, in as few tensors as can be: each takes a file descriptor between processes.

    Returns:
        "image" what is drawn for each image, or None; "encoded" all JPEGs in a row, uint8 [bytes], and their "lengths";
        "ready" the finished views, stacked.
    """
    encoded = [sample["encoded"] for sample in samples if sample["encoded"] is not None]
    ready = [sample["views"] for sample in samples if sample["views"] is not None]
    return {
        "image": [sample["drawn"] for sample in samples],
        "encoded": torch.cat(encoded) if encoded else torch.empty(0, dtype=torch.uint8),
        "lengths": [len(one) for one in encoded],
        "ready": stack(ready) if ready else {},
    }


def finish(batch: dict[str, Any], transform: PretrainingTransform, device: torch.device) -> dict[str, Any]:
    """In the training process: the views of a batch of :func:`collate_deferred`, on the device.

    A file that turns out to be broken is added to "broken", and the one before it (or after) takes its place.

    Returns:
        The batch with "image" uint8 [B, 3, H, W], and "teacher_image" where ``transform`` makes one.

    Raises:
        UserError: not one image of the batch can be read.
    """
    if device.type == "cuda":
        # nvJPEG writes at once, on a stream of its own, into memory that this stream may still be reading
        torch.cuda.current_stream(device).synchronize()
    encoded = iter(batch["encoded"].split(batch["lengths"]))
    ready = {name: views.to(device, non_blocking=True) for name, views in batch["ready"].items()}
    done = 0
    views: list[dict[str, Tensor] | None] = []
    broken = list(batch["broken"])
    for begin in range(0, len(batch["image"]), AT_A_TIME):
        chunk = batch["image"][begin : begin + AT_A_TIME]
        decoded = iter(_decode([next(encoded) for drawn in chunk if drawn is not None], device))
        for key, drawn in zip(batch["key"][begin : begin + AT_A_TIME], chunk, strict=True):
            if drawn is None:
                views.append({name: own[done] for name, own in ready.items()})
                done += 1
                continue
            image = next(decoded)
            if isinstance(image, UnreadableImage):
                broken.append((key, str(image)))
                views.append(None)
            else:
                views.append(transform.make_views(drawn.cut(image), drawn))
    readable = [view for view in views if view is not None]
    if not readable:
        raise UserError(f"no image of a batch can be decoded; the first is {broken[0][0]}: {broken[0][1]}")
    latest = readable[0]
    filled = []
    for view in views:
        latest = latest if view is None else view
        filled.append(latest)
    return {"key": batch["key"], "broken": broken, "remarks": batch["remarks"], **stack(filled)}


def check_nvjpeg() -> None:
    """Raise :class:`UserError` where torchvision cannot decode on the GPU."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decode_jpeg(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), device="cuda")
    except RuntimeError as error:
        raise UserError(f"--data.decode gpu does not work here: {reason_of(error)}") from error


def _decode(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor | UnreadableImage]:
    """JPEGs to uint8 [3, height, width] on the device: together, or one by one where they do not go together."""
    if not encoded:
        return []
    try:
        return [*decode_jpeg(list(encoded), mode=ImageReadMode.RGB, device=device)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return [_decode_one(one, device) for one in encoded]


def _decode_one(encoded: Tensor, device: torch.device) -> Tensor | UnreadableImage:
    try:
        return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        try:  # there are kinds that nvJPEG does not know
            return decode_image(encoded.numpy().tobytes(), max_pixels=None).to(device)  # the worker has checked it
        except UnreadableImage:
            return UnreadableImage(reason_of(error))
