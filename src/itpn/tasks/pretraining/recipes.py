"""Settings of pre-training that recipe files call."""

from itpn.models.variants import BACKBONES
from itpn.tasks.pretraining.config import (
    PretrainingConfig,
    PretrainingDataConfig,
    PretrainingModelConfig,
    TeacherConfig,
)
from itpn.training.config import OptimizerConfig, TrainerConfig

CLIP_B = "vit_base_patch16_clip_quickgelu_224.openai"
CLIP_L = "vit_large_patch14_clip_quickgelu_224.openai"


def pixel_pretraining(model: str, max_epochs: int) -> PretrainingConfig:
    """Pixel supervision as published: 4096 images a step on 8 GPUs (Tian et al. 2023, section 4.1)."""
    return PretrainingConfig(
        model=PretrainingModelConfig(name=model),
        data=PretrainingDataConfig(batch_size=512),
        optimizer=OptimizerConfig(base_lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup_epochs=40),
        trainer=TrainerConfig(max_epochs=max_epochs),
    )


def small_pixel_pretraining(
    model: str, decoder: tuple[int, int, int], img_size: int, max_epochs: int
) -> PretrainingConfig:
    """Pixel supervision for one machine and thousands of images, not millions.

    Args:
        decoder: its width, depth and heads.
    """
    width, depth, heads = decoder
    return PretrainingConfig(
        model=PretrainingModelConfig(
            name=model,
            patch_size=8,
            norm_pix_per="auto",
            decoder_embed_dim=width,
            decoder_depth=depth,
            decoder_num_heads=heads,
        ),
        data=PretrainingDataConfig(root=("data/images",), img_size=img_size, batch_size=64, num_workers=2),
        # small batches bear a larger step per image than the published 4096
        optimizer=OptimizerConfig(base_lr=2e-3, warmup_epochs=40),
        trainer=TrainerConfig(max_epochs=max_epochs, checkpoint_every_n_steps=200),
    )


def clip_pretraining(model: str, max_epochs: int, teacher: str = CLIP_B) -> PretrainingConfig:
    """CLIP supervision as in mmpretrain: 2048 images a step on 8 GPUs, cosine to the features of masked patches.

    Its position table, frozen at random initial values there, is trained here, and its weight decay spares biases.
    """
    long = max_epochs > 300
    return PretrainingConfig(
        model=PretrainingModelConfig(
            name=model,
            pos_embed="learned",
            rel_pos_bias=True,
            weight_init="trunc_normal",
            init_values=0.1,
            drop_path_rate=0.1 if long else 0.0,
            mask="block",
            mask_ratio=75 / 196,
            masked_patches="mask_token",
            masked_laterals=True,
            pixel_weight=0.0,
            feature_weight=1.0,
            feature_loss="cosine",
            decoder_embed_dim=BACKBONES[model]["embed_dim"],
            decoder_depth=0,  # a norm and a linear layer
        ),
        teacher=TeacherConfig(name=teacher, normalize=False),
        data=PretrainingDataConfig(batch_size=256, color_jitter=0.4),
        optimizer=OptimizerConfig(
            base_lr=1.5e-3 * 256 / 2048,
            betas=(0.9, 0.999 if long else 0.98),
            warmup_epochs=10,
            min_lr=1e-5,
            clip_grad=3.0,
        ),
        trainer=TrainerConfig(max_epochs=max_epochs),
    )


def official_clip_pretraining(model: str, teacher: str, max_epochs: int, img_size: int = 224) -> PretrainingConfig:
    """CLIP supervision as in the authors' code: smooth L1 to normalized features of all patches, and a second head."""
    config = clip_pretraining(model, max_epochs, teacher)
    config.model.feature_loss, config.model.feature_patches = "smooth_l1", "all"
    config.model.auxiliary_weight = 1.0
    config.model.pyramid_depth = 1
    if "large" in model:
        config.model.drop_path_rate = 0.2
    config.teacher.normalize = True
    config.data.img_size = img_size
    return config


def fast_clip_pretraining(model: str) -> PretrainingConfig:
    """CLIP supervision of Fast-iTPN, whose pre-training was never published: these are our settings.

    Those of the authors' code for iTPN, but for what they say is different: the larger teacher and 1600 epochs; and no
    relative positions, which the released weights have not.
    """
    config = official_clip_pretraining(model, CLIP_L, max_epochs=1600)
    config.model.rel_pos_bias = False
    return config


def with_layer_scale(config: PretrainingConfig) -> PretrainingConfig:
    """Give a recipe of Fast-iTPN the layer scale in stage 3 that its released weights have."""
    config.model.init_values = 0.1
    return config


def masked_feature_modelling(config: PretrainingConfig, head_width: int) -> PretrainingConfig:
    """Add to a recipe a loss on each pyramid level, with an EMA of the network as the teacher.

    Args:
        head_width: channels of the level's heads.
    """
    config.model.pyramid_weights = (0.2, 0.2, 0.2)
    config.model.pyramid_head_width = head_width
    config.teacher = TeacherConfig(name="ema")
    return config
