"""Teachers: OpenAI's CLIP in every file form, other timm models, and errors for what cannot be used."""

import errno
import os
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from public import read_golden
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from itpn.errors import MachineError, UserError
from itpn.models.position import resample_position_table
from itpn.teachers import timm_teacher as module
from itpn.teachers.files import read_tensors
from itpn.teachers.timm_teacher import build_teacher, count_teacher_parameters, teacher_width

GOLDEN, _ = read_golden("off_clip_teacher")
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)  # of CLIP's own preprocessing
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)

# The golden tower as a model of timm, for the file forms that "clip" does not read; and one that timm loads leniently.
CFG = {"mean": tuple(MEAN.flatten().tolist()), "std": tuple(STD.flatten().tolist()), "fixed_input_size": True}
CFG |= {"input_size": (3, 64, 64), "num_classes": 24, "classifier": "head", "first_conv": "patch_embed.proj"}
default_cfgs = generate_default_cfgs(
    {
        "vit_golden_clip_64.openai": CFG,
        "vit_golden_clip_64.openai_ft_in1k": CFG,
        "vit_golden_clip_64.noted": CFG | {"notes": ("natively QuickGELU, use quickgelu model variant",)},
        "vit_golden_lenient_64.in1k": CFG | {"mean": (0.5, 0.5, 0.5)},
    }
)


def golden_model(name, pretrained, strict=True, **kwargs):
    options = {"patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2, "pre_norm": True}
    options |= {"norm_layer": lambda width, **k: nn.LayerNorm(width, eps=1e-5, **k), "act_layer": "quick_gelu"}
    options |= kwargs
    return build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        pretrained_strict=strict,
        **options,
    )


@register_model
def vit_golden_clip_64(pretrained=False, **kwargs):
    return golden_model("vit_golden_clip_64", pretrained, **kwargs)


@register_model
def vit_golden_lenient_64(pretrained=False, **kwargs):
    return golden_model("vit_golden_lenient_64", pretrained, strict=False, **kwargs)


def pixels(clip_normalized):
    """Undo CLIP's normalization: what to give to a teacher."""
    return clip_normalized * STD + MEAN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def openai_file(folder):
    torch.save(GOLDEN["param"], folder / "openai.pt")
    return str(folder / "openai.pt")


@pytest.fixture(scope="module")
def clip(openai_file):
    return build_teacher("clip", openai_file, (4, 4))


def timm_form():
    converted = checkpoint_filter_fn(GOLDEN["param"], vit_golden_clip_64())
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def assert_close(ours, golden):
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max().item() < 1e-5


def one_line(error):
    assert isinstance(error.value, UserError)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- OpenAI's CLIP


def test_features_are_those_of_openais_clip(clip):
    assert (clip.width, clip.grid, clip.img_size) == (24, (4, 4), (64, 64))
    features = clip(pixels(GOLDEN["input"]["image"]))
    assert_close(features, GOLDEN["output"]["tokens"])
    assert_close(F.layer_norm(features, (24,)), GOLDEN["output"]["tokens_ln"])


def test_larger_images(openai_file):
    teacher = build_teacher("clip", openai_file, (6, 6))
    assert teacher.img_size == (96, 96)
    images, golden = pixels(GOLDEN["input"]["image_large"]), GOLDEN["output"]["tokens_large"]
    features = teacher(images)
    assert features.shape == golden.shape
    assert features.isfinite().all()
    # iTPN's code samples the position table by (6 + 0.1) / 4, timm by the true ratio: the only difference
    assert (features - golden).abs().max() > 1e-3
    table = GOLDEN["param"]["visual.positional_embedding"].unsqueeze(0)
    resampled = resample_position_table(table[:, 1:], (4, 4), (6, 6), "legacy")
    teacher.tower.model.pos_embed.data = torch.cat([table[:, :1], resampled], dim=1)
    assert_close(teacher(images), golden)


