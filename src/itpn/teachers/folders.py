"""Folders of transformers and timm, `config.json` with `model.safetensors`: which model of timm they hold.

A folder of transformers becomes a model of timm: its sizes are read from the shapes of its weights, and from
``config.json`` what these do not show. All weights get timm's names; nothing of transformers is needed.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor

from itpn.checkpoints.io import read_state
from itpn.errors import UserError
from itpn.system.text import read_text

Weights = dict[str, Tensor]
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second holds the first in transformers 5
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # timm's names
CLIP_NAMES = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
)
DINOV2_NAMES = (
    (r"^dinov2(_with_registers)?\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attn.{m[1][0]}_proj."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1_proj."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
DINOV3_NAMES = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^(model\.)?layer\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
)
CONVNEXT_NAMES = (
    (r"^model\.", ""),
    (r"^stages\.0\.downsample_layers\.", "stem."),
    (r"\.downsample_layers\.", ".downsample."),
    (r"\.layers\.", ".blocks."),
    (r"\.depthwise_conv\.", ".conv_dw."),
    (r"\.layer_norm\.", ".norm."),
    (r"\.pointwise_conv(\d)\.", r".mlp.fc\1."),
    (r"^layer_norm\.", "head.norm."),
)


@dataclass
class FolderModel:
    """A folder's model, as timm builds it.

    Attributes:
        kind: what config.json calls it: the model_type of transformers, or timm's name.
        architecture: timm's name of the model whose sizes ``options`` change; with its tag of a folder of timm.
        state: weights, by timm's names.
        projected: a projection to the space shared with text is among them.
        overlay: of the model's pretrained_cfg: mean, std and size of its images.
        resampling: how transformers resamples its position table, mode and antialias; None leaves that to timm.
    """

    kind: str
    architecture: str
    state: Weights
    projected: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    overlay: dict[str, Any] = field(default_factory=dict)
    resampling: tuple[str, bool] | None = None


def read_folder(folder: str) -> FolderModel:
    """Read a folder of transformers or timm.

    Raises:
        UserError: it has no config.json or weights, they are corrupt, or of a model that is not read here.
    """
    config = _read_json(Path(folder) / "config.json", "give a folder with config.json and model.safetensors")
    if isinstance(config.get("architecture"), str):
        return _timm_model(folder, config)
    kind = config.get("model_type")
    vision: Any = config
    if kind in TOWERS:  # a model of images and text; what is left out has transformers' default
        vision, kind = config.get("vision_config") or config.get("vision_config_dict") or {}, TOWERS[kind]
    if kind not in READERS or not isinstance(vision, dict):
        raise UserError(
            f"teacher checkpoint {folder} holds a model of the kind {config.get('model_type')}, and no teacher: of "
            f"transformers' models of images these are read: {', '.join(sorted({*TOWERS, *READERS}))}"
        )
    state = read_weights(folder)
    try:
        model = READERS[kind](kind, vision, state)
    except KeyError as error:
        raise UserError(
            f"teacher checkpoint {folder} is no whole {config['model_type']} with an image tower: it has no {error}"
        ) from error
    except (TypeError, ValueError, ZeroDivisionError, IndexError, RuntimeError) as error:  # sizes that do not fit
        raise UserError(f"{folder}/config.json and the weights beside it do not belong together: {error}") from error
    model.overlay |= _read_normalization(folder)
    return model


def is_of_folder(path: Path) -> bool:
    """Whether a file is the weights of a folder that says what they are of."""
    return path.name == WEIGHTS[0] and path.with_name("config.json").is_file()


def weight_files(folder: str) -> list[Path]:
    """The files of a folder's weights, in order: one, or the parts that an index lists.

    Raises:
        UserError: there is none, or the index is corrupt or lists a file that is not there.
    """
    path = next((path for name in WEIGHTS if (path := Path(folder) / name).is_file()), None)
    if path is None:
        raise UserError(
            f"teacher checkpoint {folder} has no {WEIGHTS[0]}: save the model there, as save_pretrained does"
        )
    if not path.name.endswith(".index.json"):
        return [path]
    names = _read_json(path, "save the model again").get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise UserError(f"{path} lists no weights: save the model again")
    parts = [path.with_name(name) for name in sorted(set(names.values()))]
    missing = next((part for part in parts if not part.is_file()), None)
    if missing is not None or not parts:
        raise UserError(f"teacher checkpoint {folder} is not whole: {missing or path} is missing; fetch it again")
    return parts


def read_weights(folder: str) -> Weights:
    state: Weights = {}
    for path in weight_files(folder):
        part, _ = read_state(path, f"teacher checkpoint {path}", "a folder with model.safetensors")
        state |= {name: tensor for name, tensor in part.items() if isinstance(tensor, Tensor)}
    return state


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"teacher checkpoint {path.parent} has no {path.name}: {advice}")
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: {advice}")
    return content


def _read_normalization(folder: str) -> dict[str, Any]:
    """Mean and std of images in [0, 1] that the folder's preprocessor is set to; {} if there is none."""
    path = next((path for name in PROCESSORS if (path := Path(folder) / name).is_file()), None)
    if path is None:
        return {}
    config = _read_json(path, "fetch the folder again")
    config = config.get("image_processor") or config
    try:
        scale = 255 * float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 255.0
        mean, std = config.get("image_mean"), config.get("image_std")
        if not config.get("do_normalize", True):
            mean, std = [0.0] * 3, [1.0] * 3
        if mean is None or std is None:
            return {}
        mean, std = (tuple(float(value) / scale for value in values) for values in (mean, std))
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError("not three numbers each, std above 0")
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} has no usable image_mean and image_std ({error}): fetch the folder again") from error
    return {"mean": mean, "std": std}


