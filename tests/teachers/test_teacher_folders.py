"""Folders of transformers: the features are those of transformers' own model, and what cannot be read is said."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers
from folder_models import MODELS, features, make, save
from safetensors.torch import load_file, save_file

from itpn.errors import UserError
from itpn.teachers.folders import READERS
from itpn.teachers.plan import make_plan
from itpn.teachers.timm_teacher import build_teacher, count_teacher_parameters, teacher_width

BOUND = 1e-5  # of features whose parameters, norms and layer scales included, are from N(0, 0.1)
SIZES = {"native": (4, 4), "as many patches": (2, 8), "smaller and larger": (3, 5)}


def draw_images(size):
    return torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save(kind, tmp_path_factory.mktemp("folder"))
        return made[kind]

    return folder


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the folder of a kind of model, to change."""
    return lambda kind: Path(shutil.copytree(folders(kind), tmp_path / kind))


def change(path, **settings):
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def parts(folder, **changed):
    return {**load_file(folder / "model.safetensors"), **changed}


@pytest.mark.parametrize("kind", MODELS)
def test_features_are_those_of_transformers(kind, folders):
    folder = folders(kind)
    for grid in SIZES.values():
        teacher = build_teacher("auto", folder, grid)
        images = draw_images(teacher.img_size)
        expected, ours = features(kind, images), teacher(images)
        assert ours.shape == expected.shape == (2, grid[0] * grid[1], teacher.width)
        assert expected.std() > 0.05
        assert (ours - expected).abs().max() < BOUND
    assert teacher.name.startswith(make(kind).config.model_type)
    assert teacher_width("auto", folder) == teacher.width


@pytest.mark.parametrize("kind", ["siglip tower", "clip", "clip gelu", "dinov2"])
def test_activations_are_those_of_transformers(kind, tmp_path):
    """Kinds of GELU differ by less than 1e-5 near 0."""
    teacher = build_teacher("auto", save(kind, tmp_path, strong=True), (4, 4))
    images = draw_images(teacher.img_size)
    expected = features(kind, images, strong=True)
    assert (teacher(images) - expected).abs().max() < BOUND * expected.std()


@pytest.mark.parametrize("kind", ["dinov3_vit", "dinov3_convnext", "dinov2", "siglip2", "clip", "clip tower"])
def test_settings_that_a_folder_leaves_out(kind, folders, copy):
    """They are transformers' own; of published folders, many leave out what is so."""
    folder = copy(kind)
    config = json.loads((folder / "config.json").read_text())
    vision = config.get("vision_config", config)
    for name in ("hidden_act", "layer_norm_eps", "rope_theta", "num_channels", "patch_size", "image_size"):
        vision.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    whole, sparse = (build_teacher("auto", str(path), (4, 4)) for path in (folders(kind), folder))
    assert repr(sparse.tower) == repr(whole.tower)
    images = draw_images(whole.img_size)
    assert torch.equal(sparse(images), whole(images))
    vision["layer_norm_eps"] = 0.25
    (folder / "config.json").write_text(json.dumps(config))
    assert "eps=0.25" in repr(build_teacher("auto", str(folder), (4, 4)).tower)


# --- published sizes

VITS = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
VITS |= {"giant": (1536, 40, 24), "huge_plus": (1280, 32, 20), "so400m": (1152, 27, 16)}


def vit(size, **more):
    return dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads"), VITS[size], strict=True), **more)


def dinov3(size, **more):
    return "DINOv3ViTModel", vit(size, num_register_tokens=4, **more)


def dinov2(size, registers=False, **more):
    name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    return name, vit(size, patch_size=14, image_size=518, **more)


def convnext(dims, depths):
    return "DINOv3ConvNextModel", {"hidden_sizes": dims, "depths": depths}


GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
SIGLIP, CLIP = "SiglipVisionModel", "CLIPVisionModelWithProjection"
PUBLISHED = {
    "vit_small_patch16_dinov3_qkvb": dinov3("small", intermediate_size=1536),
    "vit_base_patch16_dinov3_qkvb": dinov3("base", intermediate_size=3072),
    "vit_large_patch16_dinov3_qkvb": dinov3("large", intermediate_size=4096),
    "vit_huge_plus_patch16_dinov3_qkvb": dinov3("huge_plus", intermediate_size=5120, **GATED),
    "convnext_tiny.dinov3_lvd1689m": convnext([96, 192, 384, 768], [3, 3, 9, 3]),
    "convnext_small.dinov3_lvd1689m": convnext([96, 192, 384, 768], [3, 3, 27, 3]),
    "convnext_base.dinov3_lvd1689m": convnext([128, 256, 512, 1024], [3, 3, 27, 3]),
    "convnext_large.dinov3_lvd1689m": convnext([192, 384, 768, 1536], [3, 3, 27, 3]),
    "vit_small_patch14_dinov2": dinov2("small"),
    "vit_base_patch14_dinov2": dinov2("base"),
    "vit_giant_patch14_dinov2": dinov2("giant", use_swiglu_ffn=True),
    "vit_small_patch14_reg4_dinov2": dinov2("small", registers=True),
    "vit_large_patch14_reg4_dinov2": dinov2("large", registers=True),
    "vit_base_patch16_siglip_gap_224.v2_webli": (SIGLIP, {}),
    "vit_so400m_patch14_siglip_gap_224.v2_webli": (SIGLIP, vit("so400m", intermediate_size=4304, patch_size=14)),
    "vit_base_patch16_clip_quickgelu_224.openai": (CLIP, {"patch_size": 16}),
    "vit_large_patch14_clip_quickgelu_224.openai": (
        CLIP,
        vit("large", intermediate_size=4096, patch_size=14, projection_dim=768),
    ),
    "vit_huge_patch14_clip_224.laion2b": (
        CLIP,
        vit("huge", intermediate_size=5120, patch_size=14, projection_dim=1024, hidden_act="gelu"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_become_timms(name):
    """Of transformers' settings of published weights: the tensors of timm's model of that name."""
    model, settings = PUBLISHED[name]
    with torch.device("meta"):
        theirs = getattr(transformers, model)
        theirs = theirs(theirs.config_class(**settings))
        projected = 1 if model == CLIP else 0
        ours = timm.create_model(name, num_classes=theirs.config.projection_dim if projected else 0)
    kind = theirs.config.model_type
    read = READERS[kind](kind, theirs.config.to_dict(), dict(theirs.state_dict()))
    expected = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert {key: tensor.shape for key, tensor in read.state.items()} == expected
    blocks = getattr(ours, "blocks", None)
    if blocks is not None:
        assert read.options["num_heads"] == blocks[0].attn.num_heads


# --- normalization, names, and files of other kinds


def test_normalization_is_the_folders(copy):
    folder = copy("dinov2")
    path = folder / "preprocessor_config.json"
    change(path, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])

    def read():
        teacher = build_teacher("auto", str(folder), (4, 4))
        return teacher.mean.flatten().tolist(), teacher.std.flatten().tolist()

    assert read() == (pytest.approx([0.1, 0.2, 0.3]), pytest.approx([0.5, 0.6, 0.7]))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(path.read_text())}))
    path.unlink()
    assert read() == (pytest.approx([0.1, 0.2, 0.3]), pytest.approx([0.5, 0.6, 0.7]))
    (folder / "processor_config.json").unlink()  # as timm's model of that kind has it
    assert read() == (pytest.approx([0.485, 0.456, 0.406]), pytest.approx([0.229, 0.224, 0.225]))
    path.write_text(json.dumps({"image_mean": [1, 2, 3], "image_std": [1, 1, 1], "rescale_factor": 1 / 127.5}))
    assert read() == (pytest.approx([0.5, 1.0, 1.5]), pytest.approx([0.5, 0.5, 0.5]))
    path.write_text(json.dumps({"image_mean": [1, 2, 3], "image_std": [1, 1, 1], "do_normalize": False}))
    assert read() == (pytest.approx([0, 0, 0]), pytest.approx([1, 1, 1]))
    path.write_text(json.dumps({"image_mean": [0.5], "image_std": [0.0]}))
    with pytest.raises(UserError, match=r"preprocessor_config\.json has no usable image_mean and image_std"):
        read()


def test_names_that_fit_a_folder(folders):
    folder = folders("clip")
    for name in ("auto", "clip", "clip_vision_model"):
        assert make_plan(name, folder).name == "clip_vision_model"
    for name in ("vit_base_patch16_clip_224", "dinov2", "nonesuch"):
        with pytest.raises(
            UserError, match=rf"holds clip_vision_model, as .* says, not {name}: give --teacher.name auto"
        ):
            make_plan(name, folder)


