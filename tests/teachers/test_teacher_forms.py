"""Teachers by timm's names, from files in timm's and in their authors' form.

The features are compared with those of transformers' model of the same weights, every parameter from N(0, 0.1); of
Perception Encoders and EVA-02, which transformers has not, with formulas of their own here. The models are timm's own
functions with smaller sizes.
"""

import hashlib

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from folder_models import features, make
from safetensors.torch import save_file
from timm.models import convnext, eva, generate_default_cfgs, get_pretrained_cfg, register_model, vision_transformer

from itpn.errors import UserError
from itpn.teachers.folders import read_folder
from itpn.teachers.licences import licence_of
from itpn.teachers.plan import make_plan
from itpn.teachers.timm_teacher import build_teacher, teacher_width

BOUND = 1e-5
SIGLIP = "siglip2 of fixed size"
VIT = {"embed_dim": 64, "depth": 2, "num_heads": 4}
SMALLER = {  # of timm's models: their sizes, and those of their images
    "vit_small_patch16_dinov3_qkvb": ({**VIT, "mlp_ratio": 1.5}, 64),
    "vit_small_patch16_dinov3": ({**VIT, "mlp_ratio": 1.5}, 64),
    "convnext_tiny": ({"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}, 128),
    "vit_small_patch14_dinov2": ({**VIT, "mlp_ratio": 4}, 56),
    "vit_small_patch14_reg4_dinov2": ({**VIT, "mlp_ratio": 4}, 56),
    "vit_so400m_patch14_siglip_224": ({**VIT, "mlp_ratio": 1.5}, 56),
    "vit_base_patch16_clip_quickgelu_224": ({**VIT, "mlp_ratio": 1.5, "num_classes": 24}, 64),
    "vit_base_patch16_clip_224": ({**VIT, "mlp_ratio": 1.5, "num_classes": 24}, 64),
    "vit_pe_core_base_patch16_224": ({**VIT, "attn_pool_num_heads": 4}, 64),
    "vit_pe_spatial_base_patch16_512": (VIT, 64),
    "eva02_tiny_patch14_224": ({**VIT, "mlp_ratio": 1.5}, 56),
    "eva02_base_patch14_224": ({**VIT, "mlp_ratio": 1.5}, 56),
}
default_cfgs = {}


def register(name, sizes, side):
    module = next(module for module in (eva, convnext, vision_transformer) if hasattr(module, name))
    cfg = get_pretrained_cfg(name).to_dict(remove_null=False)
    tagged = f"{name}_smaller.{cfg['tag']}"
    # their patches in place of those of the published sizes, which rotary positions are stretched to
    native = {"ref_feat_shape": (4, 4)} if "eva02" in name else {}

    def smaller(pretrained=False, **options):
        return getattr(module, name)(pretrained, **{**sizes, **native, **options})

    smaller.__name__ = f"{name}_smaller"
    smaller.__module__ = __name__
    default_cfgs.update(generate_default_cfgs({tagged: cfg | {"input_size": (3, side, side)}}))
    register_model(smaller)


for name, (sizes, side) in SMALLER.items():
    register(name, sizes, side)


def smaller(name):
    return f"{name}_smaller"


def draw_images(size):
    return torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)


def check(name, state, path, kind, grids):
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, path)
    for grid in grids:
        teacher = build_teacher(smaller(name), str(path), grid)
        images = draw_images(teacher.img_size)
        expected = features(kind, images)
        assert teacher(images).shape == expected.shape
        assert (teacher(images) - expected).abs().max() < BOUND
    assert ("GELUTanh" in repr(teacher)) == ("siglip" in name)  # which hardly differ on such small numbers


def renamed(kind, *pairs, without=()):
    """transformers' weights by other names."""
    state = {}
    for key, tensor in make(kind).state_dict().items():
        if not key.startswith(without):
            for old, new in pairs:
                key = key.replace(old, new)
            state[key] = tensor
    return state


def fused(state, old=("q_proj", "k_proj", "v_proj"), new="qkv"):
    """Queries, keys and values in one tensor each; a bias that is not there is 0, as of DINOv3's keys."""
    state = dict(state)
    for key in [key for key in state if old[0] in key]:
        parts = [state.pop(key.replace(old[0], name), None) for name in old]
        parts = [torch.zeros_like(parts[0]) if part is None else part for part in parts]
        state[key.replace(old[0], new)] = torch.cat(parts)
    return state


