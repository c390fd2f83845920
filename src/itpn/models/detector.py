"""Mask R-CNN and Faster R-CNN on the pre-trained pyramid (Tian et al. 2023, section 4.2), from torchvision's parts.

The pyramid is the detector's neck. :class:`FPNBackbone` has torchvision's feature pyramid network instead, for
comparisons and for backbones without a pyramid.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, generalized_box_iou_loss
from torchvision.ops.poolers import initLevelMapper

from itpn.geometry import fit_sides
from itpn.models.backbone import Backbone
from itpn.models.layers import patches_to_map
from itpn.models.pyramid import PyramidBackbone, TimmConventionsMixin
from itpn.models.synced import SyncedBatchNorm2d, at_least_float32, batch_fractions

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ANCHOR_SCALE = 8  # sides of anchors, in strides of their level
DETECTIONS = 100  # objects of an image at most, of COCO's metric and of torchvision's detectors
POOLED = ["0", "1", "2", "3"]  # levels that the box and mask heads read; the coarsest is only for proposals


class Detector(TimmConventionsMixin, FasterRCNN):
    """Faster R-CNN, with the interface of torchvision's detectors.

    In training mode it takes a list of images [3, H, W] in [0, 1] and a list of targets ("boxes" [n, 4] as x0, y0, x1,
    y1 in pixels, "labels" int64 [n] from 1) and returns a dict of losses. In eval mode it takes images and returns a
    dict for each: "boxes", "labels", "scores".

    The heads are the published ones: an anchor scale of 8 strides on five levels; four convolutions with batch norm and
    a linear layer for boxes; generalized IoU of boxes with weight 10.

    Args:
        backbone: returns five maps of the same number of channels: a :class:`PyramidBackbone` with
            ``levels="pooled"``, or a :class:`FPNBackbone`.
        num_classes: classes of objects, plus one for the background, as in torchvision.
        min_size: the short side that images are resized to; of several, training draws one and evaluation takes the
            last.
        max_size: longest side after that.
        image_mean, image_std: of the images that the backbone was pre-trained on.
        head_width: channels of the heads' convolutions; the linear layer has four times as many.
        box_loss_weight: weight of the generalized IoU of boxes.
        rpn_post_nms_top_n_train, rpn_post_nms_top_n_test, box_batch_size_per_image, box_score_thresh, box_nms_thresh,
            box_detections_per_img: as in torchvision's detectors, see also :meth:`limit_detections`.
        interpolation: of images that are resized, always with antialiasing.
        transform: further arguments of torchvision's GeneralizedRCNNTransform.

    Raises:
        ValueError: the backbone returns other maps, or there are fewer than two classes.
    """

    def __init__(  # many parameters: torchvision's own, under its names
        self,
        backbone: "PyramidBackbone | FPNBackbone",
        num_classes: int,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        head_width: int = 256,
        box_loss_weight: float = 10.0,
        rpn_post_nms_top_n_train: int = 2000,
        rpn_post_nms_top_n_test: int = 1000,
        box_batch_size_per_image: int = 512,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = DETECTIONS,
        interpolation: Literal["bicubic", "bilinear"] = "bilinear",
        **transform: Any,
    ) -> None:
        strides = [level["reduction"] for level in backbone.feature_info]
        if len(strides) != 5 or not isinstance(backbone.out_channels, int):
            raise ValueError("a detector takes five maps of the same number of channels: levels='pooled'")
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background: at least 2, not {num_classes}")
        width = backbone.out_channels
        rpn = make_rpn(width, strides, {"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test})
        heads = BoxAndMaskHeads(
            make_pool(strides, 7),
            FastRCNNConvFCHead((width, 7, 7), [head_width] * 4, [4 * head_width], norm_layer=SyncedBatchNorm2d),
            FastRCNNPredictor(4 * head_width, num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=box_batch_size_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=box_score_thresh,
            nms_thresh=box_nms_thresh,
            detections_per_img=box_detections_per_img,
        )
        heads.box_loss_weight = box_loss_weight
        # torchvision divides image by map size for the anchors' stride: the coarsest stride must divide the image
        resize = Resize(
            min_size,
            max_size,
            list(image_mean),
            list(image_std),
            size_divisible=strides[-1],
            interpolation=interpolation,
            **transform,
        )
        # from parts: FasterRCNN's own constructor has no arguments for other losses
        GeneralizedRCNN.__init__(self, backbone, rpn, heads, resize)
        self.num_classes = num_classes
        self.limit_detections(box_detections_per_img)

    def limit_detections(self, count: int) -> None:
        """Find so many objects in an image at most; above 100, the first stage proposes twice as many at least."""
        self.roi_heads.detections_per_img = count
        if count > DETECTIONS:
            for limits in (self.rpn._pre_nms_top_n, self.rpn._post_nms_top_n):
                limits["testing"] = max(limits["testing"], 2 * count)

    @property
    def has_masks(self) -> bool:
        return bool(self.roi_heads.has_mask())

    transform: "Resize"


class MaskDetector(Detector, MaskRCNN):
    """Mask R-CNN: a :class:`Detector` with a mask head of four convolutions.

    Targets also have "masks" uint8 [n, H, W]; results have "masks" [n, 1, H, W] as probabilities.

    Args:
        head_width, options: as in :class:`Detector`.
    """

    def __init__(
        self, backbone: "PyramidBackbone | FPNBackbone", num_classes: int, *, head_width: int = 256, **options: Any
    ) -> None:
        super().__init__(backbone, num_classes, head_width=head_width, **options)
        heads = self.roi_heads
        heads.mask_roi_pool = make_pool([level["reduction"] for level in backbone.feature_info], 14)
        heads.mask_head = MaskRCNNHeads(backbone.out_channels, [head_width] * 4, dilation=1)
        heads.mask_predictor = MaskRCNNPredictor(head_width, head_width, num_classes)


class FPNBackbone(TimmConventionsMixin, nn.Module):
    """A backbone with a randomly initialized feature pyramid network (Lin et al. 2017).

    Args:
        backbone: without a classifier (``num_classes=0``).
        width: channels of every level.
    """

    def __init__(self, backbone: Backbone, width: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        dims = [info["num_chs"] for info in backbone.feature_info]
        self.fpn = FeaturePyramidNetwork(dims, width)
        self.out_channels = width
        first = backbone.feature_info[0]["reduction"]
        self.feature_info = [{"num_chs": width, "reduction": first * 2**i} for i in range(5)]

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """Images [B, in_chans, H, W] -> maps by name, "0" the finest."""
        grid = self.backbone.grid_of(x.shape[-2:])
        stages = self.backbone.forward_stages(x)
        maps = self.fpn(OrderedDict((str(i), patches_to_map(stage, grid)) for i, stage in enumerate(stages)))
        for i in (3, 4):
            maps[str(i)] = F.avg_pool2d(maps[str(i - 1)], 2)
        return maps


class Resize(GeneralizedRCNNTransform):
    """torchvision's transform with antialiasing, so that large photographs are resized as in training.

    Args:
        interpolation: "bicubic" or "bilinear".
        options: arguments of torchvision's transform.

    Attributes:
        in_training: resize images in training mode too.
    """

    def __init__(self, *args: Any, interpolation: str = "bilinear", **options: Any) -> None:
        super().__init__(*args, **options)
        self.interpolation = interpolation
        self.in_training = True

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.training and not self.in_training:
            return image, target
        short = self.torch_choice(list(self.min_size)) if self.training else self.min_size[-1]
        before = [int(side) for side in image.shape[-2:]]
        after = fit_sides(before, short, self.max_size)
        if self.fixed_size is not None:
            after = [self.fixed_size[1], self.fixed_size[0]]
        if after == before:  # always so in exported graphs, which cannot contain the code below
            return image, target
        image = F.interpolate(image[None], after, mode=self.interpolation, align_corners=False, antialias=True)[0]
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], before, after)
            if "masks" in target:
                masks = target["masks"].to(torch.uint8)
                resized = masks.new_zeros(0, *after)
                if len(masks):
                    resized = F.interpolate(masks[None], after, mode="nearest-exact")[0]
                target["masks"] = resized
        return image, target


# --- heads


class Float32Anchors(AnchorGenerator):
    """Anchors in float32 for maps of half precision, which has too few digits for hundreds of pixels."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return super().forward(image_list, [at_least_float32(level[:1, :1]) for level in feature_maps])


