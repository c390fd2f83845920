"""Programs that nobody here wrote, on our backbones: what segmentation, detection and transformers' users run."""

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2
from transformers import AutoBackbone, AutoConfig, TimmBackbone, TimmBackboneConfig

import itpn  # noqa: F401  # registers our networks with timm
from itpn.data.shapes import write_shapes
from itpn.models.detector import MaskDetector

NAMES = ["itpn_nano", "fast_itpn_nano", "itpn_nano_pyramid"]
FOUR_STAGES = {"encoder_depth": 4}  # smp counts strides 2, 4, 8, 16: our three are 2 to 4 of these
UNET = {**FOUR_STAGES, "decoder_channels": (64, 32, 16, 16)}


def assert_trains(parameters: Any) -> None:
    for name, parameter in parameters:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("network", "options"), [(smp.Unet, UNET), (smp.UPerNet, FOUR_STAGES)])
def test_segmentation_models_pytorch(name, network, options):
    torch.manual_seed(0)
    model = network(encoder_name=f"tu-{name}", encoder_weights=None, classes=3, **options)
    images, classes = torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    loss = nn.functional.cross_entropy(model(images), classes)
    assert loss.isfinite()
    loss.backward()
    assert_trains(model.encoder.named_parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model(images).isfinite().all()
    # another size and channels
    wide = network(encoder_name=f"tu-{name}", encoder_weights=None, classes=3, in_channels=4, **options).eval()
    assert wide(torch.randn(1, 4, 64, 96)).shape == (1, 3, 64, 96)


@pytest.mark.parametrize("network", [smp.Unet, smp.UPerNet, smp.FPN])
def test_segmentation_levels_need_no_settings(network):
    """Four maps, down to stride 32, as these networks expect them."""
    model = network("tu-itpn_nano_pyramid", encoder_weights=None, classes=3, levels="joined")
    output = model(torch.randn(2, 3, 64, 64))
    assert output.shape == (2, 3, 64, 64)
    output.square().mean().backward()
    assert_trains(model.encoder.named_parameters())


def test_torchvision_mask_rcnn():
    torch.manual_seed(0)
    backbone = timm.create_model("itpn_nano_pyramid", levels="pooled")
    names = [str(level) for level in range(5)]
    model = MaskRCNN(
        backbone,
        num_classes=None,  # said by the predictors below
        min_size=96,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(tuple((8 * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(names[:4], output_size=7, sampling_ratio=2),
        mask_roi_pool=MultiScaleRoIAlign(names[:4], output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(32, layers=(32,), dilation=1),  # small heads and few boxes, to be quick
        mask_predictor=MaskRCNNPredictor(32, 32, num_classes=3),
        box_head=TwoMLPHead(32 * 7**2, 32),
        box_predictor=FastRCNNPredictor(32, num_classes=3),
        rpn_post_nms_top_n_train=64,
        rpn_post_nms_top_n_test=32,
        box_batch_size_per_image=32,
        box_detections_per_img=8,
    )
    images = [torch.rand(3, 96, 80), torch.rand(3, 64, 96)]  # torchvision pads both to a multiple of 32
    targets = []
    for image in images:
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        mask[:, 10:50, 20:70] = 1
        box = torch.tensor([[20.0, 10.0, 70.0, 50.0]])
        targets.append({"boxes": box, "labels": torch.tensor([1]), "masks": mask})
    losses = model(images, targets)
    assert set(losses) >= {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    assert_trains(backbone.named_parameters())
    for part in ("backbone.patch_embed.proj.weight", "backbone.pos_embed", "pyramid.outputs.0.mlp.fc1.weight"):
        assert backbone.get_parameter(part).grad.abs().sum() > 0
    with torch.no_grad():
        found = model.eval()(images)
    for image, result in zip(images, found, strict=True):
        assert set(result) == {"boxes", "labels", "scores", "masks"}
        assert result["masks"].shape[1:] == (1, *image.shape[1:])


def test_torchvision_reference_training(tmp_path):
    """What torchvision's reference script does to a detector: its data, its step, its evaluation's questions."""
    root = write_shapes(tmp_path / "shapes", train=6, val=6, img_size=64).coco
    data = CocoDetection(root / "train2017", root / "annotations" / "instances_train2017.json", transforms=None)
    data = wrap_dataset_for_transforms_v2(data, target_keys=("boxes", "labels", "masks", "image_id", "iscrowd"))
    augment = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(1.0), v2.ToDtype(torch.float32, scale=True)])
    samples = [augment(*data[index]) for index in range(len(data))]
    loader = DataLoader(samples, batch_size=2, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    torch.manual_seed(0)
    backbone = timm.create_model("itpn_nano_pyramid", levels="pooled")
    model = MaskDetector(backbone, 7, min_size=64, max_size=96, head_width=16, box_detections_per_img=8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
    scaler = torch.amp.GradScaler("cpu")
    model.train()
    for images, targets in loader:
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(list(images), [dict(target) for target in targets])
            loss = sum(losses.values())
        assert loss.isfinite()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        warmup.step()
    assert isinstance(model, MaskRCNN)  # by which it tells whether masks are to be judged
    assert_trains(model.named_parameters())
    with torch.inference_mode():
        found = model.eval()(list(images))
    for image, target, result in zip(images, targets, found, strict=True):
        assert result["masks"].shape[1:] == (1, *image.shape[1:])
        assert result["boxes"].shape[1:] == target["boxes"].shape[1:]


@pytest.mark.parametrize("name", NAMES)
def test_transformers(name):
    torch.manual_seed(0)
    config = TimmBackboneConfig(backbone=name, out_indices=[0, 1, 2])
    images = torch.randn(2, 3, 96, 64)
    for make in (TimmBackbone, AutoBackbone.from_config):
        backbone = make(config)
        ours = timm.create_model(name, features_only=True).eval()
        ours.load_state_dict(backbone._backbone.state_dict())
        with torch.no_grad():
            maps, theirs = ours(images), backbone.eval()(images).feature_maps
        assert backbone.channels == ours.feature_info.channels()
        for own, other in zip(maps, theirs, strict=True):
            assert torch.equal(own, other)


def test_transformers_from_disk(tmp_path):
    """Built on the meta device there: relative positions, which no file holds, must come back."""
    backbone = TimmBackbone(TimmBackboneConfig(backbone="hivit_tiny")).eval()
    for name, parameter in backbone.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
    backbone.save_pretrained(tmp_path)
    # TimmBackbone.from_pretrained takes a name of timm's, so the general way
    config = AutoConfig.from_pretrained(tmp_path)
    loaded = super(TimmBackbone, TimmBackbone).from_pretrained(tmp_path, config=config).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(loaded(images).feature_maps[0], backbone(images).feature_maps[0])