# --- authors' names


def dinov3():
    names = [("model.layer.", "blocks."), ("embeddings.register_tokens", "storage_tokens"), ("layer_scale", "ls")]
    names += [("embeddings.patch_embeddings", "patch_embed.proj"), ("embeddings.", ""), (".lambda1", ".gamma")]
    names += [("attention.o_proj", "attn.proj"), ("attention.", "attn."), ("up_proj", "fc1"), ("down_proj", "fc2")]
    state = fused(renamed("dinov3_vit", *names))
    state["mask_token"] = state["mask_token"][0]
    for index in range(2):
        state[f"blocks.{index}.attn.qkv.bias_mask"] = torch.full((192,), float("nan"))  # as it is before it is filled
        state[f"blocks.{index}.attn.qkv.bias"][64:128] = 7.0  # which is masked
    return state | {"rope_embed.periods": torch.ones(4)}


def dinov3_convnext():
    names = [("model.", ""), (".layers.", "."), ("depthwise_conv", "dwconv"), ("pointwise_conv", "pwconv")]
    state = {}
    for key, tensor in renamed("dinov3_convnext", *names).items():
        parts = key.split(".")
        if parts[2:3] == ["downsample_layers"]:
            key = ".".join(["downsample_layers", parts[1], *parts[3:]])
        state[key.replace("layer_norm", "norm")] = tensor
    return state | {f"norms.3.{key}": state[f"norm.{key}"] for key in ("weight", "bias")}


def dinov2(kind="dinov2"):
    names = [("encoder.layer.", "blocks."), ("embeddings.patch_embeddings.projection", "patch_embed.proj")]
    names += [("embeddings.position_embeddings", "pos_embed"), ("embeddings.", ""), ("layernorm", "norm")]
    names += [("layer_scale", "ls"), (".lambda1", ".gamma"), ("attention.o_proj", "attn.proj")]
    names += [("attention.output.dense", "attn.proj"), ("attention.attention.", "attention."), ("attention.", "attn.")]
    names += [("query.", "q_proj."), ("key.", "k_proj."), ("value.", "v_proj.")]
    return fused(renamed(kind, *names))


def clip(kind):
    """OpenAI's and open_clip's names, of the whole model."""
    names = [("vision_model.", "visual."), ("embeddings.class_embedding", "class_embedding")]
    names += [("embeddings.patch_embedding", "conv1"), ("embeddings.position_embedding.weight", "positional_embedding")]
    names += [("encoder.layers.", "transformer.resblocks."), ("self_attn.", "attn."), ("pre_layrnorm", "ln_pre")]
    names += [("post_layernorm", "ln_post"), ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]
    state = fused(renamed(kind, *names, without=("text_", "logit_bias")))
    state = {
        key.replace("qkv.weight", "in_proj_weight").replace("qkv.bias", "in_proj_bias"): t for key, t in state.items()
    }
    projection = state.pop("visual_projection.weight")
    return state | {"visual.proj": projection.T, "token_embedding.weight": torch.ones(9, 16)}


def siglip():
    """timm's names of the tower without its pooling by attention, and with open_clip's prefix the whole."""
    names = [("vision_model.", ""), ("embeddings.patch_embedding", "patch_embed.proj")]
    names += [("embeddings.position_embedding.weight", "pos_embed")]
    names += [("encoder.layers.", "blocks."), ("self_attn.out_proj", "attn.proj"), ("self_attn.", "attn.")]
    names += [("post_layernorm", "norm"), ("layer_norm", "norm")]
    state = fused(renamed("siglip2 of fixed size", *names, without=("text_", "logit_", "vision_model.head.")))
    state["pos_embed"] = state["pos_embed"][None]
    pooling = {
        f"attn_pool.{key}": t
        for key, t in timm.create_model(smaller("vit_so400m_patch14_siglip_224"), img_size=56, num_classes=0)
        .attn_pool.state_dict()
        .items()
    }
    return {f"visual.trunk.{key}": tensor for key, tensor in (state | pooling).items()}