def test_images_are_normalized_from_0_to_1(clip):
    images = GOLDEN["input"]["image_01"]
    features = clip(images)
    assert_close(features, clip.tower((images - MEAN) / STD).flatten(1, 2))
    # the public pipeline mistakes [0, 1] for [-1, 1] and so trains on features of pale images
    public = clip.tower(GOLDEN["output"]["official_scaled_01"]).flatten(1, 2)
    assert_close(F.layer_norm(public, (24,)), GOLDEN["output"]["official_target_01"])
    assert (F.layer_norm(features, (24,)) - GOLDEN["output"]["official_target_01"]).abs().max() > 0.1

    bytes_ = (images * 255).round().to(torch.uint8)
    assert_close(clip(bytes_), clip(bytes_.float() / 255))
    with pytest.raises(ValueError, match=r"\(64, 64\) px"):
        clip(bytes_[..., :48])


def scripted(tensors):
    """A TorchScript module with these parameters, as OpenAI publishes its weights."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        holder = root
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Module())
            holder = getattr(holder, parent)
        holder.register_parameter(leaf, nn.Parameter(tensor))
    return torch.jit.script(root)


def save_form(form, path):
    openai = GOLDEN["param"]
    if form == "openai archive":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(scripted(openai), path)
    elif form == "openai before zip files":
        torch.save(openai, path, _use_new_zipfile_serialization=False)
    elif form == "open_clip":
        save_file({**openai, "logit_bias": torch.zeros(())}, path)
    elif form == "open_clip training":
        torch.save({"epoch": 1, "name": "run", "state_dict": {f"module.{n}": t for n, t in openai.items()}}, path)
    elif form == "open_clip with a timm tower":
        tower = timm_form()
        projection = {"visual.head.proj.weight": tower.pop("head.weight")}
        tower.pop("head.bias")
        torch.save({f"visual.trunk.{n}": t for n, t in tower.items()} | projection, path)
    elif form == "timm":
        save_file(timm_form(), path)
    elif form == "timm training":
        torch.save({"model": timm_form(), "epoch": 3}, path)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("openai archive", "clip"),
        ("openai archive", "vit_golden_clip_64.openai"),
        ("openai before zip files", "clip"),
        ("open_clip", "clip"),
        ("open_clip", "vit_golden_clip_64"),
        ("open_clip training", "clip"),
        ("open_clip training", "vit_golden_lenient_64"),  # with CLIP's mean, whatever timm's default says
        ("open_clip with a timm tower", "vit_golden_clip_64"),
        ("timm", "vit_golden_clip_64.openai"),
        ("timm", "vit_golden_clip_64"),
        ("timm training", "vit_golden_clip_64"),
    ],
)
def test_file_forms(form, name, clip, tmp_path, recwarn):
    path = tmp_path / ("file.safetensors" if form in ("open_clip", "timm") else "file.pt")
    save_form(form, path)
    recwarn.clear()
    teacher = build_teacher(name, str(path), (4, 4))
    assert teacher_width(name, str(path)) == teacher.width == 24
    images = GOLDEN["input"]["image_01"]
    assert torch.equal(teacher(images), clip(images))
    assert not recwarn.list  # no deprecation warning of TorchScript reaches the user


def test_half_precision_file(tmp_path):
    files = [tmp_path / "half.pt", tmp_path / "float.pt"]
    torch.save({name: t.half() for name, t in GOLDEN["param"].items()}, files[0])
    torch.save({name: t.half().float() for name, t in GOLDEN["param"].items()}, files[1])
    half, full = (build_teacher("clip", str(file), (3, 5)) for file in files)
    images = torch.rand(1, 3, 48, 80)
    assert torch.equal(half(images), full(images))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tensors = timm_form()
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=f"nan.safetensors has 1 infinite numbers or NaN in 1 tensors, {name} first"):
        build_teacher("vit_golden_clip_64", str(tmp_path / "nan.safetensors"), (4, 4))


def test_classifier_is_no_projection(tmp_path):
    tensors = timm_form()
    save_file(tensors, tmp_path / "zeros.safetensors")
    assert teacher_width("vit_golden_clip_64.openai_ft_in1k", str(tmp_path / "zeros.safetensors")) == 128
    # without a tag, a bias shows that it is a classifier: CLIP's projection has none
    tensors["head.bias"] = torch.rand(24)
    save_file(tensors, tmp_path / "biased.safetensors")
    assert build_teacher("vit_golden_clip_64", str(tmp_path / "biased.safetensors"), (4, 4)).width == 128
    del tensors["head.weight"], tensors["head.bias"]
    save_file(tensors, tmp_path / "headless.safetensors")
    assert build_teacher("vit_golden_clip_64", str(tmp_path / "headless.safetensors"), (4, 4)).width == 128


def test_weights_that_want_another_activation(openai_file):
    with pytest.warns(UserWarning, match=r"trained with QuickGELU: vit_golden_clip_quickgelu_64\.noted gives"):
        build_teacher("vit_golden_clip_64.noted", openai_file, (4, 4))


# --- other models of timm


def tokens_of(model, images):
    """Patch tokens after the final norm, by timm's forward_features."""
    x = model.forward_features(images)
    return model.fc_norm(x)[:, model.num_prefix_tokens :]


