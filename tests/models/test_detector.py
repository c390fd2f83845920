"""The detector: published maps inside it, its heads and losses, several processes, any image size."""

import copy
import random

import pytest
import torch
from processes import compare_processes
from public import read_golden, save_public
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import generalized_box_iou

import itpn
from itpn.data.objects import DetectionTransform
from itpn.errors import UserError
from itpn.models.build import make_backbone, make_pyramid
from itpn.models.detector import Detector, FPNBackbone, MaskDetector
from itpn.models.synced import SyncedBatchNorm2d
from itpn.tasks.pretraining.module import save_weights
from itpn.tasks.pretraining.network import build_from

# few boxes and narrow heads, for speed
LIGHT = {"head_width": 32, "rpn_post_nms_top_n_train": 64, "rpn_post_nms_top_n_test": 32, "box_detections_per_img": 8}
NANO = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depths": (1, 1, 2), "num_heads": 4}


def make_detector(seed: int = 0, neck: str = "pyramid", **options) -> Detector:
    torch.manual_seed(seed)
    own = {name: options.pop(name) for name in ("rel_pos_bias", "drop_path_rate") if name in options}
    backbone = (
        make_pyramid("pooled", pyramid_width=32, pyramid_depth=1, **NANO, **own)
        if neck == "pyramid"
        else FPNBackbone(make_backbone(num_classes=0, **NANO, **own), 32)
    )
    kind = MaskDetector if options.pop("masks", True) else Detector
    return kind(backbone, **{"num_classes": 4, "min_size": 64, "max_size": 96, **LIGHT, **options})


