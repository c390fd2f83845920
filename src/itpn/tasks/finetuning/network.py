"""A network to be fine-tuned: what the settings leave to the checkpoint, and which weights are taken from it."""

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from itpn.checkpoints.contents import Contents
from itpn.checkpoints.files import Checkpoint, named_tensors
from itpn.checkpoints.load import build_checked, start_from
from itpn.checkpoints.match import Finding
from itpn.data.readers import Reader
from itpn.errors import UserError
from itpn.models.heads import Head
from itpn.models.spec import NetworkSpec, Options, find_variant, same_sizes
from itpn.models.variants import BACKBONES
from itpn.system.checks import ChannelMap, check_type
from itpn.tasks.finetuning.config import NetworkConfig
from itpn.tasks.pixels import adopt_pixels, resolve_pixels
from itpn.tasks.recipe_files import check_model_name
from itpn.training.config import AnyConfig
from itpn.training.launch import choose_devices, read_launch

NO_NETWORK = (
    "this recipe takes its network from a checkpoint: give one, as --model.checkpoint of `itpn train`, --checkpoint of "
    "`itpn info` or pretrained= of itpn.get_model"
)
STEPS, EPOCHS = 2000, (10, 200)  # of a run that is left to scale with its images: so many steps, within these epochs


class ClassesHead(Head):
    """A head with ``num_classes`` among its options."""

    def override(self, options: Options, arguments: Options) -> dict[str, Any]:
        if "num_classes" in arguments:
            check_type(arguments["num_classes"], int, "num_classes")
        return super().override(options, arguments)


def resolve_network(config: AnyConfig, checkpoint: Checkpoint | None) -> AnyConfig:
    """Settings with the checkpoint's network, patch size, channels and preparation of pixels, where they leave them
    open.

    Raises:
        UserError: there is no network at all, or the checkpoint is of another one than the settings name.
    """
    model, data = config.model, config.data
    preprocessing: dict[str, Any] = {}
    own: dict[str, Any] = {}
    name, patch_size = model.name, model.patch_size
    if checkpoint is not None:
        own = checkpoint.contents.with_num_heads(model.num_heads).backbone
        variant = find_variant(own)
        if name is not None and not same_sizes(BACKBONES.get(name, {}), own):
            sizes = f"{own['embed_dim']} channels and {'+'.join(map(str, own['depths']))} blocks"
            hint = f": give --model.name {variant}" if variant else ", which no model of `itpn list` has: leave it out"
            raise UserError(f"checkpoint {checkpoint.source} holds a network of {sizes}, not {name}{hint}")
        if patch_size not in (None, own["patch_size"]):
            raise UserError(
                f"checkpoint {checkpoint.source} has patches of {own['patch_size']} px, not {patch_size}: leave out "
                "--model.patch-size"
            )
        name, patch_size = name or variant, own["patch_size"]
        preprocessing = checkpoint.preprocessing
    elif name is None:
        raise UserError(NO_NETWORK)
    else:
        check_model_name(name)
    model = replace(model, name=name, patch_size=patch_size or 16)
    return adopt_pixels(replace(config, model=model, data=data), preprocessing, grey=own.get("in_chans") == 1)