AUTHORS = {
    "dinov3": ("vit_small_patch16_dinov3_qkvb", dinov3, "dinov3_vit", ((4, 4), (5, 3))),
    "dinov3 convnext": ("convnext_tiny", dinov3_convnext, "dinov3_convnext", ((4, 4), (2, 3))),
    "dinov2": ("vit_small_patch14_dinov2", dinov2, "dinov2", ((4, 4), (2, 8), (3, 5))),
    "dinov2 with registers": (
        "vit_small_patch14_reg4_dinov2",
        lambda: dinov2("dinov2_with_registers"),
        "dinov2_with_registers",
        ((4, 4), (2, 8), (3, 5)),
    ),
    "openai clip": ("vit_base_patch16_clip_quickgelu_224", lambda: clip("clip"), "clip", ((4, 4),)),
    "open_clip": ("vit_base_patch16_clip_224", lambda: clip("clip gelu"), "clip gelu", ((4, 4),)),
    "open_clip siglip": ("vit_so400m_patch14_siglip_224", siglip, "siglip2 of fixed size", ((4, 4),)),
}


@pytest.mark.parametrize("form", AUTHORS)
def test_authors_files(form, tmp_path):
    name, make_state, kind, grids = AUTHORS[form]
    check(name, make_state(), tmp_path / "weights.safetensors", kind, grids)


@pytest.mark.parametrize("form", AUTHORS)
def test_timms_files(form, tmp_path):
    """The weights of transformers' folder by timm's names."""
    name, _, kind, grids = AUTHORS[form]
    make(kind).save_pretrained(tmp_path / "folder")
    state = read_folder(str(tmp_path / "folder")).state
    if "siglip" in name:
        model = timm.create_model(smaller(name), img_size=56, num_classes=0)
        state |= {key: tensor for key, tensor in model.state_dict().items() if key.startswith("attn_pool.")}
    check(name, state, tmp_path / "weights.safetensors", kind, grids)


def big_vision():
    """The arrays of SigLIP's authors, with blocks in one array each."""
    theirs = {key.removeprefix("vision_model."): t.numpy() for key, t in make(SIGLIP).state_dict().items()}
    arrays = {"embedding/kernel": theirs["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)}
    arrays |= {"embedding/bias": theirs["embeddings.patch_embedding.bias"]}
    arrays |= {"pos_embedding": theirs["embeddings.position_embedding.weight"][None]}
    arrays |= dense_norm("Transformer/encoder_norm", "post_layernorm", theirs)
    layers = [big_vision_block(f"encoder.layers.{index}", theirs) for index in range(2)]
    arrays |= {f"Transformer/encoderblock/{key}": np.stack([layer[key] for layer in layers]) for key in layers[0]}
    head = timm.create_model(smaller("vit_so400m_patch14_siglip_224"), img_size=56, num_classes=0).attn_pool
    pooling = {"probe": head.latent, "LayerNorm_0/scale": head.norm.weight, "LayerNorm_0/bias": head.norm.bias}
    arrays |= {f"MAPHead_0/{key}": tensor.detach().numpy() for key, tensor in pooling.items()}
    for name in ("query", "key", "value", "out"):
        shape = (4, 16, 64) if name == "out" else (64, 4, 16)
        arrays[f"MAPHead_0/MultiHeadDotProductAttention_0/{name}/kernel"] = np.zeros(shape, np.float32)
        arrays[f"MAPHead_0/MultiHeadDotProductAttention_0/{name}/bias"] = np.zeros(64, np.float32)
    for index, shape in enumerate(((64, 96), (96, 64))):
        arrays[f"MAPHead_0/MlpBlock_0/Dense_{index}/kernel"] = np.zeros(shape, np.float32)
        arrays[f"MAPHead_0/MlpBlock_0/Dense_{index}/bias"] = np.zeros(shape[1], np.float32)
    return {f"params/img/{key}": array for key, array in arrays.items()} | {"params/t": np.ones(1, np.float32)}


def dense_norm(name, theirs, state):
    return {f"{name}/scale": state[f"{theirs}.weight"], f"{name}/bias": state[f"{theirs}.bias"]}


def big_vision_block(at, state):
    block = dense_norm("LayerNorm_0", f"{at}.layer_norm1", state) | dense_norm(
        "LayerNorm_1", f"{at}.layer_norm2", state
    )
    for index in range(2):
        block[f"MlpBlock_0/Dense_{index}/kernel"] = state[f"{at}.mlp.fc{index + 1}.weight"].T
        block[f"MlpBlock_0/Dense_{index}/bias"] = state[f"{at}.mlp.fc{index + 1}.bias"]
    for name in ("query", "key", "value", "out"):
        weight, bias = (
            state[f"{at}.self_attn.{name[0] if name != 'out' else name}_proj.{k}"] for k in ("weight", "bias")
        )
        heads = (4, 16, 64) if name == "out" else (64, 4, 16)
        block[f"MultiHeadDotProductAttention_0/{name}/kernel"] = weight.T.reshape(heads)
        block[f"MultiHeadDotProductAttention_0/{name}/bias"] = bias if name == "out" else bias.reshape(4, 16)
    return block


def test_arrays_of_big_vision(tmp_path):
    path, name = tmp_path / "siglip2.npz", smaller("vit_so400m_patch14_siglip_224")
    arrays = big_vision()
    np.savez(path, **arrays)
    teacher = build_teacher(name, str(path), (4, 4))
    images = draw_images((56, 56))
    assert (teacher(images) - features(SIGLIP, images)).abs().max() < BOUND
    assert teacher.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert teacher_width(name, str(path)) == 64
    assert build_teacher(name, str(path), (5, 3))(draw_images((70, 42))).shape == (2, 15, 64)

    wrong = {"deeper": {}, "objects": {"params/img/pos_embedding": np.array([{}])}, "less": None}
    for case, changed in wrong.items():
        held = arrays | (changed or {})
        if case == "deeper":
            block = "params/img/Transformer/encoderblock"
            held = {key: np.concatenate([a, a]) if key.startswith(block) else a for key, a in held.items()}
        if case == "less":
            held.pop("params/img/embedding/bias")
        np.savez(path, **held)
        with pytest.raises(UserError, match=rf"siglip2\.npz is not of {name} in big_vision's form: ") as error:
            build_teacher(name, str(path), (4, 4))
        assert "\n" not in str(error.value)
    np.savez_compressed(path, **arrays)
    with pytest.raises(UserError, match="compressed"):
        build_teacher(name, str(path), (4, 4))


def test_biases_that_timm_would_drop(tmp_path):
    path = tmp_path / "dinov3.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in dinov3().items()}, path)
    name = smaller("vit_small_patch16_dinov3")
    with pytest.raises(UserError, match=rf"{name} leaves out: give --teacher.name {name}_qkvb$"):
        build_teacher(name, str(path), (4, 4))


# --- Perception Encoders and EVA-02: by formulas


def rotate(x, angles):
    """Rotate pairs of neighbouring channels of [B, heads, N, C] by [N, C / 2]."""
    return torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(1), angles)
    ).flatten(-2)


