"""From one code base's form to another's and back: the same bits under the same names."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from public import read_golden, save_public
from safetensors import safe_open
from torch import Tensor

import itpn
from itpn.checkpoints.convert import convert
from itpn.checkpoints.files import read_checkpoint
from itpn.errors import MachineError, UserError
from itpn.tasks.configs import PretrainingConfig, PretrainingDataConfig, PretrainingModelConfig, TeacherConfig
from itpn.tasks.pretraining.module import save_weights
from itpn.tasks.pretraining.network import build_masked_model

CASES = {
    "official": [
        "off_pixel_pretrain",
        "off_pixel_finetune",
        "off_clip_pretrain",
        "off_det_pixel",
        "off_det_clip",
        "off_seg",
    ],
    "mmpretrain": ["mm_pixel", "mm_clip", "mm_hivit_features"],
}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    ("case", "form"),
    [(case, form) for form, cases in CASES.items() for case in cases]
    + [("off_fast_itpn", "official"), ("off_fast_itpn_ls", "official")],
)
def test_public_files_come_back_bit_by_bit(tmp_path, case, form):
    source = save_public(tmp_path, case)
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    assert convert(source, ours).left == []
    assert convert(ours, back, form).left == []
    state = torch.load(back, weights_only=True)["model" if form == "official" else "state_dict"]
    golden = read_golden(case)[0]["param"]
    bare = case == "mm_hivit_features"  # written as a whole model is, with its prefix
    assert_same({name.removeprefix("backbone.") if bare else name: t for name, t in state.items()}, golden)


@pytest.mark.parametrize(
    "case", ["off_det_clip", "off_seg", "mm_hivit_features", "off_fast_itpn_ls", "off_clip_pretrain"]
)
def test_ours_computes_what_the_public_file_does(tmp_path, case):
    """The metadata keep what names and shapes do not say: eps, the way of resampling."""
    source = save_public(tmp_path, case)
    target = tmp_path / "ours.safetensors"
    convert(source, target)
    with safe_open(target, "pt") as file:
        assert file.metadata()["format"] == "itpn"
    image = read_golden(case)[0]["input"]["image"]
    task = "pyramid" if case == "off_clip_pretrain" else None
    with torch.no_grad():
        one, other = (itpn.load(path, task=task)(image) for path in (source, target))
    pairs = zip(one.values(), other.values(), strict=True) if isinstance(one, dict) else [(one, other)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("form", ["official", "mmpretrain"])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "rel_pos_bias": True, "pyramid_depth": 2}])
def test_ours_come_back_bit_by_bit(tmp_path, form, options):
    settings = {
        "name": "itpn_tiny",
        "patch_size": 8,
        "decoder_embed_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 2,
    }
    config = PretrainingConfig(
        model=PretrainingModelConfig(**settings, **options), data=PretrainingDataConfig(img_size=32)
    )
    model = build_masked_model(config.model, (32, 32))
    save_weights(tmp_path / "model.safetensors", model, "test", config)
    convert(tmp_path / "model.safetensors", tmp_path / "theirs.pth", form)
    convert(tmp_path / "theirs.pth", tmp_path / "again.safetensors")
    again = itpn.load(tmp_path / "again.safetensors", decoder_num_heads=2)
    assert_same(again.state_dict(), model.state_dict())


def test_our_own_file_keeps_what_it_says_of_itself(tmp_path):
    config = PretrainingConfig(
        model=PretrainingModelConfig(name="itpn_nano", patch_size=8, decoder_depth=1),
        data=PretrainingDataConfig(img_size=(32, 64)),
    )
    model = build_masked_model(config.model, (32, 64))
    save_weights(tmp_path / "model.safetensors", model, "test", config)
    convert(tmp_path / "model.safetensors", tmp_path / "copy.safetensors")
    one, other = (read_checkpoint(tmp_path / name) for name in ("model.safetensors", "copy.safetensors"))
    assert one.metadata == other.metadata
    assert_same(one.tensors, other.tensors)


def test_what_has_no_place_is_said_or_refused(tmp_path):
    settings = {"patch_size": 8, "pyramid_weights": (0.1, 0.1, 0.1), "pyramid_head_width": 64, "decoder_depth": 1}
    teacher = TeacherConfig("ema")
    config = PretrainingConfig(
        model=PretrainingModelConfig(name="itpn_nano", **settings),
        teacher=teacher,
        data=PretrainingDataConfig(img_size=32),
    )
    save_weights(tmp_path / "mfm.safetensors", build_masked_model(config.model, (32, 32), teacher), "test", config)
    done = convert(tmp_path / "mfm.safetensors", tmp_path / "mfm.pth", "official")
    assert done.left
    assert all(name.startswith("pyramid_heads.") for name in done.left)

    with pytest.raises(UserError, match=r"has 1\+1\+4 blocks, but mmpretrain builds stages 1 and 2 of pairs"):
        convert(tmp_path / "mfm.safetensors", tmp_path / "mfm.pth", "mmpretrain")
    fast = save_public(tmp_path, "off_fast_itpn")
    with pytest.raises(UserError, match="is a Fast-iTPN, which mmpretrain does not have"):
        convert(fast, tmp_path / "fast-mm.pth", "mmpretrain")
    with pytest.raises(UserError, match=r"say which names .* gets: --to official or --to mmpretrain"):
        convert(fast, tmp_path / "fast2.pth")
    with pytest.raises(UserError, match=r"must end in \.safetensors for --to itpn"):
        convert(fast, tmp_path / "fast2.pth", "itpn")
    with pytest.raises(UserError, match="is the file that is read"):
        convert(fast, fast, "official")
    with pytest.raises(UserError, match=r"is a folder without a model\.safetensors"):
        convert(tmp_path, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\)"):
        convert(fast, tmp_path / ("x" * 300 + ".safetensors"))
    with pytest.raises(UserError, match="cannot be written"):
        convert(fast, fast / "inside" / "a.safetensors")
    assert not list(tmp_path.glob("*.tmp"))


def test_settings_that_no_tensor_shows_are_said(tmp_path):
    """The plain HiViT of mmpretrain has another epsilon than the authors', under whose names nobody can tell."""
    path = save_public(tmp_path, "mm_hivit_features")
    done = convert(path, tmp_path / "official.pth", "official")
    assert done.unsaid == {"norm_eps": 1e-5}
    assert convert(path, tmp_path / "mmpretrain.pth", "mmpretrain").unsaid == {}
    assert convert(path, tmp_path / "ours.safetensors").unsaid == {}
    fast = save_public(tmp_path, "off_fast_itpn")
    assert convert(fast, tmp_path / "fast.pth", "official", num_heads=4).unsaid == {"num_heads": 4}


