"""Recipes: where they are, how one is read, and the functions that their files call."""

import ast
import difflib
import fnmatch
import runpy
import sys
from pathlib import Path

from itpn.config import (
    CONFIGS,
    ClassificationConfig,
    ClassifierConfig,
    Config,
    DataConfig,
    DetectionConfig,
    DetectionEvaluationConfig,
    DetectorConfig,
    FineTuningConfig,
    LabelledDataConfig,
    MasksConfig,
    ModelConfig,
    ObjectsConfig,
    OptimizerConfig,
    RunConfig,
    SegmentationConfig,
    SegmentationEvaluationConfig,
    SegmenterConfig,
    TeacherConfig,
    TrainerConfig,
    read_yaml,
)
from itpn.errors import UserError
from itpn.models.variants import BACKBONES

CLIP_B = "vit_base_patch16_clip_quickgelu_224.openai"
CLIP_L = "vit_large_patch14_clip_quickgelu_224.openai"


def pixel_pretraining(model: str, max_epochs: int) -> Config:
    """Pixel supervision as published: 4096 images a step on 8 GPUs (Tian et al. 2023, section 4.1)."""
    return Config(
        model=ModelConfig(name=model),
        data=DataConfig(batch_size=512),
        optimizer=OptimizerConfig(base_lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup_epochs=40),
        trainer=TrainerConfig(max_epochs=max_epochs),
    )


def small_pixel_pretraining(model: str, decoder: tuple[int, int, int], img_size: int, max_epochs: int) -> Config:
    """Pixel supervision for one machine and thousands of images, not millions.

    Args:
        decoder: its width, depth and heads.
    """
    width, depth, heads = decoder
    return Config(
        model=ModelConfig(name=model, patch_size=8, decoder_width=width, decoder_depth=depth, decoder_heads=heads),
        data=DataConfig(root=("data/images",), img_size=img_size, batch_size=64, num_workers=2),
        # small batches bear a larger step per image than the published 4096
        optimizer=OptimizerConfig(base_lr=2e-3, warmup_epochs=40),
        trainer=TrainerConfig(max_epochs=max_epochs, checkpoint_every_n_steps=200),
    )


def clip_pretraining(model: str, max_epochs: int, teacher: str = CLIP_B) -> Config:
    """CLIP supervision as in mmpretrain: 2048 images a step on 8 GPUs, cosine to the features of hidden units.

    Its position table, frozen at random initial values there, is trained here, and its weight decay spares biases.
    """
    long = max_epochs > 300
    return Config(
        model=ModelConfig(
            name=model,
            pos_embed="learned",
            rel_pos_bias=True,
            weight_init="trunc_normal",
            init_values=0.1,
            drop_path_rate=0.1 if long else 0.0,
            mask="block",
            mask_ratio=75 / 196,
            hidden_units="mask_token",
            hidden_laterals=True,
            pixel_weight=0.0,
            feature_weight=1.0,
            feature_loss="cosine",
            decoder_width=BACKBONES[model]["embed_dim"],
            decoder_depth=0,  # a norm and a linear layer
        ),
        teacher=TeacherConfig(name=teacher, normalize=False),
        data=DataConfig(batch_size=256, color_jitter=0.4),
        optimizer=OptimizerConfig(
            base_lr=1.5e-3 * 256 / 2048,
            betas=(0.9, 0.999 if long else 0.98),
            warmup_epochs=10,
            min_lr=1e-5,
            clip_grad=3.0,
        ),
        trainer=TrainerConfig(max_epochs=max_epochs),
    )


def official_clip_pretraining(model: str, teacher: str, max_epochs: int, img_size: int = 224) -> Config:
    """CLIP supervision as in the authors' code: smooth L1 to normalised features of all units, and a second head."""
    config = clip_pretraining(model, max_epochs, teacher)
    config.model.feature_loss, config.model.feature_units = "smooth_l1", "all"
    config.model.auxiliary_weight = 1.0
    config.model.pyramid_depth = 1
    if "large" in model:
        config.model.drop_path_rate = 0.2
    config.teacher.normalize = True
    config.data.img_size = img_size
    return config


