"""HiViT, the hierarchical vision transformer of iTPN; and the backbone of Fast-iTPN, its faster successor.

Zhang et al., "HiViT: A Simpler and More Efficient Design of Hierarchical Vision Transformer", ICLR 2023;
Tian et al., "Integrally Pre-Trained Transformer Pyramid Networks", CVPR 2023, section 3;
Tian et al., "Fast-iTPN: Integrally Pre-Trained Transformer Pyramid Network with Token Migration", TPAMI 2024.

An image is divided into *patches* of 16x16 pixels. A patch holds 4x4 tokens in stage 1, 2x2 in stage 2 and one token
in stage 3. Stages 1 and 2 have no attention, so no information crosses a patch border before stage 3. Masked patches
can therefore be dropped before the first layer, and the visible ones do not change. Every tensor here has the layout
``[batch, patches, rows, cols, channels]``; rows and cols count the tokens inside a patch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from itpn.models.backbone import Backbone, check_intermediates
from itpn.models.layers import (
    MlpBlock,
    PatchEmbed,
    PatchMerge,
    QkvBias,
    TransformerBlock,
    WeightInit,
    initialize_linears,
    patches_to_map,
)
from itpn.models.position import (
    Grid,
    Resample,
    relative_position_index,
    resample_position_table,
    same_grid,
    sincos_position_table,
)
from itpn.models.recompute import run_block
from itpn.models.windows import Windows, pick_distinct, put_back, take

GlobalPool = Literal["avg", "max", "avgmax", ""]


class HiViT(Backbone):
    """Hierarchical vision transformer with three stages of strides 4, 8 and 16 (for patch size 16).

    It follows timm's conventions for models. Images [B, in_chans, H, W] may have any height and width that are
    multiples of the patch size; the position tables, made for ``img_size``, are resampled.

    Args:
        img_size: image size in pixels (or height and width) that the position table is made for.
        patch_size: pixels of a patch's side, divisible by 4.
        global_pool: how the classifier pools tokens, as in timm: mean, maximum, half the sum of both, or none
            (``""``: logits of each token).
        embed_dim: channels C of stage 3; stages 1 and 2 have C/4 and C/2.
        depths: blocks per stage.
        num_heads: attention heads of stage 3.
        mlp_ratios: hidden width of the feed-forward layers over their input width, per stage.
        qkv_bias: in stage 3; ``"qv"`` leaves it out of the keys (Fast-iTPN).
        patch_norm: a norm after the patch embedding (not in Fast-iTPN).
        merge: how tokens are merged between stages, see :class:`PatchMerge` (``"conv"`` in Fast-iTPN).
        sub_norm: a norm inside each feed-forward layer (Fast-iTPN).
        swiglu: gated feed-forward layers in stage 3 (Fast-iTPN).
        pos_embed: ``"fixed"`` keeps the table as it is initialized or loaded, ``"learned"`` trains it.
        pos_resample: ``"exact"``, or ``"legacy"`` for the public code's resampling (see
            :func:`resample_position_table`), which with masked patches resamples at native size too.
        rel_pos_bias: a relative position bias in each stage 3 block: a table, or ``"decomposed"`` into rows and
            columns (see :class:`itpn.models.layers.Attention`).
        rel_pos_size: image size that the relative tables are made for; None for ``img_size``.
        init_values: initial layer scale, None for no layer scale.
        layer_scale_stages: the stages that have it (only stage 3 in Fast-iTPN).
        migrate_ratio: fraction of the tokens that skip the last blocks of stage 3 (token migration).
        migrate_from: the first block that they skip; None for the middle of the stage.
        gather_window: attention inside windows of this many patches a side, with gathering tokens that connect them.
            0 for global attention. Images of a single window, and images whose masked patches are dropped, get global
            attention too.
        gather_side: its square is the number of gathering tokens in a window.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 over all blocks.
        norm_eps: 1e-6 in pre-training; the public plain HiViT has 1e-5.
        fc_norm: a norm between mean and classifier; mmpretrain's HiViT has none.
        weight_init: ``"xavier"`` (Xavier uniform linears, sine-cosine positions; pixel pre-training) or
            ``"trunc_normal"`` (std 0.02, output projections of block i divided by sqrt(2 i)).

    Raises:
        ValueError: the sizes do not fit one another.
    """

    def __init__(  # long, as timm's: one parameter for each option of a published network
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        embed_dim: int = 512,
        depths: Sequence[int] = (4, 4, 24),
        num_heads: int = 8,
        mlp_ratios: Sequence[float] = (3.0, 3.0, 4.0),
        qkv_bias: QkvBias = True,
        patch_norm: bool = True,
        merge: Literal["linear", "conv"] = "linear",
        sub_norm: bool = False,
        swiglu: bool = False,
        pos_embed: Literal["fixed", "learned"] = "learned",
        pos_resample: Resample = "exact",
        rel_pos_bias: bool | Literal["decomposed"] = False,
        rel_pos_size: int | tuple[int, int] | None = None,
        init_values: float | None = None,
        layer_scale_stages: Sequence[int] = (1, 2, 3),
        migrate_ratio: float = 0.0,
        migrate_from: int | None = None,
        gather_window: int = 0,
        gather_side: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        fc_norm: bool = True,
        weight_init: WeightInit = "trunc_normal",
    ) -> None:
        super().__init__()
        check_sizes(patch_size, in_chans, num_classes, embed_dim, num_heads)
        check_token_reduction(depths[2], migrate_ratio, migrate_from, gather_window, gather_side, bool(rel_pos_bias))
        check_pooling(global_pool)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool: GlobalPool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.depths = tuple(depths)
        self.pos_resample = pos_resample
        self.migrate_ratio = migrate_ratio
        self.migrate_from = depths[2] // 2 if migrate_from is None else migrate_from
        self.gather_window = gather_window
        self.gather_side = gather_side
        self.grid_size = self.grid_of(to_2tuple(img_size))
        self.rel_pos_grid = self.grid_of(to_2tuple(rel_pos_size or img_size)) if rel_pos_bias else None

        dims = (embed_dim // 4, embed_dim // 2, embed_dim)
        self.patch_embed = PatchEmbed(patch_size, in_chans, dims[0], norm_eps if patch_norm else None)
        self.pos_embed = nn.Parameter(
            sincos_position_table(self.grid_size, embed_dim), requires_grad=pos_embed == "learned"
        )
        attention: dict[str, Any] = {
            "qkv_bias": qkv_bias,
            "rel_pos_grid": self.rel_pos_grid,
            "decomposed": rel_pos_bias == "decomposed",
            "swiglu": swiglu,
        }
        blocks: list[Any] = [MlpBlock, MlpBlock, partial(TransformerBlock, num_heads=num_heads, **attention)]
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.stages: Any = nn.ModuleList()  # Any: type checkers do not know that it holds ModuleLists
        for i, (block, dim, depth, ratio) in enumerate(zip(blocks, dims, depths, mlp_ratios, strict=True), start=1):
            scale = init_values if i in layer_scale_stages else None
            options = {"mlp_ratio": ratio, "init_values": scale, "norm_eps": norm_eps, "sub_norm": sub_norm}
            self.stages.append(nn.ModuleList(block(dim, drop_path=next(rates), **options) for _ in range(depth)))
        self.merges = nn.ModuleList([PatchMerge(dim, norm_eps, merge) for dim in dims[:2]])
        self.rel_pos_index: Tensor
        self.register_buffer(
            "rel_pos_index", relative_position_index(self.rel_pos_grid or self.grid_size), persistent=False
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": max(patch_size // 4, 1) * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]
        # mean over tokens, then norm, as in the fine-tuned weights
        self.has_fc_norm = fc_norm
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if num_classes and fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.norm_eps = norm_eps
        self.init_weights(weight_init)

    def init_weights(self, how: WeightInit) -> None:
        initialize_linears(self, how)
        # a convolution over disjoint patches is a linear layer
        fan = self.patch_embed.proj.weight.flatten(1)
        nn.init.xavier_uniform_(fan) if how == "xavier" else trunc_normal_(fan, std=0.02)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]  # always made with a bias
        if how == "trunc_normal":
            if self.pos_embed.requires_grad:
                trunc_normal_(self.pos_embed, std=0.02)
            blocks = [block for stage in self.stages for block in stage]
            for i, block in enumerate(blocks, start=1):
                layers = [block.mlp.fc2] + ([block.attn.proj] if isinstance(block, TransformerBlock) else [])
                for layer in layers:
                    layer.weight.data /= (2 * i) ** 0.5
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)

    # --- timm's conventions

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no file holds, after a construction on the meta device (transformers calls it)."""
        self.rel_pos_index.copy_(relative_position_index(self.rel_pos_grid or self.grid_size))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates: stem, each block, classifier; a merge belongs to the block before."""
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.(\d+)", None), (r"^merges\.(\d+)", (99999,)), (r"^fc_norm", (99999,))],
        }

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Set a new classifier, or none for 0 classes.

        Raises:
            ValueError: there is no such pooling.
        """
        if global_pool is not None:
            check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        stem = self.patch_embed.proj.weight
        kwargs: dict[str, Any] = {"device": stem.device, "dtype": stem.dtype}
        if num_classes and self.has_fc_norm and isinstance(self.fc_norm, nn.Identity):
            self.fc_norm = nn.LayerNorm(self.num_features, eps=self.norm_eps, **kwargs)
        self.head = nn.Linear(self.num_features, num_classes, **kwargs) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        for part in (self.fc_norm, self.head):  # new ones would be in training
            part.train(self.training)

    # --- forward

    @property
    def fixed_size(self) -> bool:
        return bool(self.migrate_ratio or self.gather_window)  # they count tokens and windows

    def forward_stages(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        tap: int | None = None,
        last: int = 2,
    ) -> list[Tensor]:
        """See :class:`Backbone`; outputs of stages 1 and 2 are those before the merges. ``last`` is the last to run."""
        grid = self.grid_of(images.shape[-2:])
        x = self.patch_embed(images, visible)  # [B, V, 4, 4, C/4]
        outputs = []
        for i, stage in enumerate(self.stages[:2]):
            for block in stage:
                x = run_block(block, self.grad_checkpointing, x)
            outputs.append(x)
            if i == last:
                return outputs
            x = self.merges[i](x)  # [B, V, 2, 2, C/2], then [B, V, 1, 1, C]
        x = x.flatten(1, 3)  # [B, V, C]
        if mask is not None:
            assert mask_token is not None
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)  # [B, N, C]
        x = x + self._positions(grid, visible)
        x, *tapped = self._run_stage3(x, grid, visible, tap)  # [B, V, C] each
        return [*outputs, x[:, :, None, None], *tapped]

    def _run_stage3(self, x: Tensor, grid: Grid, visible: Tensor | None, tap: int | None) -> list[Tensor]:
        """Stage 3 on tokens [B, V, C]: its output and, if ``tap`` is given, that of block ``tap``, [B, V, C] each."""
        index = self.relative_positions(grid, visible)
        windows, gathering = None, 0
        if self.gather_window and visible is None and max(grid) > self.gather_window:
            x, windows = Windows(grid, self.gather_window, self.gather_side).cut(x)  # [B * W, T + G, C]
            gathering = windows.gathering  # without windows W = 1, T = V and G = 0
        before, picked = x, None  # the tokens before some of them migrate, and which stay

        def restore(x: Tensor) -> Tensor:
            x = x[:, : x.shape[1] - gathering]  # [B * W, kept of T, C]
            if picked is not None:
                x = put_back(before, picked, x)  # [B * W, T, C]
            return x if windows is None else windows.join(x)  # [B, V, C]

        tapped = []
        for i, block in enumerate(self.stages[2]):
            if self.migrate_ratio and i == self.migrate_from:
                before, gathered = x.tensor_split([x.shape[1] - gathering], dim=1)
                # sizes are tensors in a trace, and round() does not take tensors
                tokens = int(before.shape[1]) if torch.jit.is_tracing() else before.shape[1]
                keep = max(1, round(tokens * (1 - self.migrate_ratio)))
                picked = pick_distinct(before, keep, None if windows is None else windows.real)
                x = torch.cat([take(before, picked), gathered], dim=1)  # [B * W, keep + G, C]
                if windows is not None:
                    windows = windows.pick(picked)
                if index is not None:
                    index = self.relative_positions(grid, picked if visible is None else visible.gather(1, picked))
            x = run_block(block, self.grad_checkpointing, x, grid, index, windows)
            if i == tap:
                tapped.append(restore(x))
        return [restore(x), *tapped]

    def _positions(self, grid: Grid, visible: Tensor | None) -> Tensor:
        """Position embedding of all patches [1, N, C], or of the visible ones [B, V, C]."""
        # the public code takes fewer tokens than stored for another grid, so it resamples whenever patches are dropped
        legacy = self.pos_resample == "legacy" and (visible is not None or not same_grid(self.grid_size, grid))
        table = resample_position_table(self.pos_embed, self.grid_size, grid, "legacy" if legacy else "exact")
        return table if visible is None else table[0, visible]  # [1, N, C] or [B, V, C]

    def relative_positions(self, grid: Grid, visible: Tensor | None) -> Tensor | None:
        if self.rel_pos_grid is None:
            return None
        index = self.rel_pos_index
        if not same_grid(self.rel_pos_grid, grid):
            index = relative_position_index(grid).to(self.pos_embed.device)
        if visible is None:
            return index  # [N, N]
        return index[visible.unsqueeze(2), visible.unsqueeze(1)]  # [B, V, V]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps of the stages, as timm's models return them.

        Returns:
            Maps [B, C/4, H/4, W/4], [B, C/2, H/8, W/8], [B, C, H/16, W/16] for ``indices`` (all three by default),
            before the merges and without a norm. Unless ``intermediates_only``, the last stage's tokens [B, N, C] come
            first.
        """
        check_intermediates(norm, output_fmt)
        take, last = feature_take_indices(len(self.stages), indices)
        end = len(self.stages) - 1
        stages = self.forward_stages(x, last=last if intermediates_only and stop_early else end)
        grid = self.grid_of(x.shape[-2:])
        maps = [patches_to_map(stages[i], grid) for i in take]
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        return maps if intermediates_only else (self._tokens(stages[-1], grid), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of ``indices`` and what only they use, and the classifier."""
        take, last = feature_take_indices(3, indices)
        self.stages = self.stages[: last + 1]
        self.merges = self.merges[:last]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if last < 2:
            self.pos_embed = None  # type: ignore[assignment]  # added before stage 3
        if prune_norm or prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> stage 3 tokens [B, N, C], row-major, without a norm.

        Of a pruned network, the tokens of the last stage that is left.
        """
        stages = self.forward_stages(x, last=len(self.stages) - 1)
        return self._tokens(stages[-1], self.grid_of(x.shape[-2:]))

    def _tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """The output of the last stage [B, N, h, w, C'] as tokens [B, N * h * w, C'], row-major in the image."""
        if len(self.stages) == 3:  # a token is a patch
            return x.flatten(1, 3)
        return patches_to_map(x, grid).flatten(2).transpose(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, C] -> logits [B, num_classes] by pooling, norm and a linear layer.

        With ``pre_logits``, the input of the linear layer. Without a pooling, logits of each token [B, N, num_classes].
        """
        x = self.head_drop(self.fc_norm(global_pool_nlc(x, self.global_pool, num_prefix_tokens=0)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def check_sizes(patch_size: int, in_chans: int, num_classes: int, embed_dim: int, num_heads: int) -> None:
    """Raise ValueError for sizes that do not fit one another."""
    if patch_size % 4:
        raise ValueError(f"patch_size must be divisible by 4 (a patch holds 4x4 tokens), not {patch_size}")
    if num_heads < 1 or embed_dim % 8 or embed_dim % num_heads:
        raise ValueError(f"embed_dim must be divisible by 8 and by num_heads={num_heads}, not {embed_dim}")
    if in_chans < 1 or num_classes < 0:
        raise ValueError(f"in_chans={in_chans} must be above 0 and num_classes={num_classes} at least 0")


def check_token_reduction(
    depth: int, migrate_ratio: float, migrate_from: int | None, gather_window: int, gather_side: int, rel_pos_bias: bool
) -> None:
    """Raise ValueError for settings of token migration and gathering that a stage 3 of so many blocks cannot have."""
    if not 0 <= migrate_ratio < 1:
        raise ValueError(f"migrate_ratio must be at least 0 and below 1, not {migrate_ratio}")
    if migrate_from is not None and not 0 <= migrate_from < depth:
        raise ValueError(f"migrate_from must be one of the {depth} blocks of stage 3, not {migrate_from}")
    if gather_window < 0 or gather_side < 1 or gather_window % gather_side:
        raise ValueError(
            f"gather_window must be at least 0 and divisible by gather_side, which is at least 1, not "
            f"{gather_window} and {gather_side}"
        )
    if gather_window and rel_pos_bias:
        raise ValueError("gathering tokens have no relative position: use gather_window without rel_pos_bias")


def check_pooling(global_pool: Any) -> None:
    """Raise ValueError for a pooling that the classifier does not have."""
    known = get_args(GlobalPool)
    if global_pool not in known:
        raise ValueError(f"global_pool must be one of {', '.join(map(repr, known))}, not {global_pool!r}")