def test_heads_that_the_file_cannot_tell(tmp_path):
    """Given once, they are in our file; a guess that was converted can still be put right."""
    source = save_public(tmp_path, "off_fast_itpn")
    golden = read_golden("off_fast_itpn")[0]
    convert(source, tmp_path / "told.safetensors", num_heads=4)
    convert(source, tmp_path / "guessed.safetensors")
    assert itpn.inspect(tmp_path / "guessed.safetensors").contents.guessed
    with torch.no_grad():
        for model in (
            itpn.load(tmp_path / "told.safetensors"),
            itpn.load(tmp_path / "guessed.safetensors", num_heads=4),
        ):
            assert (model(golden["input"]["image"]) - golden["output"]["logits"]).abs().max() < 2e-5


def test_the_command_of_a_converted_file_has_the_guessed_heads(tmp_path):
    """Without them a recipe builds its own number, and nothing would say so."""
    save(tmp_path / "ours.safetensors", 64, name="itpn_tiny", patch_size=16, decoder_embed_dim=128)
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.pth", "official")
    report = itpn.inspect(tmp_path / "theirs.pth")
    assert "decoder_num_heads=4 (32 channels each)" in report.contents.guessed
    assert report.use("pretraining").command.endswith(
        "--model.decoder-embed-dim 128 --model.decoder-depth 1 --model.decoder-num-heads 4"
    )


def save(path: Path, img_size: int | tuple[int, int] = 32, **settings: Any) -> Path:
    """A pre-training run's file."""
    given = {"name": "itpn_nano", "patch_size": 8, "decoder_depth": 1, **settings}
    config = PretrainingConfig(model=PretrainingModelConfig(**given), data=PretrainingDataConfig(img_size=img_size))
    if config.model.feature_weight:
        config.teacher = TeacherConfig("ema")
    size = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    save_weights(path, build_masked_model(config.model, size, config.teacher), "test", config)
    return path


