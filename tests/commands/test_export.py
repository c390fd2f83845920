"""Exported files compute what PyTorch computes, at sizes and batch sizes other than those they were traced with."""

import onnx
import onnxruntime
import pytest
import torch
from timm import create_model

import itpn
from itpn.cli import main
from itpn.errors import ExportFailed, UserError
from itpn.models.build import make_pyramid
from itpn.models.detector import MaskDetector
from itpn.models.pyramid import PyramidBackbone
from itpn.models.segmenter import Segmenter
from itpn.tasks.detection.export import export_detector
from itpn.tasks.export import check_out, export_model, print_exported
from itpn.tasks.segmentation.export import name_logits

SMALL = {"depths": (1, 1, 1), "img_size": 32, "patch_size": 8}


def make(name, **kwargs):
    """A tiny network, every parameter away from zero: position tables matter."""
    torch.manual_seed(0)
    model = create_model(name, **{**SMALL, **kwargs}).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def outputs(model, images):
    if isinstance(model, PyramidBackbone):
        return list(model(images).values())
    return [model(images)] if model.num_classes else model.forward_intermediates(images, intermediates_only=True)


def open_file(path):
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda images: list(module(images).values())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(y) for y in session.run(None, {"images": images.numpy()})]


def check(model, path, *shapes):
    run = open_file(path)
    for shape in shapes:
        images = torch.randn(shape)
        for found, expected in zip(run(images), outputs(model, images), strict=True):
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), shape


def test_dynamic_pyramid_onnx(tmp_path, capfd):
    """Positions resampled as the public code does, which leaves the stored size alone; pooled levels."""
    model = make("itpn_nano_pyramid", levels="pooled", pos_resample="legacy")
    exported = export_model(model, tmp_path / "a.onnx", (32, 32), dynamic_size=True, metadata={"mean": "0.5 0.5 0.5"})
    assert capfd.readouterr() == ("", "")
    assert exported.difference < 1e-4
    check(model, exported.path, (1, 3, 32, 32), (4, 3, 64, 40), (2, 3, 48, 80))
    file = onnx.load(exported.path)
    assert {prop.key: prop.value for prop in file.metadata_props} == {"mean": "0.5 0.5 0.5"}
    assert exported.inputs == {"images": "batch, 3, 8*rows, 8*cols"}
    assert [size.dim_param for size in file.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "",
        "8*rows",
        "8*cols",
    ]
    assert [output.name for output in file.graph.output] == [f"level_{i}" for i in range(1, 6)]
    print_exported(exported)
    assert "batch, 32, 4*rows, 4*cols" in capfd.readouterr().out


def test_dynamic_classifier_onnx(tmp_path):
    model = make("itpn_nano", num_classes=7, rel_pos_bias="decomposed")
    exported = export_model(model, tmp_path / "a.onnx", (32, 40), dynamic_size=True)
    assert list(exported.outputs) == ["logits"]
    check(model, exported.path, (1, 3, 32, 32), (3, 3, 24, 64), (2, 3, 8, 40))


def test_dynamic_backbone_pt2(tmp_path):
    model = make("hivit_tiny", num_classes=0, embed_dim=128, num_heads=4)
    exported = export_model(model, tmp_path / "a.pt2", (32, 32), dynamic_size=True, metadata={"size": "32"})
    assert list(exported.outputs) == ["stage_1", "stage_2", "stage_3"]
    check(model, exported.path, (1, 3, 32, 32), (3, 3, 64, 40))
    extra = {"size": ""}
    torch.export.load(exported.path, extra_files=extra)
    assert extra == {"size": "32"}


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_fixed_pyramid_onnx(tmp_path, size):
    model = make("fast_itpn_nano_pyramid", levels="joined", patch_size=16, img_size=64)
    exported = export_model(model, tmp_path / "a.onnx", size)
    assert exported.inputs == {"images": f"batch, 3, {size[0]}, {size[1]}"}
    assert len(exported.outputs) == 4
    check(model, exported.path, (1, 3, *size), (3, 3, *size))


@pytest.mark.parametrize("size", [(32, 32), (40, 64)])
def test_fixed_backbone_onnx(tmp_path, size):
    model = make("fast_itpn_nano", num_classes=0, init_values=0.1)
    check(model, export_model(model, tmp_path / "a.onnx", size).path, (1, 3, *size), (3, 3, *size))