# --- kinds of models


def _timm_model(folder: str, config: dict[str, Any]) -> FolderModel:
    """Of a folder as timm's repositories on the hub are."""
    cfg = config.get("pretrained_cfg") or {}
    name = config["architecture"]
    name = f"{name}.{cfg['tag']}" if isinstance(cfg, dict) and cfg.get("tag") and "." not in name else name
    known = {key: tuple(cfg[key]) for key in ("mean", "std") if isinstance(cfg.get(key), list) and len(cfg[key]) == 3}
    return FolderModel(name, name, read_weights(folder), overlay=known)


def _clip(kind: str, config: dict[str, Any], state: Weights) -> FolderModel:
    """CLIP's image tower, with the projection to the space shared with text where the folder has it."""
    unused = r"^(text_model\.|text_projection|logit_|.*position_ids$)"
    projection = state.pop("visual_projection.weight", None)
    state = _rename(state, CLIP_NAMES, unused)
    state["cls_token"] = state["cls_token"][None, None]
    state["pos_embed"] = state["pos_embed"][None]
    _fuse_attention(state)
    if projection is not None:
        state |= {"head.weight": projection, "head.bias": torch.zeros(len(projection))}
    model = _vit(kind, "vit_base_patch16_clip_quickgelu_224.openai", config, state, eps=1e-5, prefix=1)
    model.options |= {"num_classes": 0 if projection is None else len(projection)}
    model.options["act_layer"] = _activation(config, "quick_gelu")
    model.projected = projection is not None
    return model


