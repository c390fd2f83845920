"""A backbone of another architecture is pre-trained, stored, fine-tuned and given heads like HiViT."""

import itertools
import json
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import itpn
from itpn.checkpoints.files import named_tensors
from itpn.checkpoints.io import write_safetensors
from itpn.errors import UserError
from itpn.masked.masked_model import MaskedImageModel
from itpn.models.backbone import Backbone
from itpn.models.build import KINDS, build
from itpn.models.layers import MlpBlock, PatchEmbed, PatchMerge, WeightInit, initialize_linears
from itpn.models.recompute import run_block
from itpn.models.spec import NetworkSpec
from itpn.tasks.configs import ClassificationConfig, ClassificationDataConfig, ClassificationModelConfig
from itpn.tasks.run import train


class Mixer(Backbone):
    """Feed-forward blocks; in stage 3 each patch also gets the mean of all patches."""

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 32,
        depths: Sequence[int] = (1, 1, 2),
        num_heads: int = 1,
        drop_path_rate: float = 0.0,
        pos_embed: Literal["fixed", "learned"] = "learned",  # there is no table
        weight_init: WeightInit = "xavier",
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.patch_size = in_chans, num_classes, patch_size
        self.embed_dim, self.depths, self.num_heads, self.norm_eps = embed_dim, tuple(depths), num_heads, 1e-6
        self.grid_size = self.grid_of(img_size)
        dims = (embed_dim // 4, embed_dim // 2, embed_dim)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size // 4 * 2**i, "module": f"levels.{i}"} for i, dim in enumerate(dims)
        ]
        self.embed = PatchEmbed(patch_size, in_chans, dims[0], 1e-6)
        levels = [[MlpBlock(dim, 2, drop_path_rate) for _ in range(n)] for dim, n in zip(dims, depths, strict=True)]
        self.levels = nn.ModuleList(map(nn.ModuleList, levels))
        self.downs = nn.ModuleList([PatchMerge(dim, 1e-6) for dim in dims[:2]])
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        initialize_linears(self, weight_init)

    def forward_stages(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        tap: int | None = None,
    ) -> list[Tensor]:
        x, outputs, tapped = self.embed(images, visible), [], []
        for i, level in enumerate(self.levels):
            x = self.downs[i - 1](x) if i else x
            if i == 2 and mask is not None:
                x = torch.where(mask[:, :, None, None, None], mask_token, x)
            for number, block in enumerate(level):
                x = run_block(block, self.grad_checkpointing, x)
                x = x + x.mean(dim=1, keepdim=True) if i == 2 else x
                tapped += [x.flatten(1, 3)] if i == 2 and number == tap else []
            outputs.append(x)
        return [*outputs, *tapped]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^embed", "blocks": [(r"^levels\.(\d+)\.(\d+)", None), (r"^downs\.(\d+)", (99999,))]}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_stages(x)[-1].mean(dim=(1, 2, 3)))


@pytest.fixture(autouse=True)
def mixer(monkeypatch):
    monkeypatch.setitem(KINDS, "mixer", Mixer)


# recipes set every option of HiViT; these are off
BACKBONE = {"kind": "mixer", "img_size": (64, 64), "embed_dim": 32, "depths": (1, 1, 2), "num_heads": 1}
BACKBONE |= {"patch_size": 16, "in_chans": 3, "migrate_ratio": 0.0, "gather_side": 1, "weight_init": "xavier"}
DECODER = {"heads": {"pixel": 3 * 16**2}, "width": 32, "depth": 1, "num_heads": 2}


def make_spec(masked_patches: str = "dropped", **backbone: Any) -> NetworkSpec:
    drops = masked_patches == "dropped"
    options = {
        "decoder": {**DECODER, "add_mask_tokens": drops},
        "auxiliary": {"out_dim": 8, "add_mask_tokens": drops},
        "objective": {"weights": {"pixel": 1.0, "auxiliary": 1.0}, "masked_patches": masked_patches},
    }
    return NetworkSpec({**BACKBONE, **backbone}, {"width": 16, "depth": 1}, head="pretraining", options=options)