def angles_of(rows, cols, width):
    """Of positions along two axes: a quarter of a head's channels each turn with falling frequencies."""
    frequencies = 10000 ** -(torch.arange(0, width // 2, 2) / (width // 2))
    first, second = torch.meshgrid(rows, cols, indexing="ij")
    return [place.flatten()[:, None] * frequencies for place in (first, second)]


def attend(q, k, v, heads, angles):
    """Attention of [B, N, C]; all but the first token, that of the class, are turned by their positions."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    q, k = (torch.cat([x[:, :, :1], rotate(x[:, :, 1:].contiguous(), angles)], dim=2) for x in (q, k))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def norm(x, state, name, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def perception_encoder(state, images, spatial):
    """Bolya et al. 2025: a class token at the position 0, patches from 1 on whatever the size."""
    x = F.conv2d(images, state["conv1.weight"], stride=16)
    rows, cols = x.shape[-2:]
    table = state["positional_embedding"]
    side = round((len(table) - 1) ** 0.5)
    grid = F.interpolate(table[1:].T.reshape(1, -1, side, side), (rows, cols), mode="bilinear").flatten(2)
    x = torch.cat([(state["class_embedding"] + table[0]).expand(len(x), 1, -1), (x.flatten(2) + grid).mT], dim=1)
    x = norm(x, state, "ln_pre", 1e-5)
    down, right = angles_of(torch.arange(1.0, rows + 1), torch.arange(1.0, cols + 1), 16)
    for index in range(2):
        at = f"transformer.resblocks.{index}"
        y = norm(x, state, f"{at}.ln_1", 1e-5)
        q, k, v = F.linear(y, state[f"{at}.attn.in_proj_weight"], state[f"{at}.attn.in_proj_bias"]).chunk(3, dim=-1)
        x = x + linear(attend(q, k, v, 4, torch.cat([right, down], dim=1)), state, f"{at}.attn.out_proj")
        y = norm(x, state, f"{at}.ln_2", 1e-5)
        x = x + linear(F.gelu(linear(y, state, f"{at}.mlp.c_fc")), state, f"{at}.mlp.c_proj")
    return (x if spatial else norm(x, state, "ln_post", 1e-5))[:, 1:]


def eva02(state, images, large):
    """Fang et al. 2023: rotary positions in the range of the published size, here 4; the norm of pre-training."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    rows, cols = x.shape[-2:]
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x.flatten(2).mT], dim=1) + state["pos_embed"]
    angles = torch.cat(angles_of(torch.arange(rows) / rows * 4, torch.arange(cols) / cols * 4, 16), dim=1)
    for index in range(2):
        at = f"blocks.{index}"
        y = norm(x, state, f"{at}.norm1", 1e-6)
        biases = state[f"{at}.attn.q_bias"], torch.zeros(64), state[f"{at}.attn.v_bias"]
        if large:
            q, k, v = (F.linear(y, state[f"{at}.attn.{n}_proj.weight"], b) for n, b in zip("qkv", biases, strict=True))
        else:
            q, k, v = F.linear(y, state[f"{at}.attn.qkv.weight"], torch.cat(biases)).chunk(3, dim=-1)
        x = x + linear(attend(q, k, v, 4, angles), state, f"{at}.attn.proj")
        y = norm(x, state, f"{at}.norm2", 1e-6)
        if large:
            y = norm(
                F.silu(linear(y, state, f"{at}.mlp.w1")) * linear(y, state, f"{at}.mlp.w2"),
                state,
                f"{at}.mlp.ffn_ln",
                1e-6,
            )
        else:
            gate, y = linear(y, state, f"{at}.mlp.w12").chunk(2, dim=-1)
            y = F.silu(gate) * y
        x = x + linear(y, state, f"{at}.mlp.w3")
    return norm(x, state, "norm", 1e-6)[:, 1:]