def _siglip(kind: str, config: dict[str, Any], state: Weights) -> FolderModel:
    """The image tower of SigLIP and SigLIP 2, without the pooling by attention; also of images in any aspect."""
    unused = r"^(text_model\.|logit_|(vision_model\.)?head\.|.*position_ids$)"
    state = _rename(state, CLIP_NAMES, unused)
    weight = state["patch_embed.proj.weight"]
    if weight.ndim == 2:  # SigLIP 2 in any aspect: linear, of patches whose channels come last
        side = round((weight.shape[1] / 3) ** 0.5)
        state["patch_embed.proj.weight"] = weight.reshape(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
    state["pos_embed"] = state["pos_embed"][None]
    _fuse_attention(state)
    model = _vit(kind, "vit_base_patch16_siglip_gap_224.v2_webli", config, state, eps=1e-6, prefix=0)
    model.options |= {"num_classes": 0, "act_layer": _activation(config, "gelu_pytorch_tanh")}
    if kind.startswith("siglip2"):
        model.resampling = ("bilinear", True)
    return model


def _dinov2(kind: str, config: dict[str, Any], state: Weights) -> FolderModel:
    state = _rename(state, DINOV2_NAMES, r"(^classifier\.|mask_token$)")
    _fuse_attention(state)
    _fuse_gate(state)
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    swiglu = state["blocks.0.mlp.fc2.weight"].shape[1] * 2 == hidden
    base = "vit_giant_patch14_dinov2.lvd142m" if swiglu else "vit_base_patch14_dinov2.lvd142m"
    registers = "reg_token" in state and state["reg_token"].shape[1] > 0
    model = _vit(kind, base, config, state, eps=1e-6, prefix=1)
    model.options |= {"num_classes": 0, "init_values": 1.0, "qkv_bias": "blocks.0.attn.qkv.bias" in state}
    if not swiglu:
        model.options["act_layer"] = _activation(config, "gelu")
    if kind == "dinov2_with_registers":
        # timm's table has no place for the class token, and none for registers
        table = state["pos_embed"]
        state |= {"cls_token": state["cls_token"] + table[:, :1], "pos_embed": table[:, 1:].contiguous()}
        model.options |= {"reg_tokens": state["reg_token"].shape[1] if registers else 0, "no_embed_class": True}
        model.resampling = ("bicubic", True)
    return model


def _dinov3(kind: str, config: dict[str, Any], state: Weights) -> FolderModel:
    """DINOv3's ViT: rotary positions, which it computes for whatever size."""
    state = _rename(state, DINOV3_NAMES, r"(mask_token$|^rope_embeddings\.)")
    gated = "blocks.0.mlp.gate_proj.weight" in state
    down = {"gate_proj": "fc1_g", "up_proj": "fc1_x" if gated else "fc1", "down_proj": "fc2"}
    state = {re.sub(r"\.mlp\.(\w+)\.", lambda m: f".mlp.{down.get(m[1], m[1])}.", key): t for key, t in state.items()}
    if config.get("hidden_act", "gelu") != ("silu" if gated else "gelu"):
        raise ValueError(f"hidden_act {config['hidden_act']} is not DINOv3's")
    if any(key.endswith("k_proj.bias") for key in state):
        raise ValueError("it has a bias of the keys, which DINOv3 has not")
    for key in [key for key in state if key.endswith("attn.q_proj.weight")]:
        start = key.removesuffix("q_proj.weight")
        state[f"{start}qkv.weight"] = torch.cat([state.pop(f"{start}{name}_proj.weight") for name in "qkv"])
        width = len(state[f"{start}qkv.weight"]) // 3
        for name in "qv":
            state[f"{start}{name}_bias"] = state.pop(f"{start}{name}_proj.bias", torch.zeros(width))
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    registers = state.get("reg_token", torch.empty(1, 0, width)).shape[1]
    if not registers:
        state.pop("reg_token", None)
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    options = {
        "embed_dim": width,
        "depth": _count_blocks(state),
        "num_heads": _heads(config, 6, width),
        "patch_size": patch,
        "mlp_ratio": (hidden + 0.5) / width,  # timm multiplies and rounds down
        "qkv_bias": True,
        "num_reg_tokens": registers,
        "rope_temperature": float(config.get("rope_theta", 100.0)),
        "norm_layer": partial(LayerNorm, eps=float(config.get("layer_norm_eps", 1e-5))),
        "num_classes": 0,
        "swiglu_mlp": gated,
        "swiglu_align_to": int(gated),  # 1: the gate in a layer of its own, no width rounded
    }
    return FolderModel(kind, "vit_base_patch16_dinov3_qkvb.lvd1689m", state, options=options)


def _convnext(kind: str, config: dict[str, Any], state: Weights) -> FolderModel:
    """DINOv3's ConvNeXt."""
    state = _rename(state, CONVNEXT_NAMES, None)
    stages = sorted({int(key.split(".")[1]) for key in state if key.startswith("stages.")})
    depths = [len({key.split(".")[3] for key in state if key.startswith(f"stages.{i}.blocks.")}) for i in stages]
    _activation(config, "gelu", only=("gelu",))
    options = {
        "depths": tuple(depths),
        "dims": tuple(len(state[f"stages.{i}.blocks.0.gamma"]) for i in stages),
        "norm_eps": float(config.get("layer_norm_eps", 1e-6)),
        "num_classes": 0,
    }
    return FolderModel(kind, "convnext_tiny.dinov3_lvd1689m", state, options=options)


READERS: dict[str, Callable[[str, dict[str, Any], Weights], FolderModel]] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "siglip2_vision_model": _siglip,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "dinov3_convnext": _convnext,
}


