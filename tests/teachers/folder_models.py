"""Small models of transformers with every parameter from N(0, 0.1), saved in its own format, and their features."""

import functools

import torch
import transformers
from torch import nn

VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9, "intermediate_size": 16}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1}
CLIP = {**VIT, "patch_size": 16, "image_size": 64, "intermediate_size": 96}
NAFLEX = {**VIT, "patch_size": 16, "num_patches": 16, "intermediate_size": 96}


def both(kind, vision, **more):
    """A model of images and text."""
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=TEXT, **more)
    return getattr(transformers, f"{kind}Model")(config)


def one(name, **config):
    model = getattr(transformers, name)
    return model(model.config_class(**config))


MODELS = {
    "dinov3_vit": lambda: one(
        "DINOv3ViTModel", **VIT, patch_size=16, intermediate_size=96, num_register_tokens=4, image_size=64
    ),
    "dinov3_vit gated": lambda: one(
        "DINOv3ViTModel",
        **{**VIT, "hidden_act": "silu"},
        use_gated_mlp=True,
        intermediate_size=96,
        num_register_tokens=3,
        query_bias=False,
        value_bias=False,
    ),
    "dinov3_convnext": lambda: one("DINOv3ConvNextModel", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1]),
    "dinov2": lambda: one("Dinov2Model", **VIT, patch_size=14, image_size=56),
    "dinov2 swiglu": lambda: one("Dinov2Model", **VIT, patch_size=14, image_size=56, use_swiglu_ffn=True),
    "dinov2 classifier": lambda: one("Dinov2ForImageClassification", **VIT, patch_size=14, image_size=56),
    "dinov2_with_registers": lambda: one("Dinov2WithRegistersModel", **VIT, patch_size=14, image_size=56),
    "siglip2": lambda: both("Siglip2", NAFLEX),
    "siglip2 tower": lambda: one("Siglip2VisionModel", **NAFLEX),
    "siglip2 of fixed size": lambda: both("Siglip", {**CLIP, "patch_size": 14, "image_size": 56}),
    "siglip tower": lambda: one("SiglipVisionModel", **CLIP),
    "clip": lambda: both("CLIP", CLIP, projection_dim=24),
    "clip gelu": lambda: both("CLIP", {**CLIP, "hidden_act": "gelu"}, projection_dim=24),
    "clip tower": lambda: one("CLIPVisionModel", **CLIP),
    "clip tower, projected": lambda: one("CLIPVisionModelWithProjection", **CLIP, projection_dim=24),
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS = {"dinov3": "DINOv3ViT", "dinov2": "Bit", "siglip": "Siglip", "clip": "CLIP"}


@functools.cache
def make(kind, strong=False):
    """A model with every parameter from N(0, 0.1): norms, layer scales, tokens and positions too.

    Args:
        strong: norms from N(1, 0.1), so that the hidden layers are far from linear.
    """
    transformers.logging.set_verbosity_error()
    torch.manual_seed(len(kind))
    model = MODELS[kind]().eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(strong and "norm" in name and "weight" in name), std=0.1)
    return model


def processor(kind):
    name = next(PROCESSORS[start] for start in PROCESSORS if kind.startswith(start))
    return getattr(transformers, f"{name}ImageProcessor")(**IMAGENET if name == "Bit" else {})


def save(kind, folder, strong=False):
    make(kind, strong).save_pretrained(folder)
    processor(kind).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def features(kind, images, strong=False):
    """What transformers' own processor and model return for the patches of uint8 images [B, 3, H, W]."""
    model = make(kind, strong)
    x = processor(kind)(images=list(images), do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    tower = getattr(model, "dinov2", model)
    while hasattr(tower, "vision_model"):
        tower = tower.vision_model
    if kind in ("siglip2", "siglip2 tower"):  # takes patches, channels last
        rows, cols = images.shape[-2] // 16, images.shape[-1] // 16
        patches = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(len(x), rows * cols, -1)
        mask = torch.ones(len(x), rows * cols, dtype=torch.int64)
        return tower(patches, mask, torch.tensor([[rows, cols]] * len(x))).last_hidden_state
    sizes = {"interpolate_pos_encoding": True} if kind.startswith(("clip", "siglip")) else {}
    tokens = tower(x, **sizes).last_hidden_state
    if kind.startswith("clip"):  # which has neither norm nor projection for patches
        tokens = tower.post_layernorm(tokens)
        tokens = model.visual_projection(tokens) if hasattr(model, "visual_projection") else tokens
    class_tokens = 0 if kind.startswith("siglip") else 1
    return tokens[:, class_tokens + getattr(model.config, "num_register_tokens", 0) :]
