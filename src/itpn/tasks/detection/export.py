"""Detectors as ONNX files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from itpn.checkpoints.files import Checkpoint
from itpn.data.scenes import draw_scene
from itpn.errors import UserError
from itpn.models.backbone import find_backbone
from itpn.models.detector import Detector
from itpn.tasks.export import Exported, Size, check_difference, check_out, compare, open_exported, quiet, writing


def export(
    model: Detector,
    checkpoint: Checkpoint,
    out: Path,
    size: Size | None,
    dynamic_size: bool,
    metadata: Mapping[str, str],
) -> Exported:
    """Write a detector for images of one size, by default its short side both ways."""
    if dynamic_size:
        raise UserError("a detector is exported for images of one size: leave out --dynamic-size")
    return export_detector(model, out, size or (min(model.transform.min_size),) * 2, metadata)


@torch.no_grad()
def export_detector(model: Detector, out: Path, size: Size, metadata: Mapping[str, str] | None = None) -> Exported:
    """Write a detector to an ONNX file, and compare what the file finds with what PyTorch does.

    Through torch's older exporter, for which torchvision's detectors are written; the newer one and torch.export do not
    take them.

    Args:
        size: of the one image [in_chans, height, width] in [0, 1], which the file takes at a time and does not resize.

    Raises:
        UserError: see :func:`check_out`; or a file of another format.
        ExportFailed: the file finds something else than PyTorch.
    """
    check_out(out)
    if out.suffix != ".onnx":
        raise UserError(f"a detector is exported to .onnx, not to {out.suffix}: torch.export does not take it")
    model = model.eval()
    names = ["boxes", "labels", "scores", *(["masks"] if model.has_masks else [])]
    channels = find_backbone(model).in_chans
    images = [draw_example(number, size, channels) for number in range(4)]
    resize, heads = model.transform, model.roi_heads
    before = resize.min_size, resize.max_size, heads.score_thresh
    resize.min_size, resize.max_size = (min(size),), max(size)  # the graph takes images as the network sees them
    try:
        with writing(out) as partial:
            difference, count = _write(model, partial, images, names, metadata or {})
            if not count:  # of nothing: compare the same graph with all that it does not find worth a mention
                heads.score_thresh = 0.0
                every = partial.with_name(f"{partial.stem}.all.onnx")
                try:
                    difference, count = _write(model, every, images, names, {})
                finally:
                    every.unlink(missing_ok=True)
            check_difference(out, difference)
    finally:
        resize.min_size, resize.max_size, heads.score_thresh = before
    shapes = {"boxes": "n, 4", "labels": "n", "scores": "n", "masks": f"n, 1, {size[0]}, {size[1]}"}
    outputs = {name: shapes[name] for name in names}
    inputs = {"image": f"{channels}, {size[0]}, {size[1]}"}
    form = f"ONNX opset 17, {count} objects compared"
    return Exported(out, form, inputs, outputs, difference, [(len(images), size)])


def _write(
    model: Detector, path: Path, images: list[Tensor], names: list[str], metadata: Mapping[str, str]
) -> tuple[float, int]:
    """Write the graph, and compare what it finds in some images.

    Returns:
        The largest difference, and how many objects there were to compare.
    """
    import onnx

    with quiet(), sdpa_kernel(SDPBackend.MATH):
        torch.onnx.export(
            model, ([images[0]],), path, dynamo=False, opset_version=17, input_names=["image"], output_names=names
        )
    stored = onnx.load(path)
    del stored.graph.value_info[:]  # shapes inside, as many as there happened to be: a runtime complains of others
    onnx.helper.set_model_props(stored, dict(metadata))
    onnx.save(stored, path)
    run = open_exported(path, "image")
    found = [model([image])[0] for image in images]
    differences = [
        compare(run(image), [one[name].float() for name in names]) for image, one in zip(images, found, strict=True)
    ]
    return max(differences), sum(len(one["boxes"]) for one in found)


def draw_example(number: int, size: Size, channels: int) -> Tensor:
    """An image with objects in it, float32 [channels, height, width] in [0, 1]: noise has no objects."""
    image = draw_scene(0, "val", number, img_size=size).image
    colours = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    return colours[torch.arange(channels) % len(colours)]