# --- sizes and names


def _vit(
    kind: str, architecture: str, config: dict[str, Any], state: Weights, *, eps: float, prefix: int
) -> FolderModel:
    """A plain ViT with a position table, of ``prefix`` class tokens and a square of patches."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    places = state["pos_embed"].shape[1] - prefix
    side = round(places**0.5)
    if side**2 != places:
        raise ValueError(f"a position table of {places} patches, no square")
    options = {
        "embed_dim": width,
        "depth": _count_blocks(state),
        "num_heads": _heads(config, 12, width),
        "patch_size": patch,
        "mlp_ratio": (hidden + 0.5) / width,  # timm multiplies and rounds down
        "norm_layer": partial(LayerNorm, eps=float(config.get("layer_norm_eps", eps))),
    }
    overlay = {"input_size": (3, side * patch, side * patch), "fixed_input_size": True}
    return FolderModel(kind, architecture, state, options=options, overlay=overlay, resampling=("bicubic", False))


def _rename(state: Weights, names: Any, unused: str | None) -> Weights:
    renamed = {}
    for key, tensor in state.items():
        if unused is None or not re.search(unused, key):
            for pattern, name in names:
                key = re.sub(pattern, name, key)
            renamed[key] = tensor
    return renamed


def _fuse_attention(state: Weights) -> None:
    """Weights and biases of queries, keys and values in one tensor each."""
    for key in [key for key in state if key.endswith(("attn.q_proj.weight", "attn.q_proj.bias"))]:
        start, _, kind = key.rpartition("q_proj.")
        state[f"{start}qkv.{kind}"] = torch.cat([state.pop(f"{start}{name}_proj.{kind}") for name in "qkv"])


def _fuse_gate(state: Weights) -> None:
    """Gate and input of a SwiGLU in one tensor each, as timm and most files have them."""
    for key in [key for key in state if ".mlp.gate_proj." in key]:
        gate, up = state.pop(key), state.pop(key.replace("gate_proj", "up_proj"))
        state[key.replace("gate_proj", "fc1")] = torch.cat([gate, up])


def _count_blocks(state: Weights) -> int:
    return len({key.split(".")[1] for key in state if key.startswith("blocks.")})


def _heads(config: dict[str, Any], default: int, width: int) -> int:
    heads = config.get("num_attention_heads", default)
    if type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(f"num_attention_heads {heads} for a width of {width}")
    return heads


def _activation(config: dict[str, Any], default: str, only: tuple[str, ...] = tuple(ACTIVATIONS)) -> str:
    name = config.get("hidden_act", default)
    if name not in only:
        raise ValueError(f"hidden_act {name}, not {' or '.join(only)}")
    return ACTIVATIONS[name]