def learn(model: nn.Module, loss_of: Any, steps: int = 5) -> list[float]:
    """Losses of some steps, in which every parameter of the backbone gets a gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    return losses


@pytest.mark.parametrize("masked_patches", ["dropped", "mask_token"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_pre_training_then_fine_tuning(tmp_path, masked_patches, checkpointing):
    torch.manual_seed(0)
    images, labels = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    spec = make_spec(masked_patches)
    model = build(spec)
    assert isinstance(model, MaskedImageModel)
    model.set_grad_checkpointing(checkpointing)
    mask = model.draw_mask(4, (4, 4))
    target = torch.rand(4, 16, 8)
    losses = learn(model.train(), lambda: model(images, mask, {"auxiliary": target}).loss)
    assert losses[-1] < losses[0]

    file = tmp_path / "model.safetensors"
    write_safetensors(file, named_tensors(model), {"network": spec.to_dict()})
    with pytest.warns(UserWarning, match="has no classifier"):
        classifier = itpn.load(file, task="classification", num_classes=3, strict=False)
    assert isinstance(classifier, Mixer)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(classifier.state_dict()[name], tensor), name
    losses = learn(classifier.train(), lambda: F.cross_entropy(classifier(images), labels))
    assert losses[-1] < losses[0]


def test_linear_probe(tmp_path):
    """It has no norm before its classifier to take away, and its file can be loaded."""
    torch.manual_seed(0)
    for i, (place, name) in enumerate(itertools.product(("train", "val"), ("dark", "light"))):
        (tmp_path / place / name).mkdir(parents=True)
        colours = torch.full((8, 48, 48, 3), 60 + 120 * (i % 2)) + torch.randint(0, 20, (8, 48, 48, 3))
        for number, image in enumerate(colours):
            Image.fromarray(image.to(torch.uint8).numpy()).save(tmp_path / place / name / f"{number}.png")
    spec = make_spec()
    file = tmp_path / "model.safetensors"
    write_safetensors(file, named_tensors(build(spec)), {"network": spec.to_dict()})
    config = ClassificationConfig(
        model=ClassificationModelConfig(name=None, checkpoint=str(file), freeze=True, ema_decay=None),
        data=ClassificationDataConfig(root=(str(tmp_path),), img_size=64, batch_size=4, num_workers=0),
        output_dir=str(tmp_path / "runs"),
    )
    folder = train(config, "test")
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    model = itpn.load(folder / "model.safetensors")
    assert isinstance(model, Mixer)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 2)
    assert metrics["val_top1"] == 1.0


def test_a_pyramid_and_its_layers():
    model = build(NetworkSpec(BACKBONE, {"width": 16, "depth": 1}, "pooled"))
    assert [level.shape[-1] for level in model(torch.rand(1, 3, 64, 96)).values()] == [24, 12, 6, 3, 1]
    assert model.group_matcher()["blocks"][0] == (r"^backbone\.levels\.(\d+)\.(\d+)", None)


def test_an_option_that_it_does_not_have(tmp_path):
    with pytest.raises(TypeError, match="migrate_ratio"):
        build(make_spec(migrate_ratio=0.5))
    file = tmp_path / "model.safetensors"
    spec = NetworkSpec(BACKBONE)
    write_safetensors(file, named_tensors(build(spec)), {"network": spec.to_dict()})
    with pytest.raises(UserError, match="unexpected keyword argument 'rel_pos_bias'"):
        itpn.load(file, rel_pos_bias=True)
    write_safetensors(file, named_tensors(build(spec)), {"network": spec.with_backbone(kind="other").to_dict()})
    with pytest.raises(UserError, match="no kind of backbone 'other'; there are hivit, mixer"):
        itpn.load(file)