def map_of(model, images):
    x = model.forward_features(images)  # [B, C, rows, cols]
    norm = getattr(model.head, "norm", nn.Identity())
    return norm(x).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "grid", "stride", "reference"),
    [
        ("test_vit", (4, 6), 16, tokens_of),
        ("test_vit2", (10, 10), 16, tokens_of),  # norm after the pooling
        ("eva02_tiny_patch14_224", (14, 14), 14, tokens_of),  # 196 px
        ("test_convnext", (14, 14), 32, map_of),  # 448 px
        ("test_resnet", (3, 4), 32, lambda model, x: model.forward_features(x).flatten(2).transpose(1, 2)),
    ],
)
def test_features_of_a_timm_model(name, grid, stride, reference, tmp_path):
    torch.manual_seed(0)
    img_size = (grid[0] * stride, grid[1] * stride)
    try:
        model = timm.create_model(name, img_size=img_size).eval()
    except TypeError:
        model = timm.create_model(name).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms that are no identity
            nn.init.normal_(parameter, std=0.5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")

    teacher = build_teacher(name, str(tmp_path / "model.safetensors"), grid)
    assert (teacher.img_size, teacher.grid) == (img_size, grid)
    assert teacher.mean.flatten().tolist() == pytest.approx(model.pretrained_cfg["mean"])
    assert teacher.std.flatten().tolist() == pytest.approx(model.pretrained_cfg["std"])
    images = torch.rand(2, 3, *img_size)
    with torch.no_grad():
        expected = reference(model, (images - teacher.mean) / teacher.std)
    features = teacher(images)
    assert features.shape == (2, grid[0] * grid[1], teacher.width)
    assert_close(features, expected)
    assert teacher_width(name, None) == teacher.width
    if img_size == model.pretrained_cfg["input_size"][1:] or stride == 32:  # position tables depend on the size
        assert count_teacher_parameters(name, None) == sum(p.numel() for p in teacher.parameters())


def test_class_and_register_tokens_are_left_out(folder):
    name, file = "vit_small_patch14_reg4_dinov2.lvd142m", folder / "dinov2.safetensors"
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56).eval()
    save_file(model.state_dict(), file)
    teacher = build_teacher(name, str(file), (4, 4))
    assert teacher.img_size == (56, 56)
    images = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        expected = model.forward_features((images - teacher.mean) / teacher.std)[:, 5:]
    assert_close(teacher(images), expected)


def test_position_tables_are_resampled(tmp_path):
    model = timm.create_model("test_vit")  # 10x10 patches
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    teacher = build_teacher("test_vit", str(tmp_path / "model.safetensors"), (5, 8))
    assert teacher.tower.model.pos_embed.shape[1] == 41
    assert teacher(torch.zeros(1, 3, 80, 128, dtype=torch.uint8)).shape == (1, 40, 64)


def test_widths_and_sizes_without_weights():
    assert teacher_width("vit_base_patch16_clip_quickgelu_224.openai", None) == 512
    # 86192640 in OpenAI's, and the zeros that timm has for a bias of the projection
    assert count_teacher_parameters("vit_base_patch16_clip_quickgelu_224.openai", None) == 86192640 + 512
    assert teacher_width("resnet50_clip.openai", None) == 2048  # unprojected


