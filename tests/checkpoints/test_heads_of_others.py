"""A head from outside the package may call its options and tensors what it likes."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from public import save_public
from torch import nn

import itpn
from itpn.checkpoints.convert import convert
from itpn.checkpoints.files import named_tensors, read_checkpoint
from itpn.checkpoints.io import write_safetensors
from itpn.cli import main
from itpn.errors import UserError
from itpn.models import heads
from itpn.models.build import build, build_backbone
from itpn.models.heads import Head, register_head
from itpn.models.spec import NetworkSpec
from itpn.models.variants import BACKBONES
from itpn.tasks.configs import PretrainingConfig, PretrainingDataConfig, PretrainingModelConfig
from itpn.tasks.pretraining.module import save_weights
from itpn.tasks.pretraining.network import build_masked_model

# names of options of heads, backbones and pyramids of this package, with values of other types than theirs
ODD = {
    **{"decoder": "linear", "heads": 3, "auxiliary": True, "objective": "l1", "pyramid_heads": 2, "masks": "all"},
    **{"fc_norm": "batch", "num_classes": ("cat", "dog"), "head_width": "wide", "fpn_width": None, "num_heads": "two"},
    **{"decoder_num_heads": "many", "levels": 7, "pyramid_width": "x", "global_pool": 3, "drop_rate": "low"},
}


class OddNetwork(nn.Module):
    def __init__(self, backbone: nn.Module, options: dict) -> None:
        super().__init__()
        self.backbone, self.options = backbone, options
        self.decoder = nn.ModuleDict({"heads": nn.ModuleDict({"pixel": nn.Linear(4, 10)})})
        self.classifier = nn.Linear(4, 2)


class OddHead(Head):
    parts: Mapping[str, str] = {
        "classifier.": "odd classifier",
        "decoder.": "odd decoder",
        "backbone.head.": "odd layer",
        "": "all else",
    }
    arguments = tuple(ODD)
    pyramid = False
    purpose = "odd things"

    def build(self, spec):
        return OddNetwork(build_backbone(spec), dict(spec.options))

    def read(self, tensors):
        return None

    def complete(self, spec):
        return spec

    def summarize(self, spec):
        return f"odd: {len(spec.options)} options"


class PyramidOddHead(OddHead):
    """One on a pyramid, that takes any file's tensors for its own."""

    parts: Mapping[str, str] = {"classifier.": "odd classifier", "decoder.": "odd decoder"}
    pyramid = True

    def read(self, tensors):
        return dict(ODD)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(heads, "_HEADS", dict(heads._HEADS))


@pytest.fixture
def odd(registry):
    register_head("odd", PyramidOddHead)


def save_odd(folder: Path, **backbone) -> Path:
    spec = NetworkSpec({**BACKBONES["itpn_nano"], "img_size": (32, 32), "patch_size": 8, **backbone}, None, "pyramid")
    spec = NetworkSpec(spec.backbone, head="odd", options=ODD)
    path = folder / "odd.safetensors"
    write_safetensors(path, named_tensors(build(spec)), {"task": "odd", "network": spec.to_dict()})
    return path


def save_pretrained(folder: Path) -> Path:
    model = PretrainingModelConfig("itpn_nano", patch_size=8, decoder_embed_dim=32, decoder_depth=1)
    config = PretrainingConfig(model=model, data=PretrainingDataConfig(img_size=(32, 32)))
    path = folder / "pretrained.safetensors"
    save_weights(path, build_masked_model(model, (32, 32)), "test", config)
    return path


def test_options_of_any_name(tmp_path, odd, capsys):
    path = save_odd(tmp_path)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"odd: {len(ODD)} options" in out
    assert "numbers a patch" not in out
    assert itpn.load(path).options == ODD
    given = {name: [name] for name in ODD if name != "num_heads"}
    model = itpn.load(path, num_heads=2, strict=False, **given)
    assert model.options == {**{name: (name,) for name in given}, "num_heads": "two"}
    assert model.backbone.num_heads == 2  # as `itpn export --num-heads` asks for
    convert(path, tmp_path / "again.safetensors")
    assert itpn.load(tmp_path / "again.safetensors").options == ODD


def test_the_backbone_takes_what_is_not_the_head_s(tmp_path, odd):
    """Its first layer follows the channels; tensors that happen to be named as a decoder of pixels do not."""
    with pytest.warns(UserWarning, match="adapted to 1$"):
        model = itpn.load(save_odd(tmp_path), in_chans=1)
    assert model.decoder["heads"]["pixel"].weight.shape == (10, 4)


@pytest.mark.parametrize("name", ["off_pixel_pretrain", "off_clip_pretrain", "off_pixel_finetune", "mm_pixel"])
def test_options_read_from_tensors(tmp_path, odd, name):
    path = save_public(tmp_path, name)
    assert read_checkpoint(path).contents.heads["odd"] == ODD
    assert "odd" in str(itpn.inspect(path))
    convert(path, tmp_path / "ours.safetensors")


def test_options_read_from_tensors_with_timm_s_arguments(tmp_path, odd):
    import timm

    itpn.save_pretrained(timm.create_model("itpn_nano", img_size=32, patch_size=8, num_classes=3), tmp_path / "hub")
    found = read_checkpoint(tmp_path / "hub").contents.heads
    assert found["odd"] == ODD
    assert found["classification"] == {"num_classes": 3, "fc_norm": True}


def test_a_file_of_another_head(tmp_path, odd):
    """A decoder of the same name is no decoder of this head."""
    with pytest.raises(UserError, match=r"has no odd decoder that fits \("):
        itpn.load(save_pretrained(tmp_path), task="odd")


@pytest.mark.parametrize("head", [OddHead, PyramidOddHead])
def test_what_is_said_of_other_tasks_stays(tmp_path, registry, head):
    """Titles of parts are those of the network and of the file, whoever else has tensors of such names."""
    paths = [save_pretrained(tmp_path)]
    paths += [save_public(tmp_path, name) for name in ("off_pixel_finetune", "off_det_pixel", "off_clip_pretrain")]
    segmenter = tmp_path / "segmenter.safetensors"
    spec = NetworkSpec(
        {**BACKBONES["itpn_nano"], "img_size": (32, 32), "patch_size": 8},
        {"width": 32, "depth": 1},
        head="segmentation",
        options={"num_classes": 3, "head_width": 16},
    )
    write_safetensors(segmenter, named_tensors(build(spec)), {"task": "segmentation", "network": spec.to_dict()})
    paths.append(segmenter)

    def texts() -> dict:
        return {
            (path.name, use.task): [finding.text for finding in use.findings]
            for path in paths
            for use in itpn.inspect(path).uses
            if use.task != "odd"
        }

    before = texts()
    assert "has no segmentation head" in before["pretrained.safetensors", "segmentation"]
    assert "has a decoder that is not needed here" in before["pretrained.safetensors", "backbone"]
    assert "has a predictor of pixels' classes that is not needed here" in before["segmenter.safetensors", "backbone"]
    register_head("odd", head)
    assert texts() == before


def test_the_head_is_not_known(tmp_path, odd, capsys):
    """What stands below it is still of use."""
    path = save_odd(tmp_path, img_size=(32, 64))
    del heads._HEADS["odd"]
    assert main(["inspect", str(path)]) == 0
    assert "a network of the task 'odd', which is not known here" in capsys.readouterr().out
    assert itpn.load(path, task="backbone").num_classes == 0
    with pytest.raises(UserError, match="positions"):
        convert(path, tmp_path / "x.pth", "official")