def test_fixed_classifier_with_migration_pt2(tmp_path):
    model = make("itpn_nano", num_classes=7, migrate_ratio=0.5, rel_pos_bias=True)
    check(model, export_model(model, tmp_path / "a.pt2", (32, 48)).path, (1, 3, 32, 48), (3, 3, 32, 48))


def test_migration_and_gathering(tmp_path):
    model = make("fast_itpn_nano", num_classes=7, migrate_ratio=0.5, gather_window=3)  # padded windows
    check(model, export_model(model, tmp_path / "a.onnx", (32, 48)).path, (1, 3, 32, 48), (3, 3, 32, 48))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A file with backbone, pyramid and decoder."""
    folder = tmp_path_factory.mktemp("pretrained")
    model = itpn.get_model("itpn-pixel_nano", img_size=64)
    torch.save(model.state_dict(), folder / "pretrained.pth")
    return str(folder / "pretrained.pth")


@pytest.mark.parametrize("task", ["pretraining", "classification", "detection", "segmentation", "depth"])
def test_what_a_file_has_nothing_to_export_of(pretrained, tmp_path, capsys, task):
    """A task without a head in the file, or one that is not exported at all."""
    assert main(["export", pretrained, "--task", task, "--out", str(tmp_path / "x.pt2")]) == 2
    message = f"itpn: checkpoint {pretrained} cannot be exported as {task}; give --task pyramid or backbone"
    assert capsys.readouterr().err.splitlines() == [message]
    assert not list(tmp_path.iterdir())


def test_levels_without_a_pyramid(tmp_path, capsys):
    torch.save(make("itpn_nano", num_classes=7).state_dict(), tmp_path / "classifier.pth")
    command = ["export", str(tmp_path / "classifier.pth"), "--levels", "pooled", "--out", str(tmp_path / "x.pt2")]
    assert main(command) == 2
    assert "cannot be exported as pyramid; give --task classification or backbone" in capsys.readouterr().err


def test_the_first_that_can_be_exported(pretrained, tmp_path, capsys):
    """The decoder of pre-training is passed over."""
    assert main(["export", pretrained, "--img-size", "32", "--out", str(tmp_path / "x.pt2")]) == 0
    assert "level_1" in capsys.readouterr().out


def test_a_wrong_file_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setattr("itpn.tasks.export.open_exported", lambda path: lambda images: [torch.zeros(len(images), 7)])
    with pytest.raises(ExportFailed, match=r"a\.pt2 is not written, for it differs"):
        export_model(make("itpn_nano", num_classes=7), tmp_path / "a.pt2", (32, 32))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kwargs", "size", "dynamic", "message"),
    [
        ({}, (32, 30), False, "the network cannot take images of 32x30: .* not a multiple of the patch size 8"),
        ({"name": "itpn_nano_pyramid", "levels": "detection"}, (8, 8), False, "cannot take images of 8x8"),
        ({"migrate_ratio": 0.5}, (32, 32), True, "token migration and gathering .* export a fixed size"),
    ],
)
def test_what_cannot_be_exported(tmp_path, kwargs, size, dynamic, message):
    with pytest.raises(UserError, match=message):
        export_model(make(**{"name": "itpn_nano", **kwargs}), tmp_path / "a.onnx", size, dynamic)
    assert not list(tmp_path.iterdir())


def test_corrupt_weights(tmp_path):
    model = make("itpn_nano")
    model.head.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        export_model(model, tmp_path / "a.onnx", (32, 32))


def test_wrong_suffix(tmp_path):
    with pytest.raises(UserError, match=r"model\.pt must end with \.onnx \(ONNX\) or \.pt2"):
        check_out(tmp_path / "model.pt")


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'itpn\[export\]'"):
        check_out(tmp_path / "model.onnx")
    check_out(tmp_path / "model.pt2")


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_segmenter(tmp_path, form, capsys):
    """Of a size whose maps its pools do not divide."""
    torch.manual_seed(0)
    backbone = make_pyramid(
        "joined", pyramid_width=32, pyramid_depth=1, img_size=64, embed_dim=64, depths=(1, 1, 2), num_heads=1
    )
    model = Segmenter(backbone, 4, head_width=16).eval()
    exported = export_model(model, tmp_path / f"segmenter.{form}", (64, 160), outputs=name_logits)
    assert exported.difference < 1e-4
    assert exported.outputs == {"logits": "batch, 4, 64, 160"}
    torch.save(model.state_dict(), tmp_path / "segmenter.pth")
    assert main(["export", str(tmp_path / "segmenter.pth"), "--out", str(tmp_path / "x.onnx"), "--dynamic-size"]) == 2
    assert "a segmenter is exported for images of one size" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 5])
def test_a_detector_of_other_images(tmp_path, channels):
    torch.manual_seed(0)
    backbone = make_pyramid(
        "pooled",
        pyramid_width=32,
        pyramid_depth=1,
        img_size=64,
        embed_dim=64,
        depths=(1, 1, 2),
        num_heads=1,
        in_chans=channels,
    )
    options = {"rpn_post_nms_top_n_test": 20, "box_detections_per_img": 6, "box_score_thresh": 0.0}
    mean, std = [0.1 * (1 + n) for n in range(channels)], [0.2] * channels
    model = MaskDetector(
        backbone, 4, min_size=64, max_size=64, head_width=16, image_mean=mean, image_std=std, **options
    ).eval()
    out = tmp_path / "detector.onnx"
    assert export_detector(model, out, (64, 64)).inputs == {"image": f"{channels}, 64, 64"}
    image = torch.rand(channels, 64, 64)
    with torch.no_grad():
        theirs = model([image])[0]
    boxes = onnxruntime.InferenceSession(out).run(["boxes"], {"image": image.numpy()})[0]
    assert len(boxes) == 6
    assert torch.allclose(torch.from_numpy(boxes), theirs["boxes"], atol=1e-4)


def test_a_detector(tmp_path, capsys):
    """The file finds what PyTorch finds, in images that it was not traced with."""
    torch.manual_seed(0)
    backbone = make_pyramid(
        "pooled", pyramid_width=32, pyramid_depth=1, img_size=64, embed_dim=64, depths=(1, 1, 2), num_heads=1
    )
    options = {"rpn_post_nms_top_n_test": 20, "box_detections_per_img": 6, "box_score_thresh": 0.0}
    model = MaskDetector(backbone, 4, min_size=64, max_size=96, head_width=16, **options).eval()
    out = tmp_path / "detector.onnx"
    exported = export_detector(model, out, (64, 96), {"classes": '["a", "b", "c"]'})
    assert exported.difference < 1e-4
    assert "24 objects compared" in exported.form  # six in each of four
    assert list(exported.outputs) == ["boxes", "labels", "scores", "masks"]
    session = onnxruntime.InferenceSession(out)
    assert session.get_modelmeta().custom_metadata_map["classes"] == '["a", "b", "c"]'
    for seed in range(3):
        image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            theirs = model([image])[0]
        found = session.run(None, {"image": image.numpy()})
        for ours, name in zip(found, exported.outputs, strict=True):
            assert torch.allclose(torch.from_numpy(ours), theirs[name], atol=1e-4), name
    # of a size that is not the network's own it is not resized; what finds nothing is compared by all that it considers
    model.roi_heads.score_thresh = 0.99
    exported = export_detector(model, out, (96, 96))
    assert "24 objects compared" in exported.form
    assert (model.roi_heads.score_thresh, model.transform.min_size) == (0.99, (64,))
    image = torch.rand(3, 96, 96)
    model.transform.min_size = (96,)
    with torch.no_grad():
        assert len(model([image])[0]["boxes"]) == 0
    assert len(onnxruntime.InferenceSession(out).run(None, {"image": image.numpy()})[0]) == 0
    torch.save(model.state_dict(), tmp_path / "detector.pth")
    command = ["export", str(tmp_path / "detector.pth"), "--out"]
    assert main([*command, str(tmp_path / "detector.pt2")]) == 2
    assert "a detector is exported to .onnx" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "x.onnx"), "--dynamic-size"]) == 2
    assert "for images of one size" in capsys.readouterr().err
    assert not (tmp_path / "detector.pt2").exists()