def test_weights_from_the_hub(monkeypatch):
    model = timm.create_model("test_vit")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: weights)
    monkeypatch.setattr(module, "check_hub", lambda *a: None)
    teacher = build_teacher("test_vit.r160_in1k", None, (10, 10))
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        expected = model.eval().forward_features((images - teacher.mean) / teacher.std)[:, 1:]
    assert_close(teacher(images), expected)


def test_teachers_stay_frozen(clip):
    around = nn.Sequential(clip, nn.Linear(24, 24))
    around.train()
    assert around[1].training
    assert not any(m.training for m in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())
    assert not any(name in clip.state_dict() for name in ("mean", "std"))
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    assert not clip(images).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = clip(images)
    assert features.dtype == torch.float32
    assert (features - clip(images)).abs().max() < 0.1


# --- errors


@pytest.mark.parametrize(
    ("name", "grid", "said"),
    [
        ("inception_v3", (14, 14), "12x12 features of an image of 448x448 px.*14x14 patches"),
        ("halonet26t", (3, 3), "cannot make a map of an image of 96x96 px"),
    ],
)
def test_grids_that_a_model_cannot_return(name, grid, said):
    if not hasattr(timm.create_model(name), "forward_intermediates"):
        said = "cannot make a map of an image of 448x448 px"  # timm returns its maps from 1.0.31 on
    with pytest.raises(UserError, match=f"teacher {name} .*{said}") as error:
        build_teacher(name, None, grid)
    assert "choose another --teacher.name" in one_line(error)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "test_vit3",
            r"pos_embed is \[1, 17, 128\] there, \[1, 17, 96\] in the model; --teacher.name clip takes the sizes",
        ),
        ("test_convnext", r"timm cannot convert it .*; --teacher.name clip takes the sizes"),
    ],
)
def test_file_of_another_model(name, said, openai_file):
    with pytest.raises(UserError, match=said) as error:
        build_teacher(name, openai_file, (4, 4))
    assert f"{openai_file} is not of {name}: " in one_line(error)


def test_file_of_other_patches(tmp_path):
    openai = {**GOLDEN["param"], "visual.conv1.weight": torch.zeros(128, 3, 32, 32)}
    save_file(openai, tmp_path / "openai.safetensors")
    save_file({**timm_form(), "patch_embed.proj.weight": torch.zeros(128, 3, 32, 32)}, tmp_path / "timm.safetensors")
    for form in ("openai", "timm"):
        with pytest.raises(UserError, match="its patches have 32x32 px, the model's 16x16") as error:
            build_teacher("vit_golden_clip_64", str(tmp_path / f"{form}.safetensors"), (4, 4))
        one_line(error)


@pytest.mark.parametrize("name", ["vit_golden_clip_64.openai", "vit_golden_lenient_64", "clip"])
def test_missing_weights_are_noticed(name, tmp_path):
    if name == "clip":
        tensors = {n: t for n, t in GOLDEN["param"].items() if n != "visual.transformer.resblocks.1.mlp.c_fc.bias"}
    else:
        tensors = {n: t for n, t in timm_form().items() if n != "blocks.1.mlp.fc1.bias"}
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=r"has no blocks\.1\.mlp\.fc1\.bias") as error:
        build_teacher(name, str(tmp_path / "file.safetensors"), (4, 4))
    one_line(error)


