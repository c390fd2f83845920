"""From settings to the masked model."""

from timm import create_model

from itpn.config import ModelConfig
from itpn.errors import UserError
from itpn.models.hivit import HiViT
from itpn.models.pyramid import FeaturePyramid
from itpn.models.variants import BACKBONES, PUBLISHED_PYRAMID, PYRAMIDS
from itpn.pretraining.decoder import PixelDecoder
from itpn.pretraining.model import MaskedImageModel


def build_masked_model(config: ModelConfig, img_size: tuple[int, int]) -> MaskedImageModel:
    """Build backbone, pyramid and decoder, freshly initialised as in pixel pre-training (He et al. 2022).

    Args:
        img_size: height and width in pixels of the images that the position tables are made for.

    Raises:
        UserError: no backbone of that name.
    """
    if config.name not in BACKBONES:
        raise UserError(f"no model {config.name!r}; models are {', '.join(BACKBONES)}")
    backbone = create_model(
        config.name,
        img_size=img_size,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        num_classes=0,
        pos_embed=config.pos_embed,
        init_values=config.init_values,
        drop_path_rate=config.drop_path_rate,
        weight_init="xavier",
    )
    assert isinstance(backbone, HiViT)
    own = PYRAMIDS.get(config.name, PUBLISHED_PYRAMID)
    width = config.pyramid_width or own["width"]
    pyramid = FeaturePyramid(
        tuple(info["num_chs"] for info in backbone.feature_info),
        width=width,
        depth=own["depth"] if config.pyramid_depth is None else config.pyramid_depth,
        weight_init="xavier",
    )
    decoder = PixelDecoder(
        backbone.grid_size,
        out_dim=config.in_chans * config.patch_size**2,
        pyramid_width=width,
        width=config.decoder_width,
        depth=config.decoder_depth,
        num_heads=config.decoder_heads,
    )
    model = MaskedImageModel(backbone, pyramid, decoder, config.mask_ratio, config.normalize_target)
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model
