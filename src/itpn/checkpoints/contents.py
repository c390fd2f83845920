"""Which networks a file's tensors are, read from their names and shapes, or from what the file says."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from itpn.checkpoints.adapters import ADAPTERS, Layout
from itpn.checkpoints.adapters.ours import CLASSIFIER, name_levels
from itpn.checkpoints.adapters.renaming import read_our_depths
from itpn.errors import UserError
from itpn.models.build import backbone_arguments
from itpn.models.heads import find_head, heads
from itpn.models.position import Grid, square
from itpn.models.spec import TRAINING_ONLY, NetworkSpec, find_variant
from itpn.models.variants import BACKBONES, PUBLISHED_PYRAMID, PYRAMIDS
from itpn.system.checks import check_type

HEADLESS = ("pyramid", "backbone")  # networks without a head, by name
# what a backbone computes with and no tensor shows
UNSHOWN = ("num_heads", "norm_eps", "migrate_ratio", "migrate_from", "gather_window", "gather_side", "global_pool")


@dataclass(frozen=True)
class Contents:
    """The networks that a file has the tensors of.

    Attributes:
        backbone: arguments of :func:`itpn.models.build.make_backbone`.
        pyramid: arguments of :class:`itpn.models.pyramid.FeaturePyramid`; None where there is none.
        heads: options of each registered head that is there, the richest first.
        levels: the maps that the pyramid gave, see :class:`itpn.models.pyramid.PyramidBackbone`.
        guessed: what the file does not say.
    """

    backbone: dict[str, Any]
    pyramid: dict[str, Any] | None
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    levels: str = "pyramid"
    guessed: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """What can be built whole, the richest first: heads, then "pyramid" and "backbone"."""
        return [*self.heads, *(["pyramid"] if self.pyramid is not None else []), "backbone"]

    def spec(self, name: str) -> NetworkSpec:
        """The network of one of :attr:`names`, or what there is of another one of :func:`all_names`."""
        if name == "backbone":
            return NetworkSpec(self.backbone)
        # how a classifier pools is nothing to other networks
        backbone = {key: value for key, value in self.backbone.items() if key != "global_pool"}
        if name == "pyramid":
            return NetworkSpec(backbone, self.pyramid or {}, self.levels)
        head = find_head(name)
        if not head.pyramid:
            return NetworkSpec(self.backbone, None, self.levels, name, self.heads.get(name, {}))
        return NetworkSpec(backbone, self.pyramid, self.levels, name, self.heads.get(name, {}))

    def complete(self, name: str) -> NetworkSpec:
        """As :meth:`spec`, with published values for what the file lacks."""
        spec = self.spec(name)
        head = heads().get(name)
        if spec.pyramid in (None, {}) and (name == "pyramid" or (head is not None and head.pyramid)):
            spec = replace(spec, pyramid=PYRAMIDS.get(self.variant or "", PUBLISHED_PYRAMID))
        return spec if head is None or name in self.heads else head.complete(spec)

    def with_num_heads(self, num_heads: int | None = None) -> "Contents":
        """The same networks with other attention heads, for files that cannot tell them.

        Args:
            num_heads: of stage 3; None for those that the file says, of the relative position table, of the registered
                model with these sizes, or one for each 64 channels.

        Raises:
            UserError: a number that cannot be.
        """
        check_num_heads("num_heads", num_heads)
        if num_heads is None:
            return self
        guessed = [guess for guess in self.guessed if not guess.startswith("num_heads=")]
        return replace(self, backbone={**self.backbone, "num_heads": num_heads}, guessed=guessed)

    @property
    def variant(self) -> str | None:
        """The registered model with these sizes."""
        return find_variant(self.backbone)


def check_num_heads(name: str, number: Any) -> None:
    """Raise :class:`UserError` for a number of attention heads that cannot be."""
    check_type(number, int | None, name)
    if number is not None and number < 1:
        raise UserError(f"{name} must be above 0, not {number}")


def all_names() -> list[str]:
    """What a file may be loaded as: a registered head, "pyramid" or "backbone"."""
    return [*heads(), *HEADLESS]


def describe_contents(spec: NetworkSpec, guessed: list[str]) -> Contents:
    """The networks of a file that says what it holds."""
    backbone = {name: value for name, value in spec.backbone.items() if name not in TRAINING_ONLY}
    own = {} if spec.head is None else {spec.head: copy.deepcopy(dict(spec.options))}
    return Contents(backbone, None if spec.pyramid is None else dict(spec.pyramid), own, spec.levels, guessed)


def read_contents(
    tensors: Mapping[str, Tensor], layout: Layout, grid: Grid | None, levels: str, arguments: Mapping[str, Any]
) -> Contents:
    """Read widths, depths, heads and options from tensors.

    Args:
        layout: whose names the file had.
        grid: rows and columns of all position tables; None for square ones.
        levels: the maps that the pyramid gave.
        arguments: of the network, where timm's files say them.

    Raises:
        KeyError, IndexError, ValueError: tensors without which the network cannot be told are not there.
    """
    backbone, pyramid, guessed = read_backbone(tensors, grid), read_pyramid(tensors), []
    told = any("rel_pos" in name or "relative_position" in name for name in tensors)
    if not told and find_variant(backbone) is None:
        guessed.append(f"num_heads={backbone['num_heads']} (64 channels each)")
    known = heads()
    read = {name: own for name, head in known.items() if (own := head.read(tensors)) is not None}
    for name, own in read.items():
        guessed += known[name].guess(own)
    headed = pyramid is not None and any(known[name].pyramid for name in read)
    unshown, unsure = ADAPTERS[layout].unshown(pyramid is not None, headed)
    # of the arguments of timm's files, those of a classifier are seen in its tensors
    stored = {n: arguments[n] for n in backbone_arguments() if n in arguments and n not in CLASSIFIER}
    return Contents(
        {**backbone, **unshown, **stored},
        pyramid,
        {name: known[name].adjust(own, layout) for name, own in read.items()},
        name_levels(arguments.get("levels", levels)) if arguments else levels,
        [] if arguments else [*guessed, *unsure],
    )


def read_backbone(tensors: Mapping[str, Tensor], grid: Grid | None = None) -> dict[str, Any]:
    """Arguments of :class:`itpn.models.hivit.HiViT`, from tensors under our names.

    Args:
        grid: rows and columns of all position tables; None for square ones, whose sizes tell.
    """
    stem = tensors["backbone.patch_embed.proj.weight"]
    width, patch = 4 * len(stem), 4 * stem.shape[-1]
    depths = read_our_depths(tensors)
    blocks = [f"backbone.stages.{stage}.0" for stage in range(3)]
    products = [tensors[f"{block}.mlp.fc2.weight"] for block in blocks]
    attention = f"{blocks[2]}.attn"
    settings: dict[str, Any] = {
        "patch_size": patch,
        "in_chans": stem.shape[1],
        "embed_dim": width,
        "depths": depths,
        "mlp_ratios": tuple(product.shape[1] / product.shape[0] for product in products),
        "qkv_bias": "qv" if f"{attention}.q_bias" in tensors else f"{attention}.qkv.bias" in tensors,
        "patch_norm": "backbone.patch_embed.norm.weight" in tensors,
        "merge": "conv" if "backbone.merges.0.reduction.bias" in tensors else "linear",
        "sub_norm": f"{blocks[2]}.mlp.norm.weight" in tensors,
        "swiglu": len(tensors[f"{blocks[2]}.mlp.fc1.weight"]) == 2 * products[2].shape[1],
    }
    heads = None
    settings["rel_pos_bias"] = False
    if (table := tensors.get(f"{attention}.relative_position_bias_table")) is not None:
        rows, cols = (2 * grid[0] - 1, 2 * grid[1] - 1) if grid else square(len(table))
        heads = table.shape[1]
        settings |= {"rel_pos_bias": True, "rel_pos_size": ((rows + 1) // 2 * patch, (cols + 1) // 2 * patch)}
    elif (table := tensors.get(f"{attention}.rel_pos_h")) is not None:
        rows, cols = len(table), len(tensors[f"{attention}.rel_pos_w"])
        heads = width // table.shape[1]
        settings |= {"rel_pos_bias": "decomposed", "rel_pos_size": ((rows + 1) // 2 * patch, (cols + 1) // 2 * patch)}
    if grid is None and "backbone.pos_embed" in tensors:
        grid = square(tensors["backbone.pos_embed"].shape[1])
    # a network without a table of positions is one whose table is zero
    usual = settings.get("rel_pos_size", (14 * patch, 14 * patch))
    settings["img_size"] = (grid[0] * patch, grid[1] * patch) if grid else usual
    scaled = tuple(stage + 1 for stage, block in enumerate(blocks) if f"{block}.ls2.gamma" in tensors)
    if scaled:
        settings |= {"init_values": 0.1, "layer_scale_stages": scaled}
    variant = find_variant(settings)
    known = BACKBONES[variant]["num_heads"] if variant else max(width // 64, 1)
    return {**settings, "num_heads": heads or known}


def read_pyramid(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of :class:`itpn.models.pyramid.FeaturePyramid`; None where there is none."""
    product = tensors.get("pyramid.outputs.0.mlp.fc2.weight")
    if product is None:
        return None
    return {
        "width": product.shape[0],
        "depth": count_blocks(tensors, r"pyramid\.blocks\.0\.(\d+)\."),
        "mlp_ratio": product.shape[1] / product.shape[0],
    }


def count_blocks(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Blocks of a list, whose numbers a pattern finds."""
    return len({m[1] for name in tensors if (m := re.match(pattern, name))})