def test_unknown_names():
    for name, nearest in {
        "vit_bas_patch16_224": "vit_base_patch16_224",
        "test_vit.r160_in2k": "test_vit.r160_in1k",
        "hf-hub:timm/test_vit.r160_in1k": "test_vit.r160_in1k",
    }.items():
        for function in (lambda name: build_teacher(name, None, (4, 4)), lambda name: teacher_width(name, None)):
            with pytest.raises(UserError, match=rf"no model {name}; near it are .*\b{nearest}\b") as error:
                function(name)
            one_line(error)
    for name in ("nonesuch", "nonesuch.of_no_tag", "hf-hub:nobody/nonesuch"):
        with pytest.raises(UserError, match=f"no model {name}; `ema` is the EMA of the network itself") as error:
            build_teacher(name, None, (4, 4))
        assert "near it" not in str(error.value)
    with pytest.raises(UserError, match=r"near it are test_vit\.r160_in1k"):  # of a known model, its tags
        build_teacher("test_vit.qqq", None, (4, 4))
    with pytest.raises(UserError, match=r"give --teacher\.checkpoint FILE"):
        build_teacher("clip", None, (4, 4))


class Malicious:
    def __reduce__(self):
        return print, ("code was run",)


def test_files_that_are_no_checkpoints(openai_file, tmp_path, capfd):
    files = {name: tmp_path / name for name in ("text.pt", "code.pt", "cut.pt", "cut.safetensors", "none.pt", "o.pt")}
    files["text.pt"].write_text("weights")
    torch.save({"state_dict": GOLDEN["param"], "x": Malicious()}, files["code.pt"])
    with open(openai_file, "rb") as file:
        whole = file.read()
    files["cut.pt"].write_bytes(whole[: len(whole) // 2])
    save_file(GOLDEN["param"], files["cut.safetensors"])
    files["cut.safetensors"].write_bytes(files["cut.safetensors"].read_bytes()[:-1000])
    torch.save({"state_dict": {}}, files["none.pt"])
    torch.save(torch.zeros(3), files["o.pt"])
    for file in files.values():
        with pytest.raises(UserError, match=r"checkpoint .*; give a \.safetensors or \.pt file") as error:
            build_teacher("clip", str(file), (4, 4))
        assert str(file) in one_line(error)
    with pytest.raises(UserError, match=r"gone\.pt does not exist"):
        build_teacher("clip", str(tmp_path / "gone.pt"), (4, 4))
    assert "code was run" not in capfd.readouterr().out


def test_clip_files_whose_sizes_cannot_be_read(tmp_path):
    file = tmp_path / "file.safetensors"
    save_file(timm_form(), file)
    with pytest.raises(UserError, match="no CLIP ViT in OpenAI's form"):
        build_teacher("clip", str(file), (4, 4))
    save_file({**GOLDEN["param"], "visual.conv1.weight": torch.zeros(1280, 3, 14, 14)}, file)
    with pytest.raises(UserError, match=r"width 1280.*vit_huge_patch14_clip_224"):
        teacher_width("clip", str(file))


def test_nothing_to_fetch(monkeypatch, capfd):
    with pytest.raises(
        UserError, match=r"no weights of teacher vit_golden_clip_64: give --teacher\.checkpoint FILE"
    ) as error:
        build_teacher("vit_golden_clip_64", None, (4, 4))
    one_line(error)

    def refuse(*args, **kwargs):
        raise ConnectionError("[Errno -2] Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: None)
    # its client retries for most of a minute and prints to stderr
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(
        UserError, match=r"test_vit\.r160_in1k could not be fetched .*Name or service not known"
    ) as error:
        build_teacher("test_vit.r160_in1k", None, (4, 4))
    said = one_line(error)
    assert "--teacher.checkpoint FILE, a .safetensors or .pt file in timm, OpenAI CLIP or open_clip form" in said
    assert capfd.readouterr().err == ""


def test_a_file_that_a_disk_does_not_give_is_an_accident(tmp_path, monkeypatch):
    """An accident, not the user's mistake."""
    path = tmp_path / "teacher.pt"
    torch.save({"x": torch.ones(1)}, path)
    for number, kind in ((errno.EIO, MachineError), (errno.EACCES, MachineError), (errno.EINVAL, UserError)):

        def load(*_, number=number, **__):
            raise OSError(number, os.strerror(number), str(path))

        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", load)
            with pytest.raises(kind) as caught:
                read_tensors(str(path))
        assert str(path) in str(caught.value)
        assert (os.strerror(number) in str(caught.value)) == (kind is MachineError)
    assert read_tensors(str(path)).keys() == {"x"}
