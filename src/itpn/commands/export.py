"""`itpn export`: a network as a file that runs without this package, in ONNX or torch.export's format."""

import contextlib
import importlib.util
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from itpn.checkpoints.architecture import Task, read_architecture
from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.loading import load_found
from itpn.data.shapes import draw_scene
from itpn.errors import ExportFailed, UserError, refusal
from itpn.models.detector import Detector
from itpn.models.hivit import HiViT, find_backbone
from itpn.models.pyramid import PyramidBackbone
from itpn.models.segmenter import Segmenter
from itpn.system.console import Output, print_aside
from itpn.training.summary import make_table

Size = tuple[int, int]  # height, width in pixels
Run = Callable[[Tensor], list[Tensor]]  # images to all outputs, in order

PACKAGES = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}
TOLERANCE = 1e-4  # of the largest value; measured differences are near 1e-6
ONNX_LIMIT = 2e9  # bytes of a protocol buffer


@dataclass
class Exported:
    """A written and checked file."""

    path: Path
    form: str
    inputs: dict[str, str]  # name to shape
    outputs: dict[str, str]
    difference: float  # from PyTorch, the largest over all outputs: max |a - b| / max |b|
    checked: list[tuple[int, Size]]  # the batch and image sizes compared


class NamedOutputs(nn.Module):
    """A network with the outputs of its file: ``logits``, or maps ``stage_1``... or ``level_1``..., finest first."""

    def __init__(self, model: HiViT | PyramidBackbone | Segmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if isinstance(self.model, Segmenter):
            return {"logits": self.model(images)["out"]}
        if isinstance(self.model, PyramidBackbone):
            name, maps = "level", self.model.forward_maps(images)
        elif not self.model.num_classes:
            name, maps = "stage", self.model.forward_intermediates(images, intermediates_only=True)
        else:
            return {"logits": self.model(images)}
        return {f"{name}_{i}": m for i, m in enumerate(maps, start=1)}


def check_out(out: Path) -> None:
    """Find out early whether a file can be written.

    Raises:
        UserError: an unknown suffix, packages that are not installed, a folder that cannot be written to.
    """
    if out.suffix not in PACKAGES:
        raise UserError(f"--out {out} must end with .onnx (ONNX) or .pt2 (torch.export)")
    missing = [package for package in PACKAGES[out.suffix] if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"writing {out.suffix} needs {', '.join(missing)}: pip install 'itpn[export]'")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(f"--out {out} cannot be written", error) from error


def export_checkpoint(
    checkpoint: str, out: Path, task: Task | None, size: Size | None, dynamic_size: bool, **overrides: Any
) -> None:
    """Export what a checkpoint holds, with its preprocessing in the file, and print what was written.

    Args:
        task: see :func:`itpn.load`; by default the first that the file has everything for, pre-training left aside.
        size: of the images; None for what the file's position table is made for.

    Raises:
        UserError: see :func:`itpn.load` and :func:`export_model`.
    """
    found = read_checkpoint(checkpoint)
    if task is None:
        task = next(task for task in read_architecture(found).tasks if task != "pretraining")
    model, notes = load_found(found, task, **overrides)
    assert isinstance(model, HiViT | PyramidBackbone | Detector | Segmenter)
    for note in notes:
        print_aside(note)
    backbone = find_backbone(model)
    own = backbone.image_shape[1:]
    if isinstance(model, Segmenter):  # that of the crops that it was trained on
        own = tuple(found.preprocessing.get("size", own))
    metadata = {"source": Path(checkpoint).name, "task": str(task)}
    metadata |= {n: json.dumps(found.metadata[n]) for n in ("preprocessing", "classes") if n in found.metadata}
    if isinstance(model, Detector):
        if dynamic_size:
            raise UserError("a detector is exported for images of one size: leave out --dynamic-size")
        print_exported(export_detector(model, out, size or (min(model.transform.min_size),) * 2, metadata))
    else:
        print_exported(export_model(model, out, size or own, dynamic_size, metadata))


@torch.no_grad()
def export_model(
    model: nn.Module, out: Path, size: Size, dynamic_size: bool = False, metadata: Mapping[str, str] | None = None
) -> Exported:
    """Write a network to a file, and compare what the file computes with PyTorch.

    Args:
        model: a :class:`HiViT`, with or without classifier, a :class:`PyramidBackbone` or a :class:`Segmenter`; set to
            eval mode.
        out: ``.onnx`` or ``.pt2``; not there unless all is well.
        size: of the images [B, in_chans, height, width]; the batch size is open.
        dynamic_size: leave height and width open too, as multiples of the patch size.
        metadata: goes into the file (``metadata_props``, ``extra_files``), the preprocessing for example.

    Raises:
        UserError: see :func:`check_out`; or the network cannot take such images or be written to such a file.
        ExportFailed: the file computes something else than PyTorch.
    """
    check_out(out)
    if not isinstance(model, HiViT | PyramidBackbone | Segmenter):
        raise UserError(
            f"only backbones, pyramids, classifiers and segmenters can be exported, not {type(model).__name__}"
        )
    if dynamic_size and isinstance(model, Segmenter):
        raise UserError("a segmenter is exported for images of one size, whose maps it pools: leave out --dynamic-size")
    backbone = find_backbone(model)
    if dynamic_size and (backbone.migrate_ratio or backbone.gather_window):
        raise UserError("token migration and gathering count tokens and windows beforehand: export a fixed size")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if out.suffix == ".onnx" and weights > ONNX_LIMIT:
        raise UserError(f"an .onnx file holds 2 GB, not {weights / 1e9:.1f} GB of weights: export to .pt2")

    network = NamedOutputs(model).eval()
    generator = torch.Generator().manual_seed(0)

    def draw(batch: int, size: Size) -> Tensor:
        return torch.randn(batch, backbone.patch_embed.proj.in_channels, *size, generator=generator)

    try:
        backbone.grid_of(size)
        tried = network(draw(1, size))
    except (ValueError, RuntimeError) as error:  # no multiple of the patch size; too small to pool
        raise UserError(f"the network cannot take images of {size[0]}x{size[1]}: {error}") from error
    if not all(output.isfinite().all() for output in tried.values()):
        raise UserError("the network's outputs are not finite: its weights are damaged")

    height, width = size
    patch = backbone.patch_size
    checked = [(2, size), (1, size)]
    if dynamic_size:
        checked += [(1, (height + patch, width)), (3, (height, width + 2 * patch))]
        # torch takes sizes of 1 in the example, those of pooled maps too, for fixed
        size = (max(height, 8 * patch), max(width, 8 * patch))
    with writing(out) as partial:
        # traced with the plain attention, whose memory layout does not depend on what the tracing machine has
        with _quiet(), sdpa_kernel(SDPBackend.MATH):
            program = _trace(network, draw(2, size), patch if dynamic_size else None)
            names = _name_sizes(program)
            if out.suffix == ".onnx":
                form = _write_onnx(program, partial, list(tried), names, metadata or {})
            else:
                content = io.BytesIO()  # torch aborts the process where it writes to a full disk itself
                torch.export.save(program, content, extra_files=dict(metadata or {}))
                partial.write_bytes(content.getbuffer())
                form = f"torch.export of torch {torch.__version__}"
        run = _open(partial)
        examples = [draw(batch, size) for batch, size in checked]
        difference = max(_compare(run(images), list(network(images).values())) for images in examples)
        check_difference(out, difference)
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    outputs = {name: _describe(node, names) for name, node in zip(tried, results, strict=True)}
    return Exported(out, form, {"images": _describe(_images(program), names)}, outputs, difference, checked)


@torch.no_grad()
def export_detector(model: Detector, out: Path, size: Size, metadata: Mapping[str, str] | None = None) -> Exported:
    """Write a detector to an ONNX file, and compare what the file finds with what PyTorch does.

    Through torch's older exporter, for which torchvision's detectors are written; the newer one and torch.export do not
    take them.

    Args:
        size: of the one image [3, height, width] in [0, 1], which the file takes at a time and does not resize.

    Raises:
        UserError: see :func:`check_out`; or a file of another format.
        ExportFailed: the file finds something else than PyTorch.
    """
    check_out(out)
    if out.suffix != ".onnx":
        raise UserError(f"a detector is exported to .onnx, not to {out.suffix}: torch.export does not take it")
    import onnx

    model = model.eval()
    names = ["boxes", "labels", "scores", *(["masks"] if model.has_masks else [])]
    images = [draw_example(number, size) for number in range(4)]

    def write(path: Path) -> tuple[float, int]:
        """Returns the largest difference and how many objects there were to compare."""
        with _quiet(), sdpa_kernel(SDPBackend.MATH):
            torch.onnx.export(
                model, ([images[0]],), path, dynamo=False, opset_version=17, input_names=["image"], output_names=names
            )
        stored = onnx.load(path)
        del stored.graph.value_info[:]  # shapes inside, as many as there happened to be: a runtime complains of others
        onnx.helper.set_model_props(stored, dict(metadata or {}))
        onnx.save(stored, path)
        run = _open(path, "image")
        found = [model([image])[0] for image in images]
        differences = [
            _compare(run(image), [one[name].float() for name in names])
            for image, one in zip(images, found, strict=True)
        ]
        return max(differences), sum(len(one["boxes"]) for one in found)

    resize, heads = model.transform, model.roi_heads
    before = resize.min_size, resize.max_size, heads.score_thresh
    resize.min_size, resize.max_size = (min(size),), max(size)  # the graph takes images as the network sees them
    try:
        with writing(out) as partial:
            difference, count = write(partial)
            if not count:  # of nothing: compare the same graph with all that it does not find worth a mention
                heads.score_thresh = 0.0
                every = partial.with_name(f"{partial.stem}.all.onnx")
                try:
                    difference, count = write(every)
                finally:
                    every.unlink(missing_ok=True)
            check_difference(out, difference)
    finally:
        resize.min_size, resize.max_size, heads.score_thresh = before
    shapes = {"boxes": "n, 4", "labels": "n", "scores": "n", "masks": f"n, 1, {size[0]}, {size[1]}"}
    outputs = {name: shapes[name] for name in names}
    inputs = {"image": f"3, {size[0]}, {size[1]}"}
    form = f"ONNX opset 17, {count} objects compared"
    return Exported(out, form, inputs, outputs, difference, [(len(images), size)])


def draw_example(number: int, size: Size) -> Tensor:
    """A picture with something in it, float32 [3, height, width] in [0, 1]: noise has no objects."""
    image = draw_scene(0, "val", number, img_size=size).image
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


@contextlib.contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A place to write to, which becomes ``out`` if all goes well."""
    partial = out.with_name(f".{out.stem}.partial{out.suffix}")
    try:
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise refusal(f"--out {out} cannot be written", error) from error
    finally:
        partial.unlink(missing_ok=True)


def check_difference(out: Path, difference: float) -> None:
    if not difference <= TOLERANCE:
        raise ExportFailed(f"{out.name} is not written, for it differs from PyTorch by {difference:.1e}")


def print_exported(exported: Exported) -> None:
    rows = {"file": f"{exported.path}, {exported.path.stat().st_size / 1e6:.1f} MB, {exported.form}"}
    rows |= {f"input {name}": shape for name, shape in exported.inputs.items()}
    rows |= {f"output {name}": shape for name, shape in exported.outputs.items()}
    sizes = ", ".join(f"{batch} of {height}x{width}" for batch, (height, width) in exported.checked)
    rows["largest difference"] = f"{exported.difference:.1e} of the largest value, from PyTorch, for images {sizes}"
    Output().print(make_table("exported", rows), highlight=False)


def _trace(network: nn.Module, images: Tensor, patch: int | None) -> ExportedProgram:
    """The graph for any batch size; and for any size in multiples of ``patch``, if given."""
    sizes: dict[int, Any] = {0: Dim("batch")}
    if patch is not None:
        sizes |= {2: patch * Dim("rows", min=2), 3: patch * Dim("cols", min=2)}
    return torch.export.export(network, (images,), dynamic_shapes={"images": sizes}, strict=False)


def _images(program: ExportedProgram) -> torch.fx.Node:
    name = program.graph_signature.user_inputs[0]
    return next(node for node in program.graph.nodes if node.name == name)


def _name_sizes(program: ExportedProgram) -> dict[str, str]:
    """torch's symbols for open sizes, to names."""
    shape = _images(program).meta["val"].shape
    symbols = [(re.search(r"s\d+", str(shape[axis])), name) for axis, name in ((0, "batch"), (2, "rows"), (3, "cols"))]
    return {found[0]: name for found, name in symbols if found}


def _rename(size: str, names: Mapping[str, str]) -> str:
    return re.sub(r"s\d+", lambda found: names.get(found[0], found[0]), size)


def _describe(node: torch.fx.Node, names: Mapping[str, str]) -> str:
    return ", ".join(_rename(str(size), names) for size in node.meta["val"].shape)


def _write_onnx(
    program: ExportedProgram, path: Path, outputs: list[str], names: Mapping[str, str], metadata: Mapping[str, str]
) -> str:
    import onnx

    written = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=outputs)
    assert written is not None
    model = written.model_proto
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = _rename(size.dim_param, names)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)
    return f"ONNX opset {next(used.version for used in model.opset_import if not used.domain)}"


def _open(path: Path, name: str = "images") -> Run:
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda images: list(module(images).values())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


def _compare(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any output, relative to its largest value; inf for other shapes or no numbers."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape or not ours.isfinite().all():
            return float("inf")
        if not theirs.numel():
            continue
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)))
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx and onnxscript log and warn of on every export."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