@pytest.mark.filterwarnings("ignore:.* resampled to")
@pytest.mark.parametrize(
    ("name", "form"), [("itpn_tiny", "official"), ("itpn_tiny", "mmpretrain"), ("fast_itpn_nano", "official")]
)
@pytest.mark.parametrize(
    ("size", "grid"),
    # 8x18 has as many positions as 12x12; 6x12 as many as no square; relative ones alone
    [((64, 144), "8x18"), ((48, 96), "6x12"), ((144, 64), "18x8"), ((8, 32), "1x4")],
)
def test_positions_that_are_not_square_are_refused(tmp_path, name, form, size, grid):
    source, target = save(tmp_path / "model.safetensors", size, name=name), tmp_path / "new" / "theirs.pth"
    with pytest.raises(UserError, match=rf"has a table of {grid} positions .* files of the form {form} hold square"):
        convert(source, target, form)
    assert not target.parent.exists()
    target.parent.mkdir()
    target.write_bytes(b"a file of before")
    with pytest.raises(UserError, match="hold square"):
        convert(source, target, form)
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"a file of before"]
    # what the message says to do
    square = itpn.load(source, task="pyramid", img_size=max(size)).eval()
    itpn.save_pretrained(square, tmp_path / "square")
    again = itpn.load(target, **convert(tmp_path / "square", target, form).unsaid).eval()
    images = torch.randn(1, 3, max(size), max(size))
    with torch.no_grad():
        for one, other in zip(again(images).values(), square(images).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_relative_positions_that_are_not_square_are_refused(tmp_path):
    model = timm.create_model("itpn_nano", img_size=64, rel_pos_bias=True, rel_pos_size=(64, 96), num_classes=0)
    itpn.save_pretrained(model, tmp_path / "folder")
    with pytest.raises(UserError, match="has a table of 4x6 positions"):
        convert(tmp_path / "folder", tmp_path / "theirs.pth", "official")
    # decomposed tables show both sides
    model = timm.create_model("itpn_nano", img_size=64, rel_pos_bias="decomposed", rel_pos_size=(64, 96), num_classes=0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    itpn.save_pretrained(model, tmp_path / "decomposed")
    convert(tmp_path / "decomposed", tmp_path / "theirs.pth", "official")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(itpn.load(tmp_path / "theirs.pth").eval()(images), model.eval()(images))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_part_goes_over_whole_or_not_at_all(tmp_path):
    """A classifier without its norm, a decoder without its mask token: they would compute something else."""
    model = timm.create_model("hivit_tiny", depths=(2, 2, 2), img_size=32, num_classes=4)
    itpn.save_pretrained(model, tmp_path / "classifier")
    with pytest.raises(UserError, match=r"has backbone\.fc_norm.* which files of the form mmpretrain have no place"):
        convert(tmp_path / "classifier", tmp_path / "theirs.pth", "mmpretrain")
    convert(tmp_path / "classifier", tmp_path / "theirs.pth", "official")
    source = save(tmp_path / "model.safetensors", feature_weight=1.0)
    with pytest.raises(UserError, match=r"has decoder\.mask_token, which files of the form official have no place for"):
        convert(source, tmp_path / "decoder.pth", "official")
    assert not (tmp_path / "decoder.pth").exists()
    itpn.save_pretrained(itpn.load(source, task="pyramid"), tmp_path / "pyramid")
    assert convert(tmp_path / "pyramid", tmp_path / "pyramid.pth", "official").left == []


def test_a_pooling_that_names_and_shapes_do_not_say(tmp_path):
    model = timm.create_model("itpn_nano", img_size=64, num_classes=4, global_pool="max").eval()
    itpn.save_pretrained(model, tmp_path / "classifier")
    assert convert(tmp_path / "classifier", tmp_path / "theirs.pth", "official").unsaid == {"global_pool": "max"}
    assert convert(tmp_path / "classifier", tmp_path / "ours.safetensors").unsaid == {}
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for path in ("classifier", "ours.safetensors"):
            assert torch.equal(itpn.load(tmp_path / path).eval()(images), model(images))
        assert torch.equal(itpn.load(tmp_path / "theirs.pth", global_pool="max").eval()(images), model(images))
    assert set(itpn.load(tmp_path / "classifier", task="pyramid", strict=False)(images)) == {"0", "1", "2"}


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    source = save_public(tmp_path, "off_fast_itpn")
    state = torch.load(source, weights_only=False)
    state["model"]["blocks.4.attn.q_proj.weight"][0, 0] = float("nan")
    torch.save(state, source)
    assert convert(source, tmp_path / "ours.safetensors").nonfinite == {"backbone.stages.2.0.attn.qkv.weight": 1}
    assert convert(tmp_path / "ours.safetensors", tmp_path / "back.pth", "official").nonfinite


@pytest.mark.parametrize("target", ["ours.safetensors", "theirs.pth"])
def test_an_accident_leaves_what_was_there(tmp_path, monkeypatch, target):
    source = save(tmp_path / "model.safetensors")
    target = tmp_path / "out" / target
    target.parent.mkdir()
    target.write_bytes(b"a file of before")
    form = None if target.suffix == ".safetensors" else "official"

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)  # as a full network disk says it
    with pytest.raises(MachineError, match=rf"make room on the disk: .*{target.name} cannot be written: No space"):
        convert(source, target, form)
    monkeypatch.undo()
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"a file of before"]
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=r"folder\.safetensors cannot be written: Is a directory"):
        convert(source, tmp_path / "folder.safetensors")
    assert not list(tmp_path.glob("*.tmp"))
