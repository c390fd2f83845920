"""The masked model of a pre-training run: from settings to its spec, and its head."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from itpn.checkpoints.contents import Contents, count_blocks
from itpn.checkpoints.files import Checkpoint
from itpn.checkpoints.load import start_from
from itpn.checkpoints.match import Finding
from itpn.checkpoints.older_settings import update_settings
from itpn.data.cache import read_index
from itpn.errors import UserError
from itpn.masked.decoder import AuxiliaryHead, Decoder
from itpn.masked.masked_model import PYRAMID_LOSSES, MaskedImageModel, Objective
from itpn.masked.targets import IMAGE_TARGETS
from itpn.models.build import build, build_backbone
from itpn.models.heads import Head
from itpn.models.pyramid import FeaturePyramid
from itpn.models.spec import NetworkSpec, Options, spec_of
from itpn.models.variants import BACKBONES, PUBLISHED_PYRAMID, PYRAMIDS
from itpn.tasks.pretraining.config import PretrainingConfig, PretrainingModelConfig, TeacherConfig, check_model
from itpn.tasks.pretraining.data import PretrainingData
from itpn.tasks.recipes import check_model_name
from itpn.training.config import from_dict, image_size, override_model

TASK = PretrainingConfig.task
LEVELS = ("_1", "_2", "_3")  # ends of the names of losses on single pyramid levels, finest first


def resolve(
    config: PretrainingConfig, found: Checkpoint | None, data: PretrainingData
) -> tuple[PretrainingConfig, Sequence[str]]:
    """The width of the teacher's features goes into the settings, for when the teacher is not there."""
    width = config.teacher.width
    if data.teacher is not None:
        width = data.teacher.width
    elif data.train.cache and config.teacher.name not in (None, "ema"):
        width = read_index(data.train.cache).width
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, width=width)), ()


def build_model(
    config: PretrainingConfig, data: PretrainingData, found: Checkpoint | None
) -> tuple[MaskedImageModel, list[str]]:
    return build_recipe(config, None, found)


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
        *("patch_size", "in_chans", "pos_embed", "init_values", "drop_path_rate", "weight_init"),
        *("migrate_ratio", "migrate_from", "gather_window", "gather_side"),
    )
    backbone = {**variant, "img_size": img_size, **{name: getattr(config, name) for name in same}, **options}
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
        feature_loss=config.feature_loss,
        feature_patches=config.feature_patches,
    )


def target_widths(
    objective: Objective, config: PretrainingModelConfig, teacher: TeacherConfig, pyramid_width: int
) -> dict[str, int]:
    """Numbers that each loss has predicted for a patch."""
    widths = {"pixel": config.in_chans * config.patch_size**2}
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
    """Backbone, pyramid and heads of some settings, randomly initialized; arguments as of :func:`make_spec`."""
    model = build(make_spec(config, img_size, teacher))
    assert isinstance(model, MaskedImageModel)
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


def build_from(config: PretrainingConfig) -> MaskedImageModel:
    """The masked model of whole settings."""
    return build_masked_model(config.model, image_size(config.data), config.teacher)


def build_recipe(
    config: PretrainingConfig, num_classes: int | None = None, found: Checkpoint | None = None
) -> tuple[MaskedImageModel, list[str]]:
    """The masked model of a recipe, with a checkpoint's weights where there is one; it has no classes."""
    model = build_from(config)
    return model, [] if found is None else load_weights(model, found)