def make_targets(counts: list[int], size: int = 64) -> tuple[list, list]:
    """Noise with so many objects in each image."""
    generator = torch.Generator().manual_seed(1)
    images, targets = [], []
    for count in counts:
        images.append(torch.rand(3, size, size, generator=generator))
        corner = torch.randint(0, size // 2, (count, 2), generator=generator).float()
        side = torch.randint(8, size // 2, (count, 2), generator=generator).float()
        masks = torch.zeros(count, size, size, dtype=torch.uint8)
        boxes = torch.cat([corner, corner + side], dim=1)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        labels = torch.randint(1, 4, (count,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return images, targets


@pytest.mark.parametrize("case", ["off_det_pixel", "off_det_clip", "off_det_clip_nonsquare"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_published_maps_inside_a_detector(tmp_path, case, checkpointing):
    golden, _ = read_golden(case)
    path = save_public(tmp_path, case)
    with pytest.warns(UserWarning, match="has no set of detection heads"):
        model = itpn.load(
            path, task="detection", num_classes=3, strict=False, num_heads=4, min_size=96, max_size=128, **LIGHT
        )
    assert isinstance(model, Detector)
    model.set_grad_checkpointing(checkpointing)
    maps = model.backbone(golden["input"]["image"])
    for i, level in enumerate(maps.values()):
        assert (level - golden["output"][f"level_{i}"]).abs().max() < 2e-5
    # the heads accept these maps
    found = model([golden["input"]["image"][0]])[0]
    assert set(found) == {"boxes", "labels", "scores", "masks"}


def test_only_heads_are_randomly_initialized(tmp_path):
    """From a pre-training file of ours: every parameter of backbone and pyramid is the file's."""
    config = itpn.tasks.recipe_files.read_recipe("itpn-pixel_nano")[1]
    torch.manual_seed(3)
    pretrained = build_from(config)
    for parameter in pretrained.parameters():
        parameter.data += 0.01  # no parameter equals an initialization
    path = tmp_path / "model.safetensors"
    save_weights(path, pretrained, "itpn-pixel_nano", config)
    with pytest.warns(UserWarning, match="has no"):
        model = itpn.load(path, task="detection", num_classes=4, strict=False, **LIGHT)
    theirs = pretrained.state_dict()
    random = [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, theirs.get(name.removeprefix("backbone."), torch.tensor(torch.nan)))
    ]
    assert {name.partition(".")[0] for name in random} == {"rpn", "roi_heads"}
    assert len(random) + sum(n.startswith(("backbone.", "pyramid.")) for n in theirs) == len(model.state_dict())
    report = itpn.inspect(path)
    (missing,) = [f for f in report.use("detection").findings if f.kind != "expected"]
    assert (missing.kind, missing.text) == ("random", "has no set of detection heads")
    assert len(missing.names) == len(random)
    with pytest.raises(UserError, match="num_classes=N"):
        itpn.load(path, task="detection")
    with pytest.raises(UserError, match="strict=False"):
        itpn.load(path, task="detection", num_classes=4)


@pytest.mark.parametrize("neck", ["pyramid", "fpn"])
@pytest.mark.parametrize("masks", [True, False])
def test_a_plain_state_dict_is_read_back(tmp_path, neck, masks):
    model = make_detector(neck=neck, masks=masks).eval()
    torch.save(model.state_dict(), tmp_path / "detector.pth")
    loaded = itpn.load(tmp_path / "detector.pth", num_heads=4, min_size=64, max_size=96, **LIGHT)
    assert loaded.has_masks is masks is isinstance(loaded, MaskRCNN)  # which torchvision's reference scripts check
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    images, _ = make_targets([1])
    with torch.no_grad():
        ours, theirs = loaded(images)[0], model(images)[0]
    for key, value in theirs.items():
        assert torch.equal(ours[key], value)
    assert itpn.inspect(tmp_path / "detector.pth").task == "detection"


def test_other_classes_keep_the_other_heads(tmp_path):
    """A detector of 5 classes takes all weights of one of 3 but those of the class predictors."""
    model = make_detector()
    torch.save(model.state_dict(), tmp_path / "detector.pth")
    with pytest.warns(UserWarning, match="has no predictor of (boxes and classes|masks) that fits"):
        other = itpn.load(tmp_path / "detector.pth", num_classes=6, strict=False, num_heads=4, **LIGHT)
    theirs, ours = model.state_dict(), other.state_dict()
    initialized = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert {name.rpartition(".")[0].partition(".")[2] for name in initialized} == {
        "box_predictor.cls_score",
        "box_predictor.bbox_pred",
        "mask_predictor.mask_fcn_logits",
    }


def test_heads_are_the_published_ones():
    model = MaskDetector(make_pyramid("pooled"), num_classes=81)
    anchors = model.rpn.anchor_generator
    assert [a.shape for a in anchors.cell_anchors] == [(3, 4)] * 5
    for stride, cell in zip((4, 8, 16, 32, 64), anchors.cell_anchors, strict=True):
        sides = cell[:, 2:] - cell[:, :2]
        assert sides.prod(dim=1).sqrt().tolist() == pytest.approx([8 * stride] * 3, rel=0.03)  # rounded to pixels
        assert (sides[:, 1] / sides[:, 0]).tolist() == pytest.approx([0.5, 1, 2], rel=0.07)
    box, mask = model.roi_heads.box_head, model.roi_heads.mask_head
    layers = [type(layer) for layer in box.modules() if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d)]
    assert layers == [nn.Conv2d, SyncedBatchNorm2d] * 4 + [nn.Linear]
    assert [type(layer) for layer in mask.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)] == [nn.Conv2d] * 4
    assert model.roi_heads.box_loss_weight == 10
    assert model.roi_heads.box_predictor.cls_score.out_features == 81


def test_losses_of_boxes_by_hand():
    """Generalized IoU of the decoded boxes of each object's class, summed, over all samples, times 10."""
    model = make_detector()
    images, targets = make_targets([2, 3])
    kept = {}
    heads = model.roi_heads
    select, predict = heads.select_training_samples, heads.box_predictor.forward

    def selected(*args):
        kept["samples"] = select(*args)
        return kept["samples"]

    def predicted(x):
        kept["answers"] = predict(x)
        return kept["answers"]

    heads.select_training_samples, heads.box_predictor.forward = selected, predicted
    torch.manual_seed(0)
    losses = model(images, targets)
    (proposals, _, labels, regression), (logits, deltas) = kept["samples"], kept["answers"]
    label = torch.cat(labels)
    theirs, _ = fastrcnn_loss(logits, deltas, labels, list(regression))
    assert losses["loss_classifier"].item() == pytest.approx(theirs.item())
    boxes = heads.box_coder.decode(deltas, proposals)  # [n, classes, 4]
    truth = heads.box_coder.decode(torch.cat(regression), proposals)[:, 0]  # as they were encoded
    expected = 0.0
    for i in label.nonzero().flatten().tolist():
        expected += 1 - generalized_box_iou(boxes[i, label[i]][None], truth[i][None]).item()
    assert len(label.nonzero()) >= 5
    assert losses["loss_box_reg"].item() == pytest.approx(10 * expected / len(label), rel=1e-4)


@pytest.mark.parametrize("counts", [[0, 2], [0, 0]])
def test_images_without_objects(counts):
    model = make_detector()
    images, targets = make_targets(counts)
    losses = model(images, targets)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # otherwise DDP waits for it for ever
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("rel_pos_bias", [True, "decomposed"])
def test_any_size(rel_pos_bias):
    """Images of several shapes in a batch, whose grid the relative positions follow."""
    model = make_detector(rel_pos_bias=rel_pos_bias, min_size=96, max_size=160)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "rel" in name:
            parameter.data.normal_(generator=generator)
    images = [torch.rand(3, 50, 83), torch.rand(3, 121, 64)]
    _, targets = make_targets([1, 1], 50)
    targets[1]["masks"] = torch.zeros(1, 121, 64, dtype=torch.uint8)
    captured = []
    model.rpn.anchor_generator.register_forward_hook(lambda _, args, anchors: captured.append((args, anchors)))
    losses = model(images, targets)
    sum(losses.values()).backward()
    (batch, maps), _ = captured[0]
    height, width = batch.tensors.shape[-2:]
    assert height % 64 == width % 64 == 0
    assert [(height // m.shape[-2], width // m.shape[-1]) for m in maps] == [(4 * 2**i,) * 2 for i in range(5)]
    with torch.no_grad():
        found = model.eval()(images)
    for image, result in zip(images, found, strict=True):
        assert result["masks"].shape[-2:] == image.shape[-2:]


def test_half_precision_leaves_boxes_in_float32():
    """Hundreds of pixels and a fraction do not fit into the 8 bits of bfloat16."""
    model = make_detector(min_size=640, max_size=1066)
    captured: dict[str, list] = {"anchors": [], "proposals": []}
    model.rpn.anchor_generator.register_forward_hook(lambda _, args, anchors: captured["anchors"].append(anchors[0]))
    model.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, args: captured["proposals"].append(args[1][0]))
    image = torch.rand(3, 640, 1000, generator=torch.Generator().manual_seed(0))
    _, targets = make_targets([3], 640)
    with torch.no_grad():
        model.eval()([image])
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = model([image])
            losses = model.train()([image], [{**targets[0], "masks": torch.ones(3, 640, 1000, dtype=torch.uint8)}])
    assert torch.equal(captured["anchors"][0], captured["anchors"][1])
    for boxes in (*captured["proposals"], found["boxes"]):
        assert boxes.dtype == torch.float32
        assert (boxes != boxes.bfloat16()).any(dim=1).float().mean() > 0.5
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("height", [40, 65, 88, 131])
def test_strides_do_not_come_from_the_first_image(height):
    """torchvision's pooling infers them from unpadded sizes and is wrong for small images."""
    model = make_detector(min_size=64, max_size=200, box_score_thresh=0.0).eval()
    image = torch.rand(3, 96, 128)
    with torch.no_grad():
        expected = copy.deepcopy(model)([image])[0]
        model.transform.min_size = (height,)
        model([torch.rand(3, height, height)])
        model.transform.min_size = (64,)
        found = model([image])[0]
    assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_large_images_are_resized_as_in_training():
    """With antialiasing, as in training; boxes and masks are resized too."""
    resize = make_detector(min_size=64, max_size=96).transform
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8, generator=generator)
    known = {"id": 1, "size": (300, 400), "objects": []}
    trained = DetectionTransform(64, 96, scales=(1.0, 1.0), crop_prob=0.0, hflip=0.0, masks=False)
    wanted = trained(pixels, random.Random(0), known)["image"]
    ours, _ = resize.eval().resize(pixels / 255)
    assert ours.shape == wanted.shape == (3, 64, 85)
    assert (ours * 255 - wanted).abs().max() < 1
    mask = torch.zeros(1, 300, 400, dtype=torch.uint8)
    mask[0, 60:240, 40:200] = 1
    target = {"boxes": torch.tensor([[40.0, 60, 200, 240]]), "masks": mask}
    _, target = resize.train().resize(pixels / 255, target)
    assert target["boxes"][0].tolist() == pytest.approx([8.5, 12.8, 42.5, 51.2])
    rows, cols = (target["masks"][0].any(dim=dim).nonzero().flatten() for dim in (1, 0))
    assert target["masks"].shape == (1, 64, 85)
    assert (rows[0], rows[-1], cols[0], cols[-1]) == (13, 50, 8, 41)  # of 12.8 to 51.2 and 8.5 to 42.5
    empty = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 300, 400, dtype=torch.bool)}
    assert resize.resize(pixels / 255, empty)[1]["masks"].shape == (0, 64, 85)
    target = {"boxes": torch.ones(1, 4), "masks": mask.bool()}
    assert resize.resize(pixels / 255, target)[1]["masks"].dtype == torch.uint8
    resize.in_training = False
    assert resize.resize(pixels / 255)[0].shape == pixels.shape


def test_checkpointing_keeps_less_for_the_same_gradients():
    """Activation checkpointing in backbone and pyramid."""
    model = make_detector(rel_pos_bias=True)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    kept, gradients = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        storages: dict[int, int] = {}

        def keep(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = sum(level.square().mean() for level in model.backbone(image).values())
        kept.append(sum(storages.values()))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.backbone.named_parameters()})
        model.zero_grad(set_to_none=True)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-8), name
    parameters = sum(p.nbytes for p in model.backbone.parameters())
    assert kept[1] - parameters < 0.4 * (kept[0] - parameters)


