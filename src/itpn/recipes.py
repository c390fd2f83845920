"""Recipes: where they are, how one is read, and the functions that their files call."""

import ast
import difflib
import fnmatch
import runpy
from pathlib import Path

from itpn.config import Config, DataConfig, ModelConfig, OptimizerConfig, TeacherConfig, TrainerConfig, read_yaml
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


def recipe_files() -> dict[str, Path]:
    """Recipe name to file, sorted by name."""
    installed = Path(__file__).parent / "configs"  # in a wheel; beside src/ in a checkout
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "configs"
    return {path.stem: path for path in sorted(folder.rglob("*.py"), key=lambda path: path.stem)}


def list_recipes(pattern: str = "*") -> list[str]:
    """Names of recipes that match a shell pattern."""
    return fnmatch.filter(recipe_files(), pattern)


def describe(path: Path) -> str:
    """First line of a recipe file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def read_recipe(name: str) -> tuple[str, Config]:
    """Name and settings of a recipe, given by name, as a Python file, or as the config.yaml of a run.

    Raises:
        UserError: no such recipe (the nearest are named), or the file has a mistake.
    """
    files = recipe_files()
    path = files.get(name, Path(name))
    if not path.is_file():
        if path.suffix in (".py", ".yaml"):
            raise UserError(f"recipe file {name} does not exist")
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "see `itpn list`"
        raise UserError(f"no recipe {name!r}; {hint}")
    if path.suffix == ".yaml":
        return read_yaml(path)
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError:
        raise
    except Exception as error:  # whatever a user's file may raise
        raise UserError(f"recipe file {path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"recipe file {path} must set `config` to an itpn.config.Config")
    return path.stem, config


def nearest(name: str, names: list[str]) -> str:
    """A hint at the right name ("; did you mean X?") to append to a message, or an empty string."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