class Float32RPNHead(RPNHead):
    """Box offsets in float32, so that boxes are float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [at_least_float32(level) for level in logits], [at_least_float32(level) for level in deltas]


def make_rpn(width: int, strides: Sequence[int], post_nms_top_n: dict[str, int]) -> "BalancedRPN":
    """The first stage on maps of so many channels."""
    anchors = Float32Anchors(tuple((ANCHOR_SCALE * s,) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
    return BalancedRPN(
        anchors,
        Float32RPNHead(width, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n=post_nms_top_n,
        nms_thresh=0.7,
    )


def make_pool(strides: Sequence[int], size: int) -> MultiScaleRoIAlign:
    """RoI pooling with the known strides of the maps; torchvision would infer them from its first images."""
    pool = MultiScaleRoIAlign(POOLED, output_size=size, sampling_ratio=2)
    used = strides[: len(POOLED)]
    pool.scales = [1 / stride for stride in used]
    pool.map_levels = initLevelMapper(int(math.log2(used[0])), int(math.log2(used[-1])))
    return pool


class BoxAndMaskHeads(RoIHeads):
    """torchvision's second stage with generalized IoU for boxes; losses are means over the batches of all processes."""

    box_loss_weight: float

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            return [], self._compute_losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _compute_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
        assert targets is not None  # select_training_samples has checked them
        logits, deltas = self._predict_boxes(features, proposals, image_shapes)
        label = torch.cat(labels)
        foreground = [label_ > 0 for label_ in labels]  # of each image: whether a proposal has an object
        boxes = [box[chosen] for box, chosen in zip(proposals, foreground, strict=True)]
        objects = [index[chosen] for index, chosen in zip(matched, foreground, strict=True)]
        wanted = torch.cat([target["boxes"][index] for target, index in zip(targets, objects, strict=True)])
        fractions = batch_fractions([len(label), len(wanted)], label.device)

        positive = label.nonzero().squeeze(1)
        deltas = deltas.unflatten(1, (-1, 4))[positive, label[positive]]  # [n, 4], of each object's own class
        found = self.box_coder.decode_single(deltas, torch.cat(boxes))
        overlap = generalized_box_iou_loss(found, wanted.to(found.dtype), reduction="sum") / max(len(label), 1)
        losses = {
            "loss_classifier": F.cross_entropy(logits, label) * fractions[0],
            "loss_box_reg": self.box_loss_weight * overlap * fractions[0],
        }
        if self.has_mask():
            masks = self._predict_masks(features, boxes, image_shapes)
            truth, classes = [t["masks"] for t in targets], [t["labels"] for t in targets]
            losses["loss_mask"] = maskrcnn_loss(masks, boxes, truth, classes, objects) * fractions[1]
        return losses

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        logits, deltas = self._predict_boxes(features, proposals, image_shapes)
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        keys = ("boxes", "labels", "scores")
        results = [dict(zip(keys, values, strict=True)) for values in zip(boxes, labels, scores, strict=True)]
        if self.has_mask():
            masks = self._predict_masks(features, boxes, image_shapes)
            for result, own in zip(results, maskrcnn_inference(masks, labels), strict=True):
                result["masks"] = own
        return results

    def _predict_boxes(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Class logits [n, classes] and box offsets [n, 4 * classes]."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        return at_least_float32(logits), at_least_float32(deltas)

    def _predict_masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Mask logits [n, classes, 28, 28]."""
        assert self.mask_roi_pool is not None
        return at_least_float32(self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))))


class BalancedRPN(RegionProposalNetwork):
    """torchvision's first stage; losses are means over the batches of all processes."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        sampler, count = self.fg_bg_sampler, 0
        for label in labels:
            positive = min(int((label >= 1).sum()), int(sampler.batch_size_per_image * sampler.positive_fraction))
            count += positive + min(int((label == 0).sum()), sampler.batch_size_per_image - positive)
        (fraction,) = batch_fractions([count], objectness.device)
        objectness_loss, box_loss = super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
        return objectness_loss * fraction, box_loss * fraction