def scale_epochs(config: AnyConfig, images: int, processes: int | None = None) -> AnyConfig:
    """Settings with a number of epochs, where they leave it to the number of images.

    Args:
        processes: that train together; None for those of this launch.
    """
    if config.trainer.max_epochs:
        return config
    processes = processes or choose_devices(config.trainer, read_launch()).processes
    batch = config.data.batch_size * processes * config.trainer.accumulate_grad_batches
    steps = max(1, images // batch)
    epochs = min(max(math.ceil(STEPS / steps), EPOCHS[0]), EPOCHS[1])
    return replace(config, trainer=replace(config.trainer, max_epochs=epochs))


def find_network(model: NetworkConfig, checkpoint: Checkpoint | None, img_size: tuple[int, int]) -> Contents:
    """The checkpoint's networks, or the model that the settings name, for images of a size in pixels."""
    if checkpoint is not None:
        return checkpoint.contents.with_num_heads(model.num_heads)
    assert model.name is not None
    assert model.patch_size is not None
    own = {**BACKBONES[model.name], "img_size": img_size, "patch_size": model.patch_size}
    return Contents({**own, "init_values": model.init_values}, None)


def find_square_network(config: Any, checkpoint: Checkpoint | None) -> Contents:
    """As :func:`find_network`, for square images of about the size of the settings, in whole patches."""
    patch = config.model.patch_size or 16
    side = max(1, round(config.data.img_size / patch)) * patch
    return find_network(config.model, checkpoint, (side, side))


def resolve_with_head(
    config: AnyConfig, checkpoint: Checkpoint | None, images: Reader | None = None
) -> tuple[AnyConfig, list[str]]:
    """As :func:`resolve_network`, with the width of the checkpoint's head where it has one.

    Args:
        images: to train on, which say what their pixels are.

    Returns:
        The settings, and what is remarkable about them, a sentence each.

    Raises:
        UserError: the checkpoint is of another network than the settings name.
    """
    notes: list[str] = []
    if images is not None:
        config, notes = resolve_pixels(config, images, None if checkpoint is None else checkpoint.preprocessing)
    config = resolve_network(config, checkpoint)
    wanted = config.model.head_width
    theirs = find_square_network(config, checkpoint).heads.get(config.task) or {}
    width = theirs.get("head_width", wanted)
    if checkpoint is not None and wanted not in (None, width):
        notes.append(f"the head has {width} channels, as in {checkpoint.source}")
    return replace(config, model=replace(config.model, head_width=width)), notes


def given_heads(model: NetworkConfig) -> dict[str, Any]:
    """Arguments of a checkpoint's network: the attention heads that the settings give."""
    return {} if model.num_heads is None else {"num_heads": model.num_heads}


def backbone_options(model: NetworkConfig) -> dict[str, Any]:
    """Arguments of a backbone that the settings override."""
    options: dict[str, Any] = {"pos_embed": model.pos_embed, "drop_path_rate": model.drop_path_rate}
    given = {"rel_pos_bias": model.rel_pos_bias, "in_chans": model.in_chans}
    return options | {name: value for name, value in given.items() if value is not None}


def build_network(
    spec: NetworkSpec,
    model: NetworkConfig,
    contents: Contents,
    checkpoint: Checkpoint | None,
    unwanted: tuple[str, ...],
) -> tuple[nn.Module, list[str]]:
    """Build a network, with a checkpoint's weights where there is one.

    Args:
        contents: the networks of the checkpoint, of :func:`find_network`.
        unwanted: beginnings of names of the file's tensors that are left out.

    Returns:
        The network, and what is not as in the checkpoint, a sentence each.

    Raises:
        UserError: the weights do not fit.
    """
    network: Any = build_checked(spec)
    network.set_grad_checkpointing(model.grad_checkpointing)
    if checkpoint is None:
        return network, []
    # relative positions that the file has not begin at zero
    new_tables = bool(model.rel_pos_bias and not contents.backbone.get("rel_pos_bias"))
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(unwanted)}
    return network, _start_from(network, checkpoint, tensors, new_tables, model.channel_map)


def _start_from(
    network: nn.Module,
    checkpoint: Checkpoint,
    tensors: dict[str, Tensor],
    new_tables: bool,
    channel_map: ChannelMap | None,
) -> list[str]:
    if new_tables:
        # tables of zeros change nothing, and are then learned
        own = named_tensors(network)
        tensors = tensors | {n: t for n, t in own.items() if n.endswith("relative_position_bias_table")}

    def check(findings: list[Finding]) -> None:
        if problems := [finding.text for finding in findings if finding.kind == "harmful"]:
            raise UserError(f"checkpoint {checkpoint.source} cannot be fine-tuned: it {'; it '.join(problems)}")

    return start_from(network, checkpoint, check, tensors, channel_map)


def keep_predictor(checkpoint: Checkpoint | None, ours: tuple[str, ...], theirs: int | None) -> tuple[bool, list[str]]:
    """Whether a checkpoint's own predictor is kept, and what to say if not.

    It is if it has the same classes, or as many without names.

    Args:
        theirs: number of its classes; None for a file without a predictor.
    """
    if checkpoint is None or theirs is None:
        return False, []
    names = checkpoint.metadata.get("classes")
    if theirs == len(ours) and (names is None or tuple(names) == ours):
        return True, []
    some = "" if names is None else f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    kinds = f"{theirs} class{'es' * (theirs != 1)}{some}"
    why = f"{checkpoint.source} names {kinds}, and the images have others"
    return False, [f"{why}: the layers that predict classes are randomly initialized"]


def name_classes(checkpoint: Checkpoint | None, count: int) -> tuple[str, ...]:
    """The names that a checkpoint has for so many classes, or else numbers."""
    names = [] if checkpoint is None else checkpoint.metadata.get("classes") or []
    return tuple(names if len(names) == count else map(str, range(count)))