def test_half_precision_and_parts(folders, copy):
    whole = build_teacher("auto", folders("dinov3_vit"), (4, 4))
    folder = copy("dinov3_vit")
    tensors = parts(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, some in enumerate((names[:9], names[9:]), 1):
        save_file({name: tensors[name] for name in some}, folder / f"model-0000{number}-of-00002.safetensors")
    index = {name: f"model-0000{1 if name in names[:9] else 2}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    teacher = build_teacher("auto", str(folder), (4, 4))
    images = draw_images((64, 64))
    assert torch.equal(teacher(images), whole(images))
    assert teacher.sha256 != whole.sha256
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"is not whole: .*model-00002-of-00002\.safetensors is missing"):
        build_teacher("auto", str(folder), (4, 4))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(UserError, match="lists no weights"):
        build_teacher("auto", str(folder), (4, 4))

    (folder / "model.safetensors.index.json").unlink()
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    half = build_teacher("auto", str(folder), (4, 4))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert 0 < (half(images) - whole(images)).abs().max() < 0.01


def test_a_folder_of_timm(folders, tmp_path):
    """As timm's repositories on the hub are, and `save_for_hf` writes."""
    model = timm.create_model("test_vit", num_classes=0)
    timm.models.save_for_hf(model, tmp_path / "folder")
    config = tmp_path / "folder" / "config.json"
    settings = json.loads(config.read_text())
    settings["pretrained_cfg"] |= {"tag": "r160_in1k", "mean": [0.1, 0.2, 0.3]}
    config.write_text(json.dumps(settings))
    for name in ("auto", "test_vit", "test_vit.r160_in1k"):
        teacher = build_teacher(name, str(tmp_path / "folder"), (10, 10))
        assert teacher.name == "test_vit.r160_in1k"
    assert teacher.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    images = draw_images((160, 160))
    with torch.no_grad():
        expected = model.eval().forward_features((images / 255 - teacher.mean) / teacher.std)[:, 1:]
    assert (teacher(images) - expected).abs().max() < BOUND
    assert count_teacher_parameters("auto", str(tmp_path / "folder")) == sum(p.numel() for p in teacher.parameters())


def test_licences(folders, copy):
    assert build_teacher("auto", folders("clip"), (4, 4)).licence is None
    licence = build_teacher("auto", folders("dinov3_vit"), (4, 4)).licence
    assert licence == "dinov3-license for those that its authors published"
    folder = copy("clip")
    card = folder / "README.md"
    for text, said in (("---\nlicense: mit\ntags: []\n---\n# CLIP", "mit"), ("# no head", None)):
        card.write_text(text)
        assert build_teacher("auto", str(folder), (4, 4)).licence == (said and f"{said}, says {card}")
    card.write_text("---\nlicense: other\nlicense_name: dinov3-license\n---\n")
    assert build_teacher("auto", str(folder), (4, 4)).licence == f"dinov3-license, says {card}"


def test_hash_is_that_of_the_file(folders):
    folder = Path(folders("dinov2"))
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for path in (folder, folder / "model.safetensors"):  # the folder's own file stands for it
        teacher = build_teacher("auto", str(path), (4, 4))
        assert (teacher.name, teacher.sha256) == ("dinov2", expected)


def no_config(folder):
    (folder / "config.json").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def text_only(folder):
    transformers.BertModel(transformers.BertConfig(**VIT_OF_TEXT)).save_pretrained(folder)


def text_tower(folder):
    tensors = {key: tensor for key, tensor in parts(folder).items() if not key.startswith("embeddings.patch")}
    save_file(tensors, folder / "model.safetensors")


VIT_OF_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
WRONG = {
    "no config": (no_config, r"has no config\.json: give a folder with config\.json and model\.safetensors"),
    "no weights": (no_weights, r"has no model\.safetensors: save the model there"),
    "text": (text_only, "holds a model of the kind bert, and no teacher"),
    "no images": (text_tower, r"is no whole dinov2 with an image tower: it has no 'patch_embed\.proj\.weight'"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is no JSON"),
    "no settings": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json holds no settings"),
    "heads": (
        lambda f: change(f / "config.json", num_attention_heads=5),
        "together: num_attention_heads 5 for a width of 64",
    ),
    "activation": (lambda f: change(f / "config.json", hidden_act="relu"), "together: hidden_act relu, not gelu or"),
    "eps": (lambda f: change(f / "config.json", layer_norm_eps="small"), "do not belong together"),
    "places": (
        lambda f: save_file(
            parts(f, **{"embeddings.position_embeddings": torch.zeros(1, 16, 64)}), f / "model.safetensors"
        ),
        "a position table of 15 patches, no square",
    ),
    "more": (
        lambda f: save_file(parts(f, adapter=torch.zeros(3)), f / "model.safetensors"),
        "the model has no adapter",
    ),
    "not finite": (
        lambda f: save_file(parts(f, **{"layernorm.bias": torch.full((64,), torch.nan)}), f / "model.safetensors"),
        "64 infinite numbers or NaN in 1 tensors, norm.bias first",
    ),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        r"model\.safetensors is corrupt or no checkpoint",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_folders_that_are_no_teacher(case, copy):
    folder = copy("dinov2")
    spoil, message = WRONG[case]
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        build_teacher("auto", str(folder), (4, 4))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_nothing_to_read_the_name_from():
    with pytest.raises(UserError, match=r"^teacher auto is read from a file: give --teacher\.checkpoint FILE"):
        make_plan("auto", None)
