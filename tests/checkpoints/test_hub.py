"""Repositories in timm's layout: what we write, we and plain timm read."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.hub import from_pretrained, push_to_hub, save_pretrained
from itpn.errors import UserError
from itpn.models.hivit import HiViT
from itpn.models.position import resample_position_table

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def outputs(model: torch.nn.Module, images: torch.Tensor = IMAGES) -> list[torch.Tensor]:
    with torch.no_grad():
        result = model.eval()(images)
    return list(result.values()) if isinstance(result, dict) else [result]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("itpn_nano", {}),
        ("itpn_nano", {"img_size": (64, 96), "patch_size": 8, "num_classes": 7, "init_values": 0.1}),
        ("itpn_nano", {"embed_dim": 64, "depths": (2, 1, 2), "num_heads": 2, "rel_pos_bias": "decomposed"}),
        ("itpn_nano", {"rel_pos_bias": True, "rel_pos_size": 96, "img_size": (64, 32), "num_classes": 3}),
        ("fast_itpn_nano", {"in_chans": 5, "global_pool": "", "num_classes": 0, "migrate_ratio": 0.5}),
        ("fast_itpn_nano", {"gather_window": 2, "drop_path_rate": 0.2, "fc_norm": False}),
        ("itpn_nano_pyramid", {"levels": "detection", "pyramid_width": 48, "pyramid_depth": 2}),
        ("fast_itpn_nano_pyramid", {"levels": "segmentation", "init_values": 1e-2, "img_size": 64}),
    ],
)
def test_what_is_saved_is_loaded_by_us_and_by_timm(tmp_path, name, arguments):
    model = timm.create_model(name, **arguments)
    for parameter in model.parameters():  # tables and layer scales too
        torch.nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, arguments.get("in_chans", 3), 64, 96)
    expected = outputs(model, images)
    save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for loaded in (from_pretrained(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True)):
        assert type(loaded) is type(model)
        for ours, theirs in zip(expected, outputs(loaded, images), strict=True):
            assert torch.equal(ours, theirs)
    # and what was loaded can be saved again
    save_pretrained(loaded, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


def test_labels_and_preprocessing_are_kept(tmp_path):
    model = timm.create_model("itpn_nano", num_classes=2, img_size=64)
    save_pretrained(model, tmp_path, label_names=["cat", "dog"], preprocessing={"mean": (0.5, 0.5, 0.5)})
    loaded = from_pretrained(tmp_path)
    assert loaded.pretrained_cfg["label_names"] == ["cat", "dog"]
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data["mean"]) == (0.5, 0.5, 0.5)
    assert tuple(data["std"]) == (0.229, 0.224, 0.225)
    assert tuple(data["input_size"]) == (3, 64, 64)
    save_pretrained(loaded, tmp_path / "again")
    assert from_pretrained(tmp_path / "again").pretrained_cfg["label_names"] == ["cat", "dog"]
    loaded.reset_classifier(3)
    save_pretrained(loaded, tmp_path / "other")
    other = from_pretrained(tmp_path / "other")
    assert other.pretrained_cfg.get("label_names") is None
    assert other.num_classes == 3
    config = json.loads((tmp_path / "config.json").read_text())
    config["label_names"] = {"0": "cat", "7": "dog"}  # timm allows it
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(tmp_path).preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert "classes" not in read_checkpoint(tmp_path).metadata
    config["pretrained_cfg"]["mean"] = "grey"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json has corrupt metadata \(the mean of its preprocessing"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="1 label_names for 2 classes"):
        save_pretrained(model, tmp_path, label_names=["cat"])
    with pytest.raises(UserError, match="no size; it may have mean, std"):
        save_pretrained(model, tmp_path, preprocessing={"size": 64})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64])
def test_weights_of_another_kind_of_numbers_are_refused(tmp_path, dtype):
    save_pretrained(timm.create_model("itpn_nano", img_size=64), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["fc_norm.weight"] = torch.ones(128, dtype=dtype)
    try:
        save_file(tensors, tmp_path / "model.safetensors")
    except KeyError:  # as older versions of safetensors say that they store no complex numbers
        assert dtype.is_complex
        return
    with pytest.raises(UserError, match=f"norm.weight is {str(dtype).removeprefix('torch.')}, not float"):
        from_pretrained(tmp_path)


def test_loading_adapts_as_timm_does(tmp_path):
    model = timm.create_model("itpn_nano", img_size=(64, 32), patch_size=8, num_classes=4).eval()
    save_pretrained(model, tmp_path)
    # 8x4 patches to 4x8: as many entries, and not the same table
    turned = from_pretrained(tmp_path, img_size=(32, 64))
    torch.testing.assert_close(turned.pos_embed, resample_position_table(model.pos_embed, (8, 4), (4, 8)))
    images = torch.randn(1, 3, 64, 32)
    gray = from_pretrained(tmp_path, in_chans=1)
    total = model.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(gray.patch_embed.proj.weight, total)
    new = from_pretrained(tmp_path, num_classes=9)
    assert new(images).shape == (1, 9)
    save_pretrained(model, tmp_path / "named", label_names=list("abcd"))
    assert from_pretrained(tmp_path / "named", num_classes=9).pretrained_cfg.get("label_names") is None
    assert torch.equal(new.forward_features(images), model.forward_features(images))
    maps = from_pretrained(tmp_path, features_only=True)(images)
    assert torch.equal(maps[2], model.forward_intermediates(images, intermediates_only=True)[2])
    # a backbone alone, to be fine-tuned
    model.reset_classifier(0)
    model.fc_norm = torch.nn.Identity()
    save_pretrained(model, tmp_path / "bare")
    assert from_pretrained(tmp_path / "bare", num_classes=5)(images).shape == (1, 5)


def test_any_memory_format_and_no_trace_of_where_weights_came_from(tmp_path):
    source = timm.create_model("itpn_nano", num_classes=0)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    overlay = {"file": str(tmp_path / "weights.pt"), "num_classes": 0}
    model = timm.create_model("itpn_nano", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    model = model.to(memory_format=torch.channels_last)
    save_pretrained(model, tmp_path / "saved")
    assert not model.patch_embed.proj.weight.is_contiguous()  # the model itself stays as it is
    assert torch.equal(outputs(from_pretrained(tmp_path / "saved"))[0], outputs(source)[0])
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert str(tmp_path) not in json.dumps(config)
    assert config["architecture"] == "itpn_nano"


def test_models_that_cannot_be_saved(tmp_path):
    wrapper = timm.create_model("itpn_nano", features_only=True)
    for model in (HiViT(64, embed_dim=32, depths=(1, 1, 1), num_heads=2), torch.nn.Linear(1, 1), wrapper):
        with pytest.raises(UserError, match=r"made by timm\.create_model.*" + type(model).__name__):
            save_pretrained(model, tmp_path)
    pruned = timm.create_model("itpn_nano", num_classes=0)
    pruned.prune_intermediate_layers([1])
    with pytest.raises(UserError, match=r"was changed after timm\.create_model.*pos_embed"):
        save_pretrained(pruned, tmp_path)
    assert not list(tmp_path.iterdir())


def test_sources_that_are_no_repositories(tmp_path, monkeypatch):
    def message(source: object, **overrides: object) -> str:
        with pytest.raises(UserError) as caught:
            from_pretrained(source, **overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is no folder with a config.json" in message(tmp_path / "absent")
    save_pretrained(timm.create_model("itpn_nano", num_classes=0), tmp_path)
    assert "is [1, 196, 128] there, [1, 196, 64] in the model" in message(tmp_path, embed_dim=64)
    assert "colour" in message(tmp_path, colour=1)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert "SafetensorError" in message(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "No suitable checkpoints" in message(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "JSONDecodeError" in message(tmp_path)

    monkeypatch.setattr("itpn.checkpoints.hub.check_hub", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    assert message("hf-hub:nobody/nothing") == "no model could be made of hf-hub:nobody/nothing: OSError: no network"


class Hub:
    """Stands in for the client of the hub: keeps what is uploaded."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    broken = False

    def __init__(self, **_: object) -> None: ...

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> "Hub":
        if self.broken:
            raise ConnectionError("no network")
        self.repo_id = f"somebody/{repository}"  # the owner may be left out
        return self

    def file_exists(self, repository: str, name: str) -> bool:
        return name in self.files

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> "Hub":
        self.files.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        self.commit_url = f"https://hub/{repo_id}"
        return self


def test_pushing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "files", {})
    model = timm.create_model("itpn_nano_pyramid")
    assert push_to_hub(model, "hf-hub:nano") == "https://hub/somebody/nano"
    assert set(Hub.files) == {"config.json", "model.safetensors", "README.md"}
    assert b'"hf-hub:somebody/nano"' in Hub.files["README.md"]
    Hub.files["README.md"] = b"my own"
    push_to_hub(model, "nano")
    assert Hub.files["README.md"] == b"my own"
    for name, content in Hub.files.items():
        (tmp_path / name).write_bytes(content)
    for ours, theirs in zip(outputs(model), outputs(from_pretrained(tmp_path)), strict=True):
        assert torch.equal(ours, theirs)
    monkeypatch.setattr(Hub, "broken", True)
    with pytest.raises(UserError, match=r"nothing was uploaded to hf-hub:nano \(ConnectionError: no network\)"):
        push_to_hub(model, "nano")
