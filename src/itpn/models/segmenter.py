"""UPerNet on the pre-trained pyramid (Tian et al. 2023, section 4.2), with segmentation_models.pytorch's decoder."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from itpn.models.pyramid import PyramidBackbone, TimmConventionsMixin
from itpn.models.synced import at_least_float32, sync_batch_norm

AUXILIARY = 2  # index of the map that the auxiliary head reads: stride 16 for patches of 16 px


class Segmenter(TimmConventionsMixin, nn.Module):
    """Semantic segmentation, with the interface of torchvision's segmentation networks.

    Args:
        backbone: a :class:`PyramidBackbone` with ``levels="joined"``: four concatenated maps.
        num_classes: classes of pixels.
        head_width: channels of the decoder; None for as many as the coarsest map has (768 for base, as published).
        auxiliary: add a second, convolutional head on the map of stride 16, for training.
        drop_rate: dropout of whole channels before the classifier.

    Raises:
        ValueError: the backbone returns other maps, or there are fewer than two classes.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        head_width: int | None = None,
        auxiliary: bool = True,
        drop_rate: float = 0.1,
    ) -> None:
        # imported here: a large package that only this class needs
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        super().__init__()
        widths = backbone.out_channels
        if not isinstance(widths, list):
            raise ValueError("a segmenter takes four concatenated maps: levels='joined'")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        self.num_classes = num_classes
        self.head_width = head_width or widths[-1]
        self.backbone = backbone
        # it expects the image itself and a map of stride 2 first, which it ignores
        self.upernet = sync_batch_norm(UPerNetDecoder([0, 0, *widths], len(widths) + 1, self.head_width))
        self.dropout = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(self.head_width, num_classes, 1)
        self.aux_classifier = sync_batch_norm(FCNHead(widths[AUXILIARY], num_classes)) if auxiliary else None

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """Normalized images [B, in_chans, H, W] -> "out": logits [B, num_classes, H, W]; in training mode also "aux".

        Images may have any size. They are padded to whole patches, at least two a side, with zeros, the mean of
        normalized images.
        """
        return OrderedDict((name, self._resize(logits, x)) for name, logits in self.forward_logits(x).items())

    def forward_logits(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """As :meth:`forward`, but logits of the padded image at the stride of their map, not resized."""
        height, width = self._padded_size(x)
        x = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
        maps = self.backbone.forward_maps(x)
        logits = OrderedDict(out=at_least_float32(self.classifier(self.dropout(self.upernet([x, x, *maps])))))
        if self.training and self.aux_classifier is not None:
            logits["aux"] = at_least_float32(self.aux_classifier(maps[AUXILIARY]))
        return logits

    def _resize(self, logits: Tensor, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return F.interpolate(logits, self._padded_size(x), mode="bilinear", align_corners=False)[..., :height, :width]

    def _padded_size(self, x: Tensor) -> list[int]:
        """Height and width in whole patches; at least two, because the coarsest map pools 2x2 patches."""
        patch = self.backbone.backbone.patch_size
        return [max(2 * patch, -(-side // patch) * patch) for side in x.shape[-2:]]
