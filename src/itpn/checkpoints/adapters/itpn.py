"""The authors' iTPN: HiViT's names, the pyramid's, and those of the decoders for pixels or for CLIP's features."""

from typing import Any

from itpn.checkpoints.adapters.hivit import backbone_pairs
from itpn.checkpoints.adapters.renaming import Adapter, Depths, Pairs

# fmt: off
PYRAMID: Pairs = [
    ("align_dim_16tofpn", "pyramid.top"),
    ("align_dim_16to8", "pyramid.laterals.1"), ("align_dim_8to4", "pyramid.laterals.0"),
    ("split_16to8.reduction", "pyramid.splits.1.expansion"), ("split_8to4.reduction", "pyramid.splits.0.expansion"),
    ("split_16to8", "pyramid.splits.1"), ("split_8to4", "pyramid.splits.0"),
    ("block_16to8", "pyramid.blocks.1"), ("block_8to4", "pyramid.blocks.0"),
    *((f"fpn_modules.{i}", f"pyramid.outputs.{2 - i}") for i in range(3)),
    *((f"decoder_embed.{i}.0", f"decoder.embed_norms.{2 - i}") for i in range(3)),
    *((f"decoder_embed.{i}.1", f"decoder.embeds.{2 - i}") for i in range(3)),
    ("decoder_blocks", "decoder.blocks"), ("decoder_pred", "decoder.heads.pixel"),
    ("decoder_pos_embed", "decoder.pos_embed"),
]
FEATURE_HEADS: Pairs = [  # of CLIP supervision
    ("mask_token", "mask_token"), ("norm", "decoder.norm"), ("lm_head", "decoder.heads.feature"),
    ("cls_pt_layers", "auxiliary.blocks"), ("norm_cls", "auxiliary.norm"), ("lm_cls_head", "auxiliary.head"),
]
PIXEL_HEADS: Pairs = [("mask_token", "decoder.mask_token"), ("decoder_norm", "decoder.norm")]
# fmt: on


class ITPN(Adapter):
    title = "the authors' code (iTPN, HiViT)"
    position = "absolute_pos_embed"  # their name of the position table

    def pairs(self, depths: Depths, features: bool) -> Pairs:
        heads = FEATURE_HEADS if features else PIXEL_HEADS
        return [*backbone_pairs(depths, self.position), *PYRAMID, *heads]

    def unshown(self, pyramid: bool, headed: bool) -> tuple[dict[str, Any], list[str]]:
        if not pyramid or headed:
            return {"pos_resample": "legacy"}, []
        reason = "as the authors' detectors and segmenters have"
        return {"pos_resample": "legacy", "norm_eps": 1e-5}, [f"norm_eps=1e-5 ({reason})"]
