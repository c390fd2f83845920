"""From settings to the masked model."""

from typing import Any

from timm import create_model

from itpn.config import ModelConfig, TeacherConfig, check_model
from itpn.errors import UserError
from itpn.masked.decoder import AuxiliaryHead, Decoder
from itpn.masked.masked_model import PYRAMID_LOSSES, MaskedImageModel, Objective
from itpn.models.hivit import HiViT
from itpn.models.pyramid import FeaturePyramid
from itpn.models.variants import BACKBONES, PUBLISHED_PYRAMID, PYRAMIDS
from itpn.teachers.timm_teacher import teacher_width


def build_masked_model(
    config: ModelConfig, img_size: tuple[int, int], teacher: TeacherConfig | None = None
) -> MaskedImageModel:
    """Build backbone, pyramid and heads, freshly initialised; no weights of a teacher are read.

    Args:
        img_size: height and width in pixels of the images that the position tables are made for.
        teacher: whose features are predicted, needed for their width alone.

    Raises:
        UserError: no backbone or teacher of that name, or settings that do not fit one another.
    """
    teacher = teacher or TeacherConfig()
    check_model(config, teacher)
    if config.name not in BACKBONES:
        raise UserError(f"no model {config.name!r}; models are {', '.join(BACKBONES)}")
    options: dict[str, Any] = {} if config.rel_pos_bias is None else {"rel_pos_bias": config.rel_pos_bias}
    if config.gather_window and {**BACKBONES[config.name], **options}.get("rel_pos_bias"):
        raise UserError("--model.gather-window needs --model.rel-pos-bias False: gathering tokens have no position")
    last = BACKBONES[config.name]["depths"][2] - 1
    if config.migrate_from is not None and config.migrate_from > last:
        raise UserError(f"--model.migrate-from {config.migrate_from} is past the last block of {config.name}, {last}")
    backbone = create_model(
        config.name,
        img_size=img_size,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        num_classes=0,
        pos_embed=config.pos_embed,
        init_values=config.init_values,
        migrate_ratio=config.migrate_ratio,
        migrate_from=config.migrate_from,
        gather_window=config.gather_window,
        gather_side=config.gather_side,
        drop_path_rate=config.drop_path_rate,
        weight_init=config.weight_init,
        **options,
    )
    assert isinstance(backbone, HiViT)
    own = PYRAMIDS.get(config.name, PUBLISHED_PYRAMID)
    pyramid_width = config.pyramid_width or own["width"]
    pyramid = FeaturePyramid(
        tuple(info["num_chs"] for info in backbone.feature_info),
        width=pyramid_width,
        depth=own["depth"] if config.pyramid_depth is None else config.pyramid_depth,
        weight_init=config.weight_init,
    )
    objective = make_objective(config)
    widths = target_widths(objective, backbone, pyramid_width, config, teacher)
    common: dict[str, Any] = {
        "pyramid_width": pyramid_width,
        "add_mask_tokens": objective.drops_patches,
        "weight_init": config.weight_init,
    }
    heads = {name: width for name, width in widths.items() if name in ("pixel", "feature")}
    decoder = auxiliary = None
    if heads:
        decoder = Decoder(
            backbone.grid_size,
            heads,
            width=config.decoder_width,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
            **common,
        )
    if "auxiliary" in widths:
        auxiliary = AuxiliaryHead(
            backbone,
            widths["auxiliary"],
            add_mask_tokens=objective.drops_patches,
            init_values=config.init_values,
            weight_init=config.weight_init,
        )
    pyramid_heads = {
        name: Decoder(
            backbone.grid_size,
            {name: widths[name]},
            width=config.pyramid_head_width,
            depth=config.pyramid_head_depth,
            num_heads=config.pyramid_head_width // 64,
            levels=(level,),
            **common,
        )
        for level, name in enumerate(PYRAMID_LOSSES)
        if name in widths
    }
    model = MaskedImageModel(backbone, pyramid, decoder, objective, auxiliary, pyramid_heads)
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


def make_objective(config: ModelConfig) -> Objective:
    """The part of the settings that says how units are hidden and what is asked about them."""
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
        masked_patches=config.hidden_units,
        masked_laterals=config.hidden_laterals,
        normalize_target=config.normalize_target,
        feature_loss=config.feature_loss,
        feature_patches="masked" if config.feature_units == "hidden" else "all",
    )


def target_widths(
    objective: Objective, backbone: HiViT, pyramid_width: int, config: ModelConfig, teacher: TeacherConfig
) -> dict[str, int]:
    """Numbers that each loss has predicted for a unit."""
    widths = {"pixel": config.in_chans * config.patch_size**2}
    if teacher.name == "ema":
        # the average is of the student's own shape: its stage 3, and all tokens of a unit at each level
        widths |= dict.fromkeys(("feature", "auxiliary"), backbone.embed_dim)
        widths |= {name: tokens * pyramid_width for name, tokens in zip(PYRAMID_LOSSES, (16, 4, 1), strict=True)}
    elif any(name != "pixel" for name in objective.weights):
        assert teacher.name is not None
        width = teacher.width or teacher_width(teacher.name, teacher.checkpoint)
        widths |= dict.fromkeys(("feature", "auxiliary", *PYRAMID_LOSSES), width)
    return {name: widths[name] for name in objective.weights}