def test_layers_of_the_learning_rate():
    """Stem, block after block, then pyramid and heads at the full rate."""
    for neck in ("pyramid", "fpn"):
        model = make_detector(neck=neck)
        groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
        scales = {}
        names = {id(p): name for name, p in model.named_parameters()}
        for group in groups:
            for parameter in group["params"]:
                scales[names[id(parameter)]] = group["lr_scale"]
                if names[id(parameter)].endswith("pos_embed"):
                    assert group["weight_decay"] == 0
        inside = "backbone.backbone."
        assert scales[f"{inside}patch_embed.proj.weight"] == 0.5**5
        assert scales[f"{inside}pos_embed"] == 0.5**5
        assert scales[f"{inside}stages.0.0.mlp.fc1.weight"] == 0.5**4
        assert scales[f"{inside}merges.0.norm.weight"] == 0.5**4
        assert scales[f"{inside}stages.2.1.attn.qkv.weight"] == 0.5
        heads = {scale for name, scale in scales.items() if not name.startswith(inside)}
        assert heads == {1.0}
        assert any(".pyramid." in name or ".fpn." in name for name in scales)


def test_two_processes_compute_what_one_does(tmp_path):
    """Two images, one with many objects and one with few: gradients, and the statistics of batch norm."""
    model = make_detector()
    images, targets = make_targets([6, 1])
    options = {**LIGHT, "min_size": 64, "max_size": 64}
    given = {"backbone": NANO, "options": options, "state": model.state_dict(), "images": images, "targets": targets}
    assert compare_processes(given, tmp_path) == 4


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="five maps"):
        Detector(make_pyramid("pyramid", **NANO), num_classes=3)
    with pytest.raises(ValueError, match="background"):
        make_detector(num_classes=1)
