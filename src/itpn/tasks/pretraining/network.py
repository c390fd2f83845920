"""The masked model of a pre-training run: from settings to its spec."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from itpn.checkpoints.files import Checkpoint
from itpn.checkpoints.load import build_checked
from itpn.data.cache import read_index
from itpn.errors import UserError
from itpn.masked.masked_model import PYRAMID_LOSSES, MaskedImageModel, Objective
from itpn.masked.targets import IMAGE_TARGETS
from itpn.models.spec import NetworkSpec
from itpn.models.variants import BACKBONES, PUBLISHED_PYRAMID, PYRAMIDS
from itpn.tasks.pixels import adopt_pixels, image_type, make_normalize, resolve_pixels, round_all
from itpn.tasks.pretraining.choose_target import choose_target, measure_statistics
from itpn.tasks.pretraining.config import (
    PretrainingConfig,
    PretrainingModelConfig,
    TeacherConfig,
    check_model,
    check_patches,
)
from itpn.tasks.pretraining.data import PretrainingData, read_samples
from itpn.tasks.pretraining.weights import load_weights
from itpn.tasks.recipe_files import check_model_name
from itpn.teachers import AUTO
from itpn.training.config import image_size

TASK = PretrainingConfig.task
TARGET_SAMPLES = 64  # images that the target of pixels is chosen by
LEVELS = ("_1", "_2", "_3")  # ends of the names of losses on single pyramid levels, finest first


def resolve(
    config: PretrainingConfig, checkpoint: Checkpoint | None, data: PretrainingData
) -> tuple[PretrainingConfig, Sequence[str]]:
    """What the settings leave open is filled in: what the images are, how their pixels are normalized and
    predicted, and the teacher's name, the width of its features and the SHA-256 of its weights, for when it is not
    there."""
    teacher, notes = config.teacher, list[str]()
    if data.teacher is not None:
        found = data.teacher
        name = found.name if teacher.name == AUTO else teacher.name
        teacher = dataclasses.replace(teacher, name=name, width=found.width, sha256=found.sha256 or teacher.sha256)
    elif data.train.cache and teacher.name not in (None, "ema"):
        index = read_index(data.train.cache)
        name = index.teacher if teacher.name == AUTO else teacher.name
        teacher = dataclasses.replace(teacher, name=name, width=index.width, sha256=index.sha256 or teacher.sha256)
    config = dataclasses.replace(config, teacher=teacher)
    if data.train.cache:
        config = adopt_pixels(config, read_index(data.train.cache).settings.get("pixels") or {})
    else:
        stored = None if checkpoint is None else checkpoint.preprocessing
        config, notes = resolve_pixels(config, data.windows or data.train, stored)
    config, more = resolve_target(config, data)
    return adopt_pixels(config, {}), [*notes, *more]


def resolve_target(config: PretrainingConfig, data: PretrainingData) -> tuple[PretrainingConfig, Sequence[str]]:
    """`--model.norm-pix-per auto` as the images ask for, with a sentence on why."""
    model = config.model
    floor = model.norm_pix_floor
    if model.norm_pix_per != "auto" or not (model.norm_pix_loss and model.pixel_weight):  # nothing is normalized
        per = "patch" if model.norm_pix_per == "auto" else model.norm_pix_per
        return with_target(config, per, floor or 0.0), ()
    normalize = make_normalize(config)
    stored = read_samples(data.windows or data.train, config, TARGET_SAMPLES)
    images, valid = normalize.scale(stored), normalize.find_valid(stored)
    measured = measure_statistics(images)
    if valid is not None:
        images = images.masked_fill(~valid, float("nan"))
    if not image_type(config).is_photo:
        measured = tuple(normalize.mean.flatten().tolist()), tuple(normalize.std.flatten().tolist())
    chosen = choose_target(list(images), *measured, model.patch_size)
    config = with_target(config, chosen.norm_pix_per, chosen.norm_pix_floor if floor is None else floor)
    if chosen.mean is None or chosen.std is None:
        return config, ()
    own = config.data
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(own, mean=own.mean or round_all(chosen.mean), std=own.std or round_all(chosen.std)),
    )
    mean, std = (" ".join(f"{value:.3f}" for value in values or ()) for values in (config.data.mean, config.data.std))
    target = ""
    if chosen.norm_pix_floor:
        target = f", and predicted per patch and channel with a noise floor of {config.model.norm_pix_floor}"
    return config, (
        f"{chosen.reason}: pixels are normalized by mean {mean} and std {std}{target} (--model.norm-pix-per patch for "
        "the published target)",
    )


def with_target(config: PretrainingConfig, per: Literal["patch", "channel"], floor: float) -> PretrainingConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, norm_pix_per=per, norm_pix_floor=floor))


def build_model(
    config: PretrainingConfig, data: PretrainingData, checkpoint: Checkpoint | None
) -> tuple[MaskedImageModel, list[str]]:
    return build_recipe(config, None, checkpoint)


def make_spec(
    config: PretrainingModelConfig, img_size: tuple[int, int], teacher: TeacherConfig | None = None
) -> NetworkSpec:
    """The network of some settings.

    Args:
        img_size: height and width in pixels of the images that the position tables are made for.
        teacher: whose features are predicted, needed for their width alone.

    Raises:
        UserError: no backbone or teacher of that name, or settings that do not fit one another.
    """
    teacher = teacher or TeacherConfig()
    check_model(config, teacher)
    check_model_name(config.name)
    variant = BACKBONES[config.name]
    options: dict[str, Any] = {} if config.rel_pos_bias is None else {"rel_pos_bias": config.rel_pos_bias}
    if config.gather_window and {**variant, **options}.get("rel_pos_bias"):
        raise UserError("--model.gather-window needs --model.rel-pos-bias False: gathering tokens have no position")
    last = variant["depths"][2] - 1
    if config.migrate_from is not None and config.migrate_from > last:
        raise UserError(f"--model.migrate-from {config.migrate_from} is past the last block of {config.name}, {last}")
    same = (
        *("patch_size", "pos_embed", "init_values", "drop_path_rate", "weight_init"),
        *("migrate_ratio", "migrate_from", "gather_window", "gather_side"),
    )
    backbone = {
        **variant,
        "img_size": img_size,
        "in_chans": config.in_chans or 3,
        **{name: getattr(config, name) for name in same},
        **options,
    }
    own = PYRAMIDS.get(config.name, PUBLISHED_PYRAMID)
    pyramid = {
        "width": config.pyramid_width or own["width"],
        "depth": own["depth"] if config.pyramid_depth is None else config.pyramid_depth,
    }
    objective = make_objective(config)
    widths = target_widths(objective, config, teacher, pyramid["width"])
    return NetworkSpec(backbone, pyramid, head=TASK, options=_head_options(config, objective, widths))


def _head_options(config: PretrainingModelConfig, objective: Objective, widths: dict[str, int]) -> dict[str, Any]:
    decoded = {name: width for name, width in widths.items() if name in ("pixel", "feature")}
    decoder = {"width": config.decoder_embed_dim, "depth": config.decoder_depth, "num_heads": config.decoder_num_heads}
    single = {
        "width": config.pyramid_head_width,
        "depth": config.pyramid_head_depth,
        "num_heads": config.pyramid_head_width // 64,
    }
    return {
        "decoder": {"heads": decoded, **decoder, "add_mask_tokens": objective.drops_patches} if decoded else None,
        "auxiliary": {
            "out_dim": widths["auxiliary"],
            "add_mask_tokens": objective.drops_patches,
            "init_values": config.init_values,
        }
        if "auxiliary" in widths
        else None,
        "pyramid_heads": {
            name: {
                "heads": {name: widths[name]},
                **single,
                "levels": (LEVELS.index(name[-2:]),),
                "add_mask_tokens": objective.drops_patches,
            }
            for name in widths
            if name.endswith(LEVELS)
        },
        "objective": dataclasses.asdict(objective),
    }


def make_objective(config: PretrainingModelConfig) -> Objective:
    """The part of the settings that says how patches are masked and what is predicted of them."""
    weights = {
        "pixel": config.pixel_weight,
        "feature": config.feature_weight,
        "auxiliary": config.auxiliary_weight,
        **dict(zip(PYRAMID_LOSSES, config.pyramid_weights, strict=True)),
    }
    return Objective(
        weights={name: weight for name, weight in weights.items() if weight},
        mask=config.mask,
        mask_ratio=config.mask_ratio,
        masked_patches=config.masked_patches,
        masked_laterals=config.masked_laterals,
        norm_pix_loss=config.norm_pix_loss,
        norm_pix_per="channel"
        if config.norm_pix_per == "channel"
        else "patch",  # `auto` without images is as published
        norm_pix_floor=config.norm_pix_floor or 0.0,
        feature_loss=config.feature_loss,
        feature_patches=config.feature_patches,
    )


def target_widths(
    objective: Objective, config: PretrainingModelConfig, teacher: TeacherConfig, pyramid_width: int
) -> dict[str, int]:
    """Numbers that each loss has predicted for a patch."""
    widths = {"pixel": (config.in_chans or 3) * config.patch_size**2}
    if teacher.name == "ema":
        # the EMA teacher has the student's own shape: its stage 3, and all tokens of a patch at each level
        widths |= dict.fromkeys(("feature", "auxiliary"), BACKBONES[config.name]["embed_dim"])
        widths |= {name: tokens * pyramid_width for name, tokens in zip(PYRAMID_LOSSES, (16, 4, 1), strict=True)}
    elif objective.weights.keys() - IMAGE_TARGETS.keys():
        from itpn.teachers.timm_teacher import teacher_width

        assert teacher.name is not None
        width = teacher.width or teacher_width(teacher.name, teacher.checkpoint)
        widths |= dict.fromkeys(("feature", "auxiliary", *PYRAMID_LOSSES), width)
    return {name: widths[name] for name in objective.weights}


def build_masked_model(
    config: PretrainingModelConfig, img_size: tuple[int, int], teacher: TeacherConfig | None = None
) -> MaskedImageModel:
    """Backbone, pyramid and heads of some settings, randomly initialized; arguments as of :func:`make_spec`.

    Raises:
        UserError: as :func:`make_spec`, or images that are not whole patches.
    """
    model = build_checked(make_spec(config, img_size, teacher))
    assert isinstance(model, MaskedImageModel)
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


def build_from(config: PretrainingConfig) -> MaskedImageModel:
    """The masked model of whole settings.

    Raises:
        UserError: as :func:`build_masked_model`, or images of which nothing is masked or nothing visible.
    """
    check_patches(config.model, image_size(config.data))
    return build_masked_model(config.model, image_size(config.data), config.teacher)


def build_recipe(
    config: PretrainingConfig, num_classes: int | None = None, checkpoint: Checkpoint | None = None
) -> tuple[MaskedImageModel, list[str]]:
    """The masked model of a recipe, with a checkpoint's weights where there is one; it has no classes.

    Raises:
        UserError: there is such a number, or as :func:`build_from`.
    """
    if num_classes is not None:
        raise UserError("a recipe of pretraining predicts no classes: leave out num_classes")
    model = build_from(config)
    return model, [] if checkpoint is None else load_weights(model, checkpoint, config.model.channel_map)
