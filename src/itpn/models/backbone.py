"""What pyramid, decoders, heads, tasks and checkpoints ask of a backbone, whatever its architecture."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from itpn.models.position import POSITIONS, Grid, Resample
from itpn.models.recompute import Recompute

# beginnings of names of the classifier's tensors in files, where a backbone's begin with "backbone."
CLASSIFIER = ("backbone.head.", "backbone.fc_norm.")


class Backbone(nn.Module):
    """A network of three stages that computes each patch of a square of pixels by itself, at least in stages 1 and 2.

    A patch has 4x4 tokens in stage 1, 2x2 in stage 2 and one in stage 3. ``forward`` is a classifier, as in timm.

    Attributes:
        in_chans, num_classes, feature_info: as in timm; ``feature_info`` has the channels and stride of each stage.
        patch_size: pixels of a patch's side.
        embed_dim: channels of stage 3.
        depths: blocks of each stage.
        num_heads: attention heads of stage 3; an auxiliary head has as many.
        norm_eps: of norms; the pyramid has the same.
        grid_size: rows and columns of patches in the images that it is made for.
        rel_pos_grid: the same of its relative position tables; None without any.
        pos_resample: how its position table is resampled.
        grad_checkpointing: which activations :meth:`forward_stages` keeps, see :func:`itpn.models.recompute.run_block`.
    """

    in_chans: int
    num_classes: int
    feature_info: list[dict[str, Any]]
    patch_size: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: int
    norm_eps: float
    grid_size: Grid
    rel_pos_grid: Grid | None = None
    pos_resample: Resample = "exact"
    grad_checkpointing: Recompute = False
    # set on models that timm.create_model built
    pretrained_cfg: dict[str, Any]  # timm's settings of the weights
    model_args: dict[str, Any]  # the constructor's arguments that were given (see itpn.checkpoints.registry)

    def forward_stages(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        tap: int | None = None,
    ) -> list[Tensor]:
        """Run the stages on all patches, or on the visible ones only.

        Args:
            images: [B, in_chans, H, W].
            visible: int64 [B, V], the patches to compute, row-major; None for all.
            mask: bool [B, N], where all patches are computed: ``mask_token`` [1, 1, C] replaces the stage 3 input of
                the masked ones.
            tap: index of a stage 3 block whose output is returned too.

        Returns:
            The output of each stage: [B, V, 4, 4, C1], [B, V, 2, 2, C2], [B, V, 1, 1, C]; then the output of block
            ``tap``, [B, V, C].
        """
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: Recompute = True) -> None:
        """As in timm; ``"selective"`` recomputes only norms and activation functions.

        See :func:`itpn.models.recompute.run_block`.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates, as in timm."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(POSITIONS)}

    def relative_positions(self, grid: Grid, visible: Tensor | None) -> Tensor | None:
        """Rows of the relative position tables for each pair of patches.

        Returns:
            int64 [N, N] for all patches, [B, V, V] for the visible ones; None without tables.
        """
        return None

    def grid_of(self, size: Sequence[int]) -> Grid:
        """Rows and columns of patches in an image of this height and width.

        Raises:
            ValueError: a side is not a multiple of the patch size.
        """
        height, width = size
        if height % self.patch_size or width % self.patch_size or height < 1 or width < 1:
            raise ValueError(
                f"image size {height}x{width} is not a multiple of the patch size {self.patch_size}; "
                f"pad or resize it, for example to {max(1, round(height / self.patch_size)) * self.patch_size}"
                f"x{max(1, round(width / self.patch_size)) * self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(in_chans, H, W) of the images that it is made for."""
        return self.in_chans, self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size

    @property
    def fixed_size(self) -> bool:
        """Whether an exported graph is right for one image size alone."""
        return False


def find_backbone(model: nn.Module) -> Backbone:
    """The first :class:`Backbone` among a model, its ``backbone``, the ``backbone`` of that, and so on."""
    while not isinstance(model, Backbone):
        model = model.backbone  # type: ignore[assignment]  # a module; otherwise an AttributeError
    return model


def check_intermediates(norm: bool, output_fmt: str) -> None:
    """Raise ValueError for what timm's ``forward_intermediates`` cannot return here."""
    if norm:
        raise ValueError("there is no norm between the stages to apply to intermediate features")
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt must be NCHW or NHWC, not {output_fmt}")