def draw_perception_encoder(spatial):
    shapes = {"conv1.weight": (64, 3, 16, 16), "positional_embedding": (17, 64), "class_embedding": (64,)}
    for index in range(2):
        at = f"transformer.resblocks.{index}"
        shapes |= {f"{at}.attn.in_proj_weight": (192, 64), f"{at}.attn.in_proj_bias": (192,)}
        shapes |= linears({f"{at}.attn.out_proj": (64, 64), f"{at}.mlp.c_fc": (256, 64), f"{at}.mlp.c_proj": (64, 256)})
        shapes |= norms(f"{at}.ln_1", f"{at}.ln_2")
    shapes |= norms("ln_pre")
    if not spatial:
        shapes |= norms("ln_post", "attn_pool.layernorm")
        shapes |= linears({"attn_pool.mlp.c_fc": (256, 64), "attn_pool.mlp.c_proj": (64, 256)})
        shapes |= {"attn_pool.probe": (1, 1, 64), "attn_pool.attn.in_proj_weight": (192, 64), "proj": (64, 24)}
        shapes |= {"attn_pool.attn.in_proj_bias": (192,), **linears({"attn_pool.attn.out_proj": (64, 64)})}
    return draw(shapes)


def draw_eva02(large):
    shapes = {"cls_token": (1, 1, 64), "pos_embed": (1, 17, 64), "mask_token": (1, 1, 64)}
    shapes |= linears({"lm_head": (32, 64)}) | norms("norm")
    shapes |= {"patch_embed.proj.weight": (64, 3, 14, 14), "patch_embed.proj.bias": (64,)}
    for index in range(2):
        at = f"blocks.{index}"
        shapes |= {f"{at}.attn.{name}_bias": (64,) for name in "qv"}
        shapes |= (
            {f"{at}.attn.{n}_proj.weight": (64, 64) for n in "qkv"} if large else {f"{at}.attn.qkv.weight": (192, 64)}
        )
        shapes |= linears(
            {f"{at}.mlp.w1": (96, 64), f"{at}.mlp.w2": (96, 64)} if large else {f"{at}.mlp.w12": (192, 64)}
        )
        shapes |= linears({f"{at}.attn.proj": (64, 64), f"{at}.mlp.w3": (64, 96)}) | norms(f"{at}.norm1", f"{at}.norm2")
        shapes |= {f"{at}.mlp.ffn_ln.{kind}": (96,) for kind in ("weight", "bias")} if large else {}
    return draw(shapes) | {"rope.freqs_cos": torch.ones(16, 16), "blocks.0.attn.rope.freqs_sin": torch.ones(16, 16)}


