"""Networks as files that run without this package, in ONNX or torch.export's format."""

import contextlib
import importlib.util
import io
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

from itpn.checkpoints.files import Checkpoint
from itpn.errors import ExportFailed, UserError, refusal
from itpn.models.backbone import find_backbone
from itpn.models.pyramid import PyramidBackbone
from itpn.system.console import Output, make_table

Size = tuple[int, int]  # height, width in pixels
Run = Callable[[Tensor], list[Tensor]]  # images to all outputs, in order
Outputs = Callable[[Any, Tensor], dict[str, Tensor]]  # a network and images to outputs by name

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
    """A network with the outputs of its file by name.

    Args:
        outputs: of the network and images [B, in_chans, height, width], to tensors by name.
    """

    def __init__(self, model: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.outputs(self.model, images)


def name_outputs(model: Any, images: Tensor) -> dict[str, Tensor]:
    """``logits`` of a classifier, ``level_1``... of a pyramid, ``stage_1``... of a backbone, finest first."""
    if model.num_classes:
        return {"logits": model(images)}
    if isinstance(model, PyramidBackbone):
        name, maps = "level", model.forward_maps(images)
    else:
        name, maps = "stage", model.forward_intermediates(images, intermediates_only=True)
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


def export(
    model: nn.Module,
    checkpoint: Checkpoint,
    out: Path,
    size: Size | None,
    dynamic_size: bool,
    metadata: Mapping[str, str],
) -> Exported:
    """Write a backbone, pyramid or classifier, by default for images of the size of its position table."""
    height, width = size or find_backbone(model).image_shape[1:]
    return export_model(model, out, (height, width), dynamic_size, metadata)


@torch.no_grad()
def export_model(
    model: nn.Module,
    out: Path,
    size: Size,
    dynamic_size: bool = False,
    metadata: Mapping[str, str] | None = None,
    outputs: Outputs = name_outputs,
) -> Exported:
    """Write a network to a file, and compare what the file computes with PyTorch.

    Args:
        model: a backbone, or a network with one; set to eval mode.
        out: ``.onnx`` or ``.pt2``; not there unless all is well.
        size: of the images [B, in_chans, height, width]; the batch size is open.
        dynamic_size: leave height and width open too, as multiples of the patch size.
        metadata: goes into the file (``metadata_props``, ``extra_files``), the preprocessing for example.
        outputs: what the file computes.

    Raises:
        UserError: see :func:`check_out`; or the network cannot take such images or be written to such a file.
        ExportFailed: the file computes something else than PyTorch.
    """
    check_out(out)
    _check_limits(model, out, dynamic_size)
    network, backbone = NamedOutputs(model, outputs).eval(), find_backbone(model)
    generator = torch.Generator().manual_seed(0)

    def draw(batch: int, size: Size) -> Tensor:
        return torch.randn(batch, backbone.in_chans, *size, generator=generator)

    names = _try(network, backbone, draw(1, size))
    (height, width), patch = size, backbone.patch_size
    checked = [(2, size), (1, size)]
    if dynamic_size:
        checked += [(1, (height + patch, width)), (3, (height, width + 2 * patch))]
        # torch takes sizes of 1 in the example, those of pooled maps too, for fixed
        size = (max(height, 8 * patch), max(width, 8 * patch))
    with writing(out) as partial:
        # traced with the plain attention, whose memory layout does not depend on what the tracing machine has
        with quiet(), sdpa_kernel(SDPBackend.MATH):
            program = _trace(network, draw(2, size), patch if dynamic_size else None)
            form = _write(program, partial, names, metadata or {})
        run = open_exported(partial)
        examples = [draw(batch, size) for batch, size in checked]
        difference = max(compare(run(images), list(network(images).values())) for images in examples)
        check_difference(out, difference)
    return Exported(out, form, *_describe_shapes(program, names), difference, checked)


def _check_limits(model: nn.Module, out: Path, dynamic_size: bool) -> None:
    backbone = find_backbone(model)
    if dynamic_size and backbone.fixed_size:
        raise UserError("token migration and gathering count tokens and windows beforehand: export a fixed size")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if out.suffix == ".onnx" and weights > ONNX_LIMIT:
        raise UserError(f"an .onnx file holds 2 GB, not {weights / 1e9:.1f} GB of weights: export to .pt2")


def _try(network: nn.Module, backbone: Any, images: Tensor) -> list[str]:
    """Names of the outputs, for images that the network can take, and weights that give finite numbers."""
    height, width = images.shape[-2:]
    try:
        backbone.grid_of((height, width))
        outputs = network(images)
    except (ValueError, RuntimeError) as error:  # no multiple of the patch size; too small to pool
        raise UserError(f"the network cannot take images of {height}x{width}: {error}") from error
    if not all(output.isfinite().all() for output in outputs.values()):
        raise UserError("the network's outputs are not finite: its weights are corrupt")
    return list(outputs)


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
    rows: dict[str, str | Path] = {"file": exported.path}
    rows["form"] = f"{exported.form}, {exported.path.stat().st_size / 1e6:.1f} MB"
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


def _describe_shapes(program: ExportedProgram, outputs: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Shapes of the inputs and of the outputs, by name."""
    names = _name_sizes(program)

    def describe(node: torch.fx.Node) -> str:
        return ", ".join(_rename(str(size), names) for size in node.meta["val"].shape)

    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    shapes = {name: describe(node) for name, node in zip(outputs, results, strict=True)}
    return {"images": describe(_images(program))}, shapes


def _write(program: ExportedProgram, path: Path, outputs: list[str], metadata: Mapping[str, str]) -> str:
    """Write a file of the format that its suffix says.

    Returns:
        The format.
    """
    if path.suffix == ".pt2":
        content = io.BytesIO()  # torch aborts the process where it writes to a full disk itself
        torch.export.save(program, content, extra_files=dict(metadata))
        path.write_bytes(content.getbuffer())
        return f"torch.export of torch {torch.__version__}"
    import onnx

    names = _name_sizes(program)
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


def open_exported(path: Path, name: str = "images") -> Run:
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda images: list(module(images).values())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


def compare(found: list[Tensor], expected: list[Tensor]) -> float:
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
def quiet() -> Iterator[None]:
    """Without what torch.onnx and onnxscript log and warn of on every export."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
