"""Decoding and augmentation on the GPU: worker processes read files, nvJPEG decodes them."""

import io
import random
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from itpn.data.augment import AugmentParams, PretrainingTransform
from itpn.data.batches import Batch, View, stack
from itpn.data.decode import EncodedImage, UnreadableImage, decode_image, reason_of
from itpn.errors import UserError

DECODED_AT_ONCE = 32  # whole images that are in the device's memory together


class GpuTransform:
    """``transform``, with decoding and augmentation of JPEGs left to the device.

    A worker process calls it and :func:`collate_encoded`; the training process calls :meth:`finish_batch`. Random
    parameters are those that ``transform`` draws. Files that nvJPEG cannot decode as needed (other formats, images of
    other channels and depths, CMYK JPEGs, JPEGs with an EXIF orientation) are decoded and augmented in the worker
    process.
    """

    def __init__(self, transform: PretrainingTransform) -> None:
        self.transform = transform

    def __call__(self, image: EncodedImage, rng: random.Random) -> View:
        """Of a JPEG "encoded" uint8 [bytes] and its "params"; of other files the "views"; what is missing is None."""
        if not getattr(image, "is_upright_jpeg", False):  # an image that is no photograph has no such thing
            return {"encoded": None, "params": None, "views": self.transform(image, rng)}
        encoded = torch.frombuffer(bytearray(image.data), dtype=torch.uint8)  # a copy: bytes are read-only
        return {"encoded": encoded, "params": self.transform.draw_params(image.height, image.width, rng), "views": None}

    def finish_batch(self, batch: Batch, device: torch.device) -> Batch:
        """Decode and augment a batch of :func:`collate_encoded` on the device.

        The (name, reason) of a corrupt file is added to "corrupt". The image before it in the batch replaces it, or
        the first readable one.

        Returns:
            The batch with "image" [B, C, H, W], and "teacher_image" where ``transform`` makes one.

        Raises:
            UserError: no image of the batch can be read.
        """
        if device.type == "cuda":
            # nvJPEG writes at once, on its own stream, into memory that this stream may still read
            torch.cuda.current_stream(device).synchronize()
        corrupt = list(batch["corrupt"])
        if not batch["lengths"]:  # nothing is left to decode, as of images that are no photographs
            ready = {name: views.to(device, non_blocking=True) for name, views in batch["views"].items()}
            return {"key": batch["key"], "corrupt": corrupt, "warnings": batch["warnings"], **ready}
        views = list(self._make_views(batch, device, corrupt))
        latest = next((view for view in views if view is not None), None)
        if latest is None:
            raise UserError(f"no image of a batch can be decoded; the first is {corrupt[0][0]}: {corrupt[0][1]}")
        filled = []
        for view in views:
            latest = latest if view is None else view
            filled.append(latest)
        return {"key": batch["key"], "corrupt": corrupt, "warnings": batch["warnings"], **stack(filled)}

    def _make_views(
        self, batch: Batch, device: torch.device, corrupt: list[tuple[str, str]]
    ) -> Iterator[dict[str, Tensor] | None]:
        """The views of each image, None for a corrupt file, which is added to ``corrupt``."""
        encoded = iter(batch["encoded"].split(batch["lengths"]))
        ready = {name: views.to(device, non_blocking=True) for name, views in batch["views"].items()}
        used = 0
        for begin in range(0, len(batch["params"]), DECODED_AT_ONCE):
            chunk: list[AugmentParams | None] = batch["params"][begin : begin + DECODED_AT_ONCE]
            decoded = iter(_decode([next(encoded) for params in chunk if params is not None], device))
            for key, params in zip(batch["key"][begin : begin + DECODED_AT_ONCE], chunk, strict=True):
                if params is None:
                    yield {name: own[used] for name, own in ready.items()}
                    used += 1
                    continue
                image = next(decoded)
                if isinstance(image, UnreadableImage):
                    corrupt.append((key, str(image)))
                    yield None
                else:
                    yield self.transform.make_views(params.crop(image), params)


def collate_encoded(samples: list[View]) -> Batch:
    """A batch for :meth:`GpuTransform.finish_batch`, in few tensors: each takes a file descriptor between processes.

    Returns:
        "params": the augmentation parameters of each image, None for one that is augmented already; "encoded": all
        JPEGs in a row, uint8 [bytes], and their "lengths"; "views": those of images augmented already, stacked.
    """
    encoded = [sample["encoded"] for sample in samples if sample["encoded"] is not None]
    views = [sample["views"] for sample in samples if sample["views"] is not None]
    return {
        "params": [sample["params"] for sample in samples],
        "encoded": torch.cat(encoded) if encoded else torch.empty(0, dtype=torch.uint8),
        "lengths": [len(one) for one in encoded],
        "views": stack(views) if views else {},
    }


def check_nvjpeg() -> None:
    """Raise :class:`UserError` if torchvision cannot decode on the GPU."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decode_jpeg(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), device="cuda")
    except RuntimeError as error:
        raise UserError(f"--data.decode gpu does not work here: {reason_of(error)}") from error


def _decode(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor | UnreadableImage]:
    """Decode JPEGs to uint8 [3, height, width] on the device: together, or one by one if that fails."""
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
        try:  # nvJPEG does not decode every kind of JPEG
            return decode_image(encoded.numpy().tobytes(), max_pixels=None).to(device)  # the worker has checked it
        except UnreadableImage:
            return UnreadableImage(reason_of(error))
