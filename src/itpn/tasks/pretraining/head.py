"""What pre-training puts on backbone and pyramid, and what checkpoints have to know of it."""

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from itpn.checkpoints.contents import check_num_heads, count_blocks
from itpn.checkpoints.older_settings import update_settings
from itpn.errors import UserError
from itpn.masked.decoder import AuxiliaryHead, Decoder
from itpn.masked.masked_model import MaskedImageModel, Objective
from itpn.models.build import build_backbone
from itpn.models.heads import Head
from itpn.models.pyramid import FeaturePyramid
from itpn.models.spec import NetworkSpec, Options
from itpn.tasks.pretraining.config import PretrainingConfig, PretrainingModelConfig
from itpn.tasks.pretraining.network import build_masked_model, make_spec
from itpn.tasks.pretraining.weights import describe_options
from itpn.training.config import from_dict, image_size, override_model


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
    pixels = ("decoder.heads.pixel.",)
    arguments = ("decoder_num_heads",)
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

    def describe(self, options: Options) -> dict[str, str]:
        decoder = options.get("decoder")
        if not decoder:
            return {}
        predicted = ", ".join(f"{width} numbers a patch ({name})" for name, width in decoder["heads"].items())
        blocks = f"{decoder['depth']} block{'s' * (decoder['depth'] != 1)}"
        return {"decoder": f"{decoder['width']} channels, {blocks}, {predicted}"}

    def guess(self, options: Options) -> list[str]:
        decoder = options["decoder"]
        return [f"decoder_num_heads={decoder['num_heads']} (32 channels each)"] if decoder["depth"] else []

    def adjust(self, options: Options, layout: str) -> dict[str, Any]:
        own = copy.deepcopy(dict(options))
        if own["auxiliary"] and layout in ("official", "official_fast"):
            own["auxiliary"]["block_norm_eps"] = 1e-5
        if layout == "mmpretrain":
            own["decoder"]["embed_norm_eps"] = 1e-5
            if own["objective"].pop("feature_patches", None):
                own["objective"]["feature_loss"] = "cosine"
        return own

    def override(self, options: Options, arguments: Options) -> dict[str, Any]:
        number = arguments.get("decoder_num_heads")
        check_num_heads("decoder_num_heads", number)
        if number is None or not options.get("decoder"):
            return dict(options)
        return {**options, "decoder": {**options["decoder"], "num_heads": number}}

    def differ(self, options: Options, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, MaskedImageModel)
        decoder, stored = model.decoder, options.get("decoder")
        if decoder is None or not stored or not len(decoder.blocks):
            return {}
        theirs, ours = stored["num_heads"], decoder.num_heads
        return {"decoder": f"it has {theirs} attention heads there and {ours} here"} if theirs != ours else {}

    def command(self, source: str, spec: NetworkSpec) -> str:
        if spec.variant is None:
            return f"itpn.load({source!r})" if spec.options else ""
        usual = build_masked_model(PretrainingModelConfig(name=spec.variant), (224, 224))
        options = describe_options(spec, usual)
        return f"itpn train RECIPE --model.checkpoint {source} --model.name {spec.variant} {options}".strip()

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


def _rename_old(arguments: dict[str, Any]) -> dict[str, Any]:
    """Options of a decoder or objective in older files, whose names were those of settings, but for one."""
    renamed = update_settings({"model": arguments})["model"]
    return {"add_mask_tokens" if name == "fill_hidden" else name: value for name, value in renamed.items()}