def fast_clip_pretraining(model: str) -> Config:
    """CLIP supervision of Fast-iTPN, whose pre-training was never published: these are our settings.

    Those of the authors' code for iTPN, but for what they say is different: the larger teacher and 1600 epochs; and no
    relative positions, which the released weights have not.
    """
    config = official_clip_pretraining(model, CLIP_L, max_epochs=1600)
    config.model.rel_pos_bias = False
    return config


def with_layer_scale(config: Config) -> Config:
    """Give a recipe of Fast-iTPN the layer scale in stage 3 that its released weights have."""
    config.model.init_values = 0.1
    return config


def masked_feature_modelling(config: Config, head_width: int) -> Config:
    """Add to a recipe a loss on each pyramid level, with a moving average of the network as the teacher.

    Args:
        head_width: channels of the level's heads.
    """
    config.model.pyramid_weights = (0.2, 0.2, 0.2)
    config.model.pyramid_head_width = head_width
    config.teacher = TeacherConfig(name="ema")
    return config


def fine_tuning(
    model: str,
    max_epochs: int,
    *,
    base_lr: float,
    layer_decay: float | None,
    drop_path_rate: float,
    batch: int = 1024,
    warmup_epochs: int = 5,
) -> ClassificationConfig:
    """ImageNet-1K fine-tuning as published (REFERENCE: Tian et al. 2023, appendix; the official code), on 8 GPUs.

    The layer decay is in the official form: over the layers of the network it is as much as over 13. What is not
    published is as in He et al. 2022: crops, the end of the cosine.

    Args:
        base_lr: for 256 images a step.
        batch: images of a step.
    """
    return ClassificationConfig(
        model=ClassifierConfig(name=model, drop_path_rate=drop_path_rate, ema_decay=0.9999),
        data=LabelledDataConfig(batch_size=batch // 8, crop_scale=(0.08, 1.0), img_size=224),
        optimizer=FineTuningConfig(
            base_lr=base_lr,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup_epochs=warmup_epochs,
            max_warmup=0.2,
            min_lr=1e-6,
            layer_decay=layer_decay,
        ),
        trainer=TrainerConfig(max_epochs=max_epochs),
    )


def pixel_fine_tuning(model: str) -> ClassificationConfig:
    """From pixel supervision; relative positions are added, as the released fine-tuned weights have them."""
    if "large" in model:
        config = fine_tuning(model, 50, base_lr=1e-3, layer_decay=0.55, drop_path_rate=0.2)
    else:
        config = fine_tuning(model, 100, base_lr=4e-4, layer_decay=0.60, drop_path_rate=0.15)
    config.model.rel_pos_bias = True
    return config


def clip_fine_tuning(model: str) -> ClassificationConfig:
    """From CLIP supervision; its learning rates are published as they are, for its batches."""
    if "large" in model:
        return fine_tuning(model, 50, base_lr=2e-4 / 2, layer_decay=0.55, drop_path_rate=0.25, batch=512)
    return fine_tuning(model, 100, base_lr=5e-4 / 4, layer_decay=0.60, drop_path_rate=0.1, warmup_epochs=20)


def fast_fine_tuning(model: str, img_size: int) -> ClassificationConfig:
    """Fine-tuning of Fast-iTPN, whose settings were not published: those of iTPN from CLIP, with the same global batch.

    Larger images go through in several passes.
    """
    config = clip_fine_tuning(model)
    config.data.img_size = img_size
    passes = {224: 1, 384: 2, 512: 4}[img_size]
    config.data.batch_size //= passes
    config.trainer.accumulate_grad_batches = passes
    if img_size > 224:
        config.data.crop_pct = 1.0  # as is usual where the test size is not the pre-training's
    return config


def from_scratch(model: str, drop_path_rate: float) -> ClassificationConfig:
    """Supervised training of HiViT as in mmpretrain: 300 epochs, 1024 images a step (Zhang et al. 2023)."""
    config = fine_tuning(model, 300, base_lr=2.5e-4, layer_decay=None, drop_path_rate=drop_path_rate, warmup_epochs=20)
    config.model.scratch = True
    config.optimizer.clip_grad, config.optimizer.min_lr = 5.0, 1e-5
    return config


def small_fine_tuning() -> ClassificationConfig:
    """A classifier of one's own images on one machine: the network is the checkpoint's, and epochs scale."""
    return ClassificationConfig(
        model=ClassifierConfig(drop_path_rate=0.1, ema_decay=0.999),
        data=LabelledDataConfig(
            root=("data/images",),
            batch_size=64,
            num_workers=2,
            crop_scale=(0.3, 1.0),
            mixup=0.0,  # few steps: images as they are teach faster
            cutmix=0.0,
        ),
        optimizer=FineTuningConfig(
            base_lr=2e-3, betas=(0.9, 0.999), warmup_epochs=5, min_lr=1e-6, clip_grad=1.0, layer_decay=0.75
        ),
        trainer=TrainerConfig(max_epochs=0, checkpoint_every_n_steps=200),
    )


def cifar_fine_tuning() -> ClassificationConfig:
    """Images of 32 pixels, of which there is nothing to cut away."""
    config = small_fine_tuning()
    config.data.root, config.data.img_size, config.data.crop_pct = ("data/cifar10",), 32, 1.0
    config.data.crop_scale, config.data.batch_size = (0.5, 1.0), 128
    config.data.auto_augment, config.data.erase = "rand-m5-mstd0.5-inc1", 0.0
    return config


def linear_probe() -> ClassificationConfig:
    """A linear classifier on frozen features: the exact optimum, no schedule."""
    return ClassificationConfig(
        model=ClassifierConfig(freeze=True), data=LabelledDataConfig(root=("data/images",), num_workers=2)
    )


def detection(model: str, epochs: int) -> DetectionConfig:
    """Mask R-CNN on COCO as published: 32 images a step on 16 GPUs, 1x being 12 epochs (Tian et al. 2023, section 4.2).

    The layer decay is per layer. Warm-up is mmdetection's, 500 steps.

    Args:
        model: whose pre-trained weights are taken; relative positions of CLIP's come with them.
    """
    large = "large" in model
    drop_path = 0.3 if epochs > 12 else 0.2 if large else 0.05
    return DetectionConfig(
        model=DetectorConfig(name=model, drop_path_rate=drop_path, grad_checkpointing=large),
        data=ObjectsConfig(root="data/coco", batch_size=2, num_workers=4, interpolation="bilinear"),
        optimizer=FineTuningConfig(
            lr=2e-4,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup_steps=500,
            warmup_start=1e-3,
            schedule="step",
            layer_decay=0.95 if large else 0.9,
            layer_decay_over=None,
        ),
        trainer=TrainerConfig(max_epochs=epochs, checkpoint_every_n_steps=1000, log_every_n_steps=50),
    )


def clip_detection(model: str, epochs: int) -> DetectionConfig:
    """From CLIP supervision, whose relative positions make attention's memory grow with the square of the units."""
    config = detection(model, epochs)
    config.model.grad_checkpointing = True
    return config


def small_dense_optimizer() -> FineTuningConfig:
    """For objects and pixels of one's own."""
    return FineTuningConfig(
        lr=2e-4,
        betas=(0.9, 0.999),
        warmup_epochs=5,
        min_lr=1e-6,
        clip_grad=1.0,
        layer_decay=0.9,
        layer_decay_over=None,
    )


def small_detection() -> DetectionConfig:
    """A detector of one's own objects on one machine: the network is the checkpoint's, and epochs scale."""
    return DetectionConfig(
        model=DetectorConfig(drop_path_rate=0.1),
        data=ObjectsConfig(root="data/objects", batch_size=2, num_workers=2, interpolation="bilinear"),
        optimizer=small_dense_optimizer(),
        trainer=TrainerConfig(max_epochs=0, checkpoint_every_n_steps=200),
        evaluation=DetectionEvaluationConfig(every_n_epochs=5),
    )


def nano_detection() -> DetectionConfig:
    """Small images of few objects, as of the generated sample set, on a laptop: narrow heads, few proposals."""
    config = small_detection()
    config.model.head_width, config.model.proposals, config.model.samples = 64, 200, 64
    config.data.img_size, config.data.crop_prob, config.data.batch_size = 96, 0.0, 8
    config.data.scales = (0.8, 1.2)
    config.optimizer.lr, config.model.drop_path_rate = 1e-3, 0.0
    return config


def segmentation(model: str, img_size: int = 512) -> SegmentationConfig:
    """UPerNet on ADE20K as published: 16 images a step on 8 GPUs, 160,000 steps (Tian et al. 2023, section 4.2).

    The layer decay is per layer.
    """
    return SegmentationConfig(
        model=SegmenterConfig(name=model, drop_path_rate=0.1, grad_checkpointing="large" in model),
        data=MasksConfig(
            root="data/ade20k",
            reduce_zero_label=True,
            img_size=img_size,
            batch_size=2,
            num_workers=4,
            interpolation="bilinear",
        ),
        optimizer=FineTuningConfig(
            lr=3e-5,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup_steps=1500,
            warmup_start=1e-6,
            schedule="linear",
            layer_decay=0.9,
            layer_decay_over=None,
        ),
        # 160,000 steps of 16 are 127 epochs of 20,210 images
        trainer=TrainerConfig(max_epochs=1000, max_steps=160_000, checkpoint_every_n_steps=1000, log_every_n_steps=50),
        evaluation=SegmentationEvaluationConfig(every_n_epochs=13),
    )


def small_segmentation() -> SegmentationConfig:
    """Masks of one's own on one machine: the network is the checkpoint's, and epochs scale."""
    return SegmentationConfig(
        model=SegmenterConfig(drop_path_rate=0.1),
        data=MasksConfig(root="data/scenes", batch_size=4, num_workers=2, interpolation="bilinear", val_share=0.1),
        optimizer=small_dense_optimizer(),
        trainer=TrainerConfig(max_epochs=0, checkpoint_every_n_steps=200),
        evaluation=SegmentationEvaluationConfig(every_n_epochs=5),
    )


def nano_segmentation() -> SegmentationConfig:
    """Small images, as of the generated sample set, on a laptop: narrow heads."""
    config = small_segmentation()
    config.model.head_width, config.model.drop_path_rate = 64, 0.0
    config.data.img_size, config.data.batch_size = 96, 8
    config.data.scales = (0.75, 1.5)
    config.optimizer.lr = 1e-3
    return config


def recipe_files() -> dict[str, Path]:
    """Recipe name to file, sorted by name."""
    installed = Path(__file__).parents[1] / "configs"  # in a wheel; beside src/ in a checkout
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "configs"
    return {path.stem: path for path in sorted(folder.rglob("*.py"), key=lambda path: path.stem)}


def list_recipes(pattern: str = "*") -> list[str]:
    """Names of recipes that match a shell pattern."""
    return fnmatch.filter(recipe_files(), pattern)


def describe(path: Path) -> str:
    """First line of a recipe file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0]


def read_recipe(name: str) -> tuple[str, RunConfig]:
    """Name and settings of a recipe, given by name, as a Python file, or as the config.yaml of a run.

    Raises:
        UserError: no such recipe (the nearest are named), or the file has a mistake.
    """
    files = recipe_files()
    path = files.get(name, Path(name))
    if not path.is_file():
        if path.suffix.lower() in (".py", ".yaml", ".yml"):
            raise UserError(f"recipe file {name} does not exist")
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "see `itpn list`"
        raise UserError(f"no recipe {name!r}; {hint}")
    if path.suffix.lower() in (".yaml", ".yml"):
        return _read_run_settings(path)
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError:
        raise
    except Exception as error:  # whatever a user's file may raise
        raise UserError(f"recipe file {path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        kinds = ", ".join(kind.__name__ for kind in CONFIGS.values())
        raise UserError(f"recipe file {path} must set `config` to one of {kinds} of itpn.config")
    return path.stem, config


def _read_run_settings(path: Path) -> tuple[str, RunConfig]:
    """Of a config.yaml; where it is corrupt, of the checkpoint of the run that it belongs to."""
    try:
        return read_yaml(path)
    except UserError:
        last = path.parent / "checkpoints" / "last.ckpt"
        if not last.exists():
            raise
        from itpn.checkpoints.run_state import DamagedCheckpoint, find_settings, read_state  # torch takes its time

        try:
            found = find_settings(read_state(last, whole=False))
        except DamagedCheckpoint:
            found = None
        if found is None:
            raise
        print(f"{path} is corrupt: its settings are taken from {last}", file=sys.stderr)
        return found


def nearest(name: str, names: list[str]) -> str:
    """A hint at the right name ("; did you mean X?") to append to a message, or an empty string."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
