"""Token migration and gathering against the slow and obvious way: one token at a time, softmax by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.models.hivit import HiViT
from itpn.models.windows import Windows, pick_distinct

MIGRATE = {"migrate_ratio": 0.5, "migrate_from": 1}
GATHER = {"gather_window": 4, "gather_side": 2}
SETTINGS = {
    "off": {},
    "migrate": MIGRATE,
    "gather": GATHER,
    "one gathering token": {"gather_window": 3},
    "both": {**MIGRATE, **GATHER},
    "both, windows of three": {**MIGRATE, "gather_window": 3},
}
GRIDS = [(4, 8), (5, 7), (1, 5)]


def build(grid=(5, 7), fast=True, depths=(1, 1, 3), **settings) -> HiViT:
    torch.manual_seed(0)
    if fast:
        settings = {"qkv_bias": "qv", "patch_norm": False, "merge": "conv", "sub_norm": True, "swiglu": True} | settings
    size = (8 * grid[0], 8 * grid[1])
    model = HiViT(size, 8, num_classes=0, embed_dim=32, depths=depths, num_heads=2, init_values=0.5, **settings)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "bias" in name:  # initialized to all zeros or ones
            torch.nn.init.normal_(parameter, 0.5, 0.5)
        else:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.double().eval()


def draw(grid=(5, 7), batch=2) -> Tensor:
    return torch.randn(batch, 3, 8 * grid[0], 8 * grid[1], generator=torch.Generator().manual_seed(1)).double()


def tokens_of(model: HiViT, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """The input of stage 3, [B, V, C]."""
    x = model.merges[1](model.forward_stages(images, last=1)[1]).flatten(1, 3) + model.pos_embed
    return x if visible is None else x.gather(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def slow_stage(model: HiViT, x: Tensor, grid: tuple[int, int], patches: list[int] | None = None) -> list[Tensor]:
    """Tokens of one image [V, C], of all patches or some -> the tokens after each block."""
    side, windows = model.gather_window, [list(range(len(x)))]
    tokens: dict = dict(enumerate(x))
    gathering: list[list] = [[]]  # of each window
    own = side**2
    if side and patches is None and max(grid) > side:
        windows, gathering = [], []
        part = side // model.gather_side
        for top in range(0, grid[0], side):
            for left in range(0, grid[1], side):
                corners = [(top + r, left + c) for r in range(0, side, part) for c in range(0, side, part)]
                gathering.append([])
                for corner in corners:
                    members = inside(corner, part, grid)
                    if members:
                        tokens[corner] = x[members].mean(dim=0)
                        gathering[-1].append(corner)
                windows.append(inside((top, left), side, grid))
    else:
        own = len(x)
    outputs = []
    for i, block in enumerate(model.stages[2]):
        if model.migrate_ratio and i == model.migrate_from:
            for window in windows:
                mean = torch.stack([tokens[t] for t in window]).mean(dim=0)
                window.sort(key=lambda t: F.cosine_similarity(tokens[t], mean, dim=0))
                del window[max(1, round(own * (1 - model.migrate_ratio))) :]
        everywhere = [t for some in gathering for t in some]
        new = {}
        for window, some in zip(windows, gathering, strict=True):
            for query in window + some:
                new[query] = tokens[query] + block.ls1(
                    attend(model, block, tokens, query, window + everywhere, patches)
                )
        tokens.update(new)
        tokens.update({t: x + block.ls2(block.mlp(block.norm2(x))) for t, x in new.items()})
        outputs.append(torch.stack([tokens[t] for t in range(len(x))]))
    return outputs


def inside(corner: tuple[int, int], side: int, grid: tuple[int, int]) -> list[int]:
    """Patches of a square that lie inside the grid."""
    rows, cols = (range(start, min(start + side, end)) for start, end in zip(corner, grid, strict=True))
    return [row * grid[1] + col for row in rows for col in cols]


def attend(model, block, tokens, query, keys, patches) -> Tensor:
    attn, dim = block.attn, model.embed_dim
    w_q, w_k, w_v = attn.qkv.weight.split(dim)
    b_q, b_k, b_v = attn.qkv.bias.split(dim) if attn.q_bias is None else (attn.q_bias, 0, attn.v_bias)
    result = []
    x, others = block.norm1(tokens[query]), block.norm1(torch.stack([tokens[key] for key in keys]))
    all_q, all_k, all_v = w_q @ x + b_q, others @ w_k.T + b_k, others @ w_v.T + b_v
    for head in range(attn.num_heads):
        s = slice(head * dim // attn.num_heads, (head + 1) * dim // attn.num_heads)
        q, k, v = all_q[s], all_k[:, s], all_v[:, s]
        scores = k @ q * len(q) ** -0.5
        if model.rel_pos_grid is not None:
            index = model.rel_pos_index
            places = [key if patches is None else patches[key] for key in [query, *keys]]
            scores = scores + attn.relative_position_bias_table[index[places[0], places[1:]], head]
        weight = scores.exp() / scores.exp().sum()
        result.append(weight @ v)
    return attn.proj(torch.cat(result))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_the_slow_way(name, grid):
    """Padded windows, non-square grids, one and four gathering tokens; and every block's output for a second head."""
    model, images = build(grid, **SETTINGS[name]), draw(grid)
    slow = [slow_stage(model, x, grid) for x in tokens_of(model, images)]
    for tap in range(3):
        *_, whole, tapped = model.forward_stages(images, tap=tap)
        torch.testing.assert_close(tapped, torch.stack([outputs[tap] for outputs in slow]))
    torch.testing.assert_close(whole.flatten(1, 3), tapped, atol=0, rtol=0)