class MaskedHead(Head):
    """Decoder, auxiliary head and heads of pyramid levels, with the objective that they are trained by.

    Options are "decoder", "auxiliary" (arguments of the classes of :mod:`itpn.masked.decoder`, or None),
    "pyramid_heads" (arguments of a decoder by the name of the loss) and "objective".
    """

    parts: Mapping[str, str] = {
        "decoder.": "decoder",
        "auxiliary.": "auxiliary head",
        "pyramid_heads.": "set of heads for pyramid levels",
        "mask_token": "mask token",
    }
    purpose = "continued pre-training"

    def build(self, spec: NetworkSpec) -> MaskedImageModel:
        options = spec.options
        if spec.pyramid is None or not (options.get("decoder") or options.get("pyramid_heads")):
            raise UserError(
                "no pre-training network can be built: there is no decoder; `itpn train RECIPE --model.checkpoint "
                "FILE` starts from the weights with a random one"
            )
        how = {name: spec.backbone[name] for name in ("weight_init",) if name in spec.backbone}
        backbone = build_backbone(spec)
        dims = tuple(info["num_chs"] for info in backbone.feature_info)
        pyramid = FeaturePyramid(dims, norm_eps=backbone.norm_eps, **spec.pyramid, **how)
        width = pyramid.width

        def decoder(arguments: Options) -> Decoder:
            own: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items()}
            heads = dict(own.pop("heads"))
            if "pixel" in heads:  # whatever the images' channels are now
                heads["pixel"] = backbone.in_chans * backbone.patch_size**2
            own.pop("pyramid_width", None)
            return Decoder(backbone.grid_size, heads, width, **own, **how)

        main = decoder(options["decoder"]) if options.get("decoder") else None
        auxiliary = AuxiliaryHead(backbone, **options["auxiliary"], **how) if options.get("auxiliary") else None
        levels = {name: decoder(own) for name, own in (options.get("pyramid_heads") or {}).items()}
        objective = Objective(**(options.get("objective") or {}))
        return MaskedImageModel(backbone, pyramid, main, objective, auxiliary, levels)

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        names = [m[1] for name in tensors if (m := re.match(r"decoder\.heads\.(\w+)\.weight", name))]
        heads = {name: len(tensors[f"decoder.heads.{name}.weight"]) for name in names}
        if not heads or "decoder.embeds.0.weight" not in tensors or "pyramid.outputs.0.mlp.fc2.weight" not in tensors:
            return None
        width = len(tensors["decoder.norm.weight"])
        drops = "decoder.mask_token" in tensors
        decoder = {
            "heads": heads,
            "width": width,
            "depth": count_blocks(tensors, r"decoder\.blocks\.(\d+)\."),
            "num_heads": max(width // 32, 1),
            "add_mask_tokens": drops,
        }
        auxiliary = None
        if "auxiliary.head.weight" in tensors:
            auxiliary = {
                "out_dim": len(tensors["auxiliary.head.weight"]),
                "depth": count_blocks(tensors, r"auxiliary\.blocks\.(\d+)\."),
                "init_values": 0.1 if "auxiliary.blocks.0.ls1.gamma" in tensors else None,
            }
        objective: dict[str, Any] = {"weights": dict.fromkeys(heads, 1.0) | ({"auxiliary": 1.0} if auxiliary else {})}
        if not drops:  # as published with CLIP's features
            objective |= {"mask": "block", "mask_ratio": 75 / 196, "masked_patches": "mask_token"}
            objective |= {"masked_laterals": "pixel" not in heads, "feature_patches": "all"}
        return {"decoder": decoder, "auxiliary": auxiliary, "pyramid_heads": {}, "objective": objective}

    def complete(self, spec: NetworkSpec) -> NetworkSpec:
        return spec.with_options(decoder={"heads": {"pixel": 0}})

    def summarize(self, spec: NetworkSpec) -> str:
        decoder = spec.options.get("decoder") or {}
        return f"pre-trained to predict {' and '.join(decoder.get('heads') or spec.options.get('pyramid_heads', ()))}"

    def differ(self, options: Options, model: nn.Module) -> dict[str, str]:
        decoder, stored = getattr(model, "decoder", None), options.get("decoder")
        if decoder is None or not stored or not len(decoder.blocks):
            return {}
        theirs, ours = stored["num_heads"], decoder.num_heads
        return {"decoder": f"it has {theirs} attention heads there and {ours} here"} if theirs != ours else {}

    def command(self, source: str, contents: Contents) -> str:
        if contents.variant is None:
            return f"itpn.load({source!r})" if contents.decoder else ""
        usual = build_masked_model(PretrainingModelConfig(name=contents.variant), (224, 224))
        options = describe_options(contents, usual)
        return f"itpn train RECIPE --model.checkpoint {source} --model.name {contents.variant} {options}".strip()

    def from_settings(self, settings: dict[str, Any], overrides: dict[str, Any]) -> NetworkSpec | None:
        if "model" in settings and "mask_ratio" not in settings["model"]:
            return None  # of another task
        config = override_model(from_dict(settings, PretrainingConfig), overrides)
        return make_spec(config.model, image_size(config.data), config.teacher)

    def from_architecture(self, stored: dict[str, Any]) -> dict[str, Any] | None:
        if stored.get("decoder") is None:
            return None
        parts = {name: stored.get(name) for name in ("decoder", "auxiliary", "objective")}
        return {**{name: own and _rename_old(own) for name, own in parts.items()}, "pyramid_heads": {}}


# --- starting from a file


def load_weights(model: MaskedImageModel, checkpoint: Checkpoint) -> list[str]:
    """Copy into a run's model what fits of a file.

    A part that the file lacks keeps its random initialization (a decoder, heads; a pyramid, if the file has none at
    all). A backbone or pyramid of another shape is refused: it is another model.

    Returns:
        What is not as in the file, a sentence each.

    Raises:
        UserError: the file holds another model, and which options would build it; or values that are not finite.
    """
    contents, source = checkpoint.contents, checkpoint.source

    def check(findings: list[Finding]) -> None:
        problems = [f.text for f in findings if f.kind == "harmful"]
        if any(name.startswith("pyramid.") for name in checkpoint.tensors):  # one there is not drawn anew
            problems += [f.text for f in findings if f.kind == "random" and f.names[0].startswith("pyramid.")]
        if not problems:
            return
        if contents.variant is None:
            own = contents.backbone
            sizes = f"{own['embed_dim']} channels and {'+'.join(map(str, own['depths']))} blocks"
            raise UserError(
                f"checkpoint {source} holds a network of {sizes}, which no model of `itpn list` has: `itpn train` "
                "cannot start from it (itpn.load can)"
            )
        options = describe_options(contents, model)
        hint = f"; it takes {options}" if options else ""
        raise UserError(f"checkpoint {source} holds another model: it {problems[0]}{hint}")

    return start_from(model, checkpoint, check)


def describe_options(contents: Contents, model: MaskedImageModel) -> str:
    """The options of `itpn train` that turn a recipe's network into the file's; empty where none would."""
    theirs, ours = _options(contents), _options_of(model)
    if theirs["name"] != ours["name"]:
        own = PYRAMIDS.get(str(theirs["name"]), PUBLISHED_PYRAMID)  # comes with the name
        ours |= {"pyramid-width": own["width"], "pyramid-depth": own["depth"]}
    return " ".join(f"--model.{o} {v}" for o, v in theirs.items() if v is not None and v != ours[o])


def _options(contents: Contents) -> dict[str, str | int | None]:
    """Options of `itpn train` that build the networks of a file."""
    backbone, pyramid, decoder = contents.backbone, contents.pyramid or {}, contents.decoder or {}
    guessed = any(guess.startswith(("decoder_num_heads", "decoder_heads")) for guess in contents.guessed)
    return {
        "name": contents.variant,
        "patch-size": backbone["patch_size"],
        "rel-pos-bias": str(bool(backbone.get("rel_pos_bias"))),
        "init-values": "0.1" if backbone.get("init_values") else "None",
        "pyramid-width": pyramid.get("width"),
        "pyramid-depth": pyramid.get("depth"),
        "decoder-embed-dim": decoder.get("width"),
        "decoder-depth": decoder.get("depth"),
        "decoder-num-heads": decoder.get("num_heads") if decoder.get("depth") and not guessed else None,
    }


def _options_of(model: MaskedImageModel) -> dict[str, str | int | None]:
    spec = spec_of(model)
    contents = Contents(dict(spec.backbone), dict(spec.pyramid or {}), {spec.head or "": dict(spec.options)})
    return _options(contents)


def _rename_old(arguments: dict[str, Any]) -> dict[str, Any]:
    """Options of a decoder or objective in older files, whose names were those of settings, but for one."""
    renamed = update_settings({"model": arguments})["model"]
    return {"add_mask_tokens" if name == "fill_hidden" else name: value for name, value in renamed.items()}