def linears(shapes):
    return {f"{n}.weight": shape for n, shape in shapes.items()} | {
        f"{n}.bias": shape[:1] for n, shape in shapes.items()
    }


def norms(*names):
    return {f"{name}.{kind}": (64,) for name in names for kind in ("weight", "bias")}


def draw(shapes):
    torch.manual_seed(1)
    return {key: 0.1 * torch.randn(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("form", ["authors", "timm"])
@pytest.mark.parametrize("spatial", [False, True], ids=["core", "spatial"])
def test_perception_encoders(spatial, form, tmp_path):
    name = smaller("vit_pe_spatial_base_patch16_512" if spatial else "vit_pe_core_base_patch16_224")
    state = draw_perception_encoder(spatial)
    # PE core's file has the text tower too
    held = state if spatial else {f"visual.{key}": t for key, t in state.items()} | {"logit_scale": torch.ones(())}
    if form == "timm":
        held = eva._convert_pe(state, None, prefix="")
        held = {key: tensor.contiguous() for key, tensor in held.items()}
    save_file(held, tmp_path / "pe.safetensors")
    for grid in ((4, 4), (2, 8), (6, 5)):
        teacher = build_teacher(name, str(tmp_path / "pe.safetensors"), grid)
        assert teacher.width == 64  # the projection follows the pooling
        images = draw_images(teacher.img_size)
        normalized = (images / 255 - 0.5) / 0.5
        assert (teacher(images) - perception_encoder(state, normalized, spatial)).abs().max() < BOUND


@pytest.mark.parametrize("form", ["authors", "timm"])
@pytest.mark.parametrize("large", [False, True], ids=["tiny", "base"])
def test_eva02(large, form, tmp_path):
    name = smaller("eva02_base_patch14_224" if large else "eva02_tiny_patch14_224")
    state = draw_eva02(large)
    path = tmp_path / ("eva.pt" if form == "authors" else "eva.safetensors")
    model = timm.create_model(name, img_size=56, num_classes=0)
    if form == "authors":
        torch.save({"module": state}, path)
    else:
        save_file(eva.checkpoint_filter_fn(dict(state), model), path)
    teacher = build_teacher(name, str(path), (4, 4))
    images = draw_images(teacher.img_size)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    assert (teacher(images) - eva02(state, (images / 255 - mean) / std, large)).abs().max() < BOUND
    assert teacher_width(name, str(path)) == 64


# --- the hub, and licences


def test_a_perception_encoder_of_the_hub_fits_any_size(monkeypatch, tmp_path):
    name, state = smaller("vit_pe_core_base_patch16_224"), draw_perception_encoder(False)
    state |= draw({"positional_embedding": (14**2 + 1, 64), "proj": (64, 1024)})
    published = {key: tensor.contiguous() for key, tensor in eva._convert_pe(state, None, prefix="").items()}
    path = tmp_path / "model.safetensors"
    save_file(published, path)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: dict(published))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: str(path))
    teacher = build_teacher(f"{name}.fb", None, (6, 5))
    images = draw_images(teacher.img_size)
    expected = perception_encoder(state, (images / 255 - 0.5) / 0.5, False)
    assert (teacher(images) - expected).abs().max() < BOUND
    assert teacher.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("vit_small_patch16_dinov3.lvd1689m", "dinov3-license"),
        ("vit_small_patch16_dinov3", "dinov3-license"),
        ("convnext_tiny.dinov3_lvd1689m", "dinov3-license"),
        ("convnext_tiny", None),  # its tags have several
        ("vit_small_patch14_reg4_dinov2", "apache-2.0"),
        ("eva02_base_patch14_224", "mit"),
        ("vit_base_patch16_siglip_224.v2_webli", "apache-2.0"),
    ],
)
def test_licences_that_timm_knows(name, licence):
    plan = make_plan(name, None)
    assert licence_of(plan) == (licence and f"{licence}, says timm")
    plan.checkpoint = "weights.safetensors"
    assert licence_of(plan) == (licence and f"{licence} for those of this name, says timm")