@pytest.mark.parametrize("settings", [{"rel_pos_bias": True}, {"rel_pos_bias": True, "fast": False}, {**GATHER}])
@pytest.mark.parametrize("dropped", [False, True])
@torch.no_grad()
def test_migration_with_relative_positions_and_masked_patches(settings, dropped):
    """Gathering is off for images whose masked patches are dropped."""
    grid = (5, 7) if dropped or "rel_pos_bias" in settings else (4, 4)
    model, images = build(grid, **MIGRATE, **settings), draw(grid)
    visible = torch.stack([torch.randperm(35)[:11] for _ in images]) if dropped else None
    fast = model.forward_stages(images, visible)[2].flatten(1, 3)
    for i, x in enumerate(tokens_of(model, images, visible)):
        patches = None if visible is None else visible[i].tolist()
        torch.testing.assert_close(fast[i], slow_stage(model, x, grid, patches)[-1])


def test_gathering_refuses_relative_positions():
    with pytest.raises(ValueError, match="no relative position"):
        build(rel_pos_bias=True, gather_window=4)
    with pytest.raises(ValueError, match="divisible by gather_side"):
        build(gather_window=7, gather_side=2)
    with pytest.raises(ValueError, match="migrate_ratio"):
        build(migrate_ratio=1.0)
    for settings in ({"migrate_from": 3}, {"migrate_from": -1}, {"gather_window": -1}, {"gather_side": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            build(**settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gather_window": 7}, {"gather_window": 8, "gather_side": 2}],
)
@torch.no_grad()
def test_switched_off_changes_no_bit(settings):
    """Windows as large as the image are off too."""
    model, images = build(**settings), draw()
    x = tokens_of(model, images)
    for block in model.stages[2]:
        x = block(x)
    assert torch.equal(model.forward_features(images), x)


@pytest.mark.parametrize("gather", [{}, GATHER])
@torch.no_grad()
def test_migrated_tokens_come_back_unchanged(gather):
    model, images = build(**MIGRATE, **gather), draw()
    *_, last, before = model.forward_stages(images, tap=0)
    same = (last.flatten(1, 3) == before).all(dim=2)
    kept = max(1, round((16 if gather else 35) * 0.5))
    # windows of 4x4 patches on 5x7: four of them, with 16, 12, 4 and 3 real patches
    skipped = sum(max(0, patches - kept) for patches in ((16, 12, 4, 3) if gather else (35,)))
    assert same.sum(dim=1).tolist() == [skipped, skipped]
    if not gather:  # those with the lowest similarity to the mean were kept
        similarity = F.cosine_similarity(before, before.mean(dim=1, keepdim=True), dim=2)
        assert (similarity.masked_fill(same, -1).amax(1) < similarity.masked_fill(~same, 1).amin(1)).all()


@pytest.mark.parametrize("settings", [{"gather_window": 3}, GATHER, {**MIGRATE, **GATHER}])
@torch.no_grad()
def test_padding_changes_nothing(settings, monkeypatch):
    model, images = build(**settings), draw()
    expected = model.forward_features(images)
    cut, changed = Windows.cut, []

    def cut_with_noise(self, x):
        tokens, windows = cut(self, x)
        padding = F.pad(~windows.real, (0, windows.gathering))  # gathering tokens of nothing but padding
        padding[:, -windows.gathering :] = ~windows.mask[:: windows.count, 0, 0, windows.real.shape[1] :].reshape(
            -1, windows.gathering
        )
        changed.append(int(padding.sum()))
        return torch.where(padding.unsqueeze(-1), 100 * torch.randn_like(tokens), tokens), windows

    monkeypatch.setattr(Windows, "cut", cut_with_noise)
    torch.testing.assert_close(model.forward_features(images), expected, atol=0, rtol=0)
    assert changed[0] > 0


@pytest.mark.parametrize("name", list(SETTINGS)[1:])
def test_gradients(name):
    """Finite and not zero for every token and every weight; recomputed activations give the same."""
    gradients = []
    for recompute in (False, True):
        model, images = build(**SETTINGS[name]).train(), draw().requires_grad_()
        model.set_grad_checkpointing(recompute)
        outputs = model.forward_stages(images, tap=1)
        sum(x.square().mean() for x in outputs).backward()
        gradients.append({"images": images.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name
    per_patch = gradients[0]["images"].reshape(2, 3, 5, 8, 7, 8).abs().sum(dim=(1, 3, 5))
    assert (per_patch > 0).all()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gathering_tokens_connect_windows():
    """In one block from any patch to any other, because a gathering token starts as the mean of its patches."""
    model, images = build(**GATHER), draw(batch=1).requires_grad_()
    first = model.forward_stages(images, tap=0)[-1]
    (gradient,) = torch.autograd.grad(first[0, 0].sum(), images)
    assert (gradient.reshape(3, 5, 8, 7, 8).abs().sum(dim=(0, 2, 4)) > 0).all()


@pytest.mark.compile
def test_compiles_in_one_graph():
    results = []
    for compiled in (False, True):
        model, images = build(depths=(1, 1, 2), **SETTINGS["both"]).train(), draw().requires_grad_()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        output = forward(images)
        output.square().mean().backward()
        results.append((output, images.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, images = build(**SETTINGS["both"]).float(), draw().float()
    expected = model(images)
    with torch.autocast("cpu", dtype):
        output = model(images)
    output.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert F.cosine_similarity(output.float(), expected, dim=1).min() > 0.99


def test_picking_by_hand():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [-1.0, 0.5], [1.0, 0.2]]])
    assert pick_distinct(x, 2).tolist() == [[1, 3]]
    assert pick_distinct(x, 5).tolist() == [[0, 1, 2, 3, 4]]
    real = torch.tensor([[True, True, True, False, False]])
    assert pick_distinct(x, 1, real).tolist() == [[1]]
    assert set(pick_distinct(x, 4, real)[0].tolist()) >= {0, 1, 2}  # padding only after all others
