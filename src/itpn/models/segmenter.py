"""UPerNet on the pre-trained pyramid (Tian et al. 2023, section 4.2), of segmentation_models.pytorch's decoder."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from itpn.models.hivit import find_backbone
from itpn.models.pyramid import Headed, PyramidBackbone
from itpn.models.synced import precise, sync_batch_norm

AUXILIARY = 2  # the map of stride 16 for patches of 16 px


class Segmenter(Headed, nn.Module):
    """Classes of pixels: what torchvision's segmentation networks take and give.

    Args:
        backbone: a :class:`PyramidBackbone` with ``levels="joined"``, whose four maps are joined.
        num_classes: of pixels.
        head_width: channels of the decoder; None for as many as the coarsest map has (768 for base, as published).
        auxiliary: a second head of convolutions on the map of stride 16, in training.
        drop_rate: dropout of whole channels before pixels are classified.

    Raises:
        ValueError: the backbone gives other maps, or there are fewer than two classes.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        head_width: int | None = None,
        auxiliary: bool = True,
        drop_rate: float = 0.1,
    ) -> None:
        # a large package that nothing else needs
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        super().__init__()
        widths = backbone.out_channels
        if not isinstance(widths, list):
            raise ValueError("a segmenter takes four joined maps: levels='joined'")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        self.num_classes = num_classes
        self.head_width = head_width or widths[-1]
        self.backbone = backbone
        # its encoders begin with the image itself and stride 2, which it does not look at
        self.upernet = sync_batch_norm(UPerNetDecoder([0, 0, *widths], len(widths) + 1, self.head_width))
        self.dropout = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(self.head_width, num_classes, 1)
        self.aux_classifier = sync_batch_norm(FCNHead(widths[AUXILIARY], num_classes)) if auxiliary else None

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """Normalised images [B, in_chans, H, W] -> "out": logits [B, num_classes, H, W]; in training mode "aux" too.

        Any size: what is missing to whole units, and to two of them, is filled with zeros, the mean of normalised
        images.
        """
        return OrderedDict((name, self._enlarge(logits, x)) for name, logits in self.forward_logits(x).items())

    def forward_logits(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """As :meth:`forward`, of the strides that they are computed in, for the image with what is missing filled."""
        height, width = self._fill(x)
        x = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))
        maps = self.backbone.forward_maps(x)
        logits = OrderedDict(out=precise(self.classifier(self.dropout(self.upernet([x, x, *maps])))))
        if self.training and self.aux_classifier is not None:
            logits["aux"] = precise(self.aux_classifier(maps[AUXILIARY]))
        return logits

    def _enlarge(self, logits: Tensor, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return F.interpolate(logits, self._fill(x), mode="bilinear", align_corners=False)[..., :height, :width]

    def _fill(self, x: Tensor) -> list[int]:
        """Height and width with what is missing; the coarsest map is of every second unit."""
        unit = find_backbone(self).patch_size
        return [max(2 * unit, -(-side // unit) * unit) for side in x.shape[-2:]]
