"""Tasks as the loop trains them: a few steps of each, resuming, and how a batch reaches the GPU."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from photos import draw_photo
from PIL import Image

from itpn.data.augment import PretrainingTransform
from itpn.data.batches import collect, stack
from itpn.data.files import find_training_images
from itpn.data.loader import TrainingLoader
from itpn.models.build import build
from itpn.models.spec import NetworkSpec
from itpn.models.variants import BACKBONES
from itpn.system.console import Output
from itpn.tasks.classification.module import ClassificationModule
from itpn.tasks.configs import (
    ClassificationConfig,
    ClassificationDataConfig,
    ClassificationModelConfig,
    DetectionConfig,
    DetectionDataConfig,
    DetectionModelConfig,
    FineTuningConfig,
    OptimizerConfig,
    PretrainingConfig,
    PretrainingDataConfig,
    PretrainingModelConfig,
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationModelConfig,
    TeacherConfig,
)
from itpn.tasks.detection.module import DetectionModule
from itpn.tasks.pretraining.module import PretrainingModule
from itpn.tasks.pretraining.network import build_masked_model
from itpn.tasks.segmentation.module import SegmentationModule
from itpn.teachers.ema import EMATeacher
from itpn.teachers.timm_teacher import FeatureTeacher, FeatureTower
from itpn.training.checkpointing import collect_state, restore_state
from itpn.training.config import image_size
from itpn.training.data import copy_batch, read_batches
from itpn.training.launch import read_launch
from itpn.training.loop import set_up, take_step
from itpn.training.module import TrainingModule
from itpn.training.run_folder import RunFolder
from itpn.training.sharding import make_training_fabric
from itpn.training.state import Job, Training

SMALL = {"patch_size": 8, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2, "pyramid_head_width": 64}
FEATURES = {
    "pixel_weight": 0.0,
    "feature_weight": 1.0,
    "auxiliary_weight": 1.0,
    "feature_patches": "all",
    "masked_patches": "mask_token",
    "mask": "block",
    "mask_ratio": 0.4,
    "rel_pos_bias": True,
    "init_values": 0.1,
}
STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
LEARNING = {"lr": 1e-3, "layer_decay": 0.9, "layer_decay_over": None, "clip_grad": 1.0}


def pretraining(photos: Path, name: str = "itpn_nano", teacher: str | None = None, **model: Any) -> PretrainingModule:
    config = PretrainingConfig(
        model=PretrainingModelConfig(name, drop_path_rate=0.1, **{**SMALL, **model}),
        teacher=TeacherConfig(teacher, width=24 if teacher == "vit" else None),
        data=PretrainingDataConfig(root=(str(photos),), img_size=(32, 48), batch_size=4, num_workers=0),
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=3.0),
    )
    torch.manual_seed(0)
    network = build_masked_model(config.model, image_size(config.data), config.teacher)
    watching: Any = {None: lambda: None, "ema": lambda: EMATeacher(network), "vit": make_vit}[teacher]()
    source = find_training_images(config.data.root)
    transform = PretrainingTransform((32, 48), teacher_size=(64, 96) if teacher == "vit" else None)
    return PretrainingModule(network, config, "test", loader_of(source, transform), watching)


def make_vit() -> FeatureTeacher:
    """A small ViT with random weights; patches of 16 px of images of twice the student's size, as a CLIP tower."""
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2, img_size=(64, 96))
    return FeatureTeacher("vit", FeatureTower(vit, False), (4, 6), (64, 96), 24, **STATISTICS)


def loader_of(source: Any, transform: Any, collate: Any = stack) -> Callable[[int, int], TrainingLoader]:
    def make(rank: int, world_size: int) -> TrainingLoader:
        options: dict[str, Any] = {"pin_memory": torch.cuda.is_available(), "collate": collate}
        return TrainingLoader(source, transform, batch_size=4, num_workers=0, seed=0, rank=rank, **options)

    return make


class Drawn:
    """Photographs made up on the way, each with its number."""

    def __len__(self) -> int:
        return 8

    def name(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> tuple[str, bytes, int]:
        file = io.BytesIO()
        draw_photo(np.random.default_rng(index), 96, 80).save(file, "JPEG")
        return str(index), file.getvalue(), index


class View:
    """64x64 px, and "label" a class, "target" the classes of pixels, or objects with masks."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, image: Any, rng: random.Random, number: int) -> dict[str, Any]:
        view: dict[str, Any] = PretrainingTransform((64, 64))(image, rng)
        left = 8 * (number % 4)
        mask = torch.zeros(64, 64, dtype=torch.uint8)
        mask[16:48, left : left + 32] = 1
        if self.kind == "classification":
            view["label"] = torch.tensor(number % 3)
        elif self.kind == "segmentation":
            view["target"] = mask
        else:
            boxes = torch.tensor([[left, 16, left + 32, 48]], dtype=torch.float32)
            view["target"] = {"boxes": boxes, "labels": torch.tensor([1]), "masks": mask[None]}
        return view


def classification(photos: Path, name: str = "itpn_nano") -> ClassificationModule:
    config = ClassificationConfig(
        model=ClassificationModelConfig(name=name, patch_size=16, drop_path_rate=0.1, ema_decay=0.9),
        data=ClassificationDataConfig(img_size=64, crop_pct=0.9, batch_size=4, **STATISTICS),
        optimizer=FineTuningConfig(**LEARNING),
    )
    backbone = {**BACKBONES[name], "img_size": 64, "drop_path_rate": 0.1}
    network: Any = build(NetworkSpec(backbone, head="classification", options={"num_classes": 3}))
    return ClassificationModule(network, config, "test", ("a", "b", "c"), loader_of(Drawn(), View("classification")))


def detection(photos: Path) -> DetectionModule:
    from itpn.models.detector import MaskDetector

    config = DetectionConfig(
        model=DetectionModelConfig(name="itpn_nano"),
        data=DetectionDataConfig(img_size=64, batch_size=4),
        optimizer=FineTuningConfig(**LEARNING),
    )
    backbone: Any = timm.create_model("itpn_nano_pyramid", img_size=64, levels="detection", drop_path_rate=0.1)
    sizes = {"head_width": 16, "rpn_post_nms_top_n_train": 40, "box_batch_size_per_image": 16}
    network = MaskDetector(backbone, 3, min_size=64, max_size=128, **sizes)
    return DetectionModule(network, config, "test", ("a", "b"), loader_of(Drawn(), View("detection"), collect))


def segmentation(photos: Path) -> SegmentationModule:
    pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation_models_pytorch")
    from itpn.models.segmenter import Segmenter

    config = SegmentationConfig(
        model=SegmentationModelConfig(name="itpn_nano"),
        data=SegmentationDataConfig(img_size=64, batch_size=4, **STATISTICS),
        optimizer=FineTuningConfig(**LEARNING),
    )
    backbone: Any = timm.create_model("itpn_nano_pyramid", img_size=64, levels="segmentation", drop_path_rate=0.1)
    network = Segmenter(backbone, 2, head_width=16)
    return SegmentationModule(network, config, "test", ("a", "b"), loader_of(Drawn(), View("segmentation")))


TASKS: dict[str, Callable[[Path], TrainingModule]] = {
    "pixels": pretraining,
    "features": lambda photos: pretraining(photos, teacher="vit", **FEATURES),
    "mfm": lambda photos: pretraining(photos, teacher="ema", mask="block", pyramid_weights=(0.1, 0.2, 0.3)),
    "fast_itpn": lambda photos: pretraining(photos, "fast_itpn_nano"),
    "classification": classification,
    "fast_itpn classification": lambda photos: classification(photos, "fast_itpn_nano"),
    "detection": detection,
    "segmentation": segmentation,
}


class Observer:
    """Keeps losses and the device; writes a checkpoint after a step."""

    def __init__(self, checkpoint: tuple[int, Path] | None = None) -> None:
        self.checkpoint = checkpoint
        self.losses: list[float] = []
        self.devices: set[str] = set()

    def after_pass(self, batch: dict[str, Any], metrics: dict[str, torch.Tensor]) -> None:
        self.losses.append(float(metrics["loss"]))

    def after_step(self, run: Training) -> None:
        self.devices |= {p.device.type for p in run.module.parameters()}
        if self.checkpoint is not None and run.step == self.checkpoint[0]:
            torch.save(collect_state(run), self.checkpoint[1])


def fit(
    module: TrainingModule, device: torch.device, steps: int, observer: Observer, resume: Path | None = None
) -> None:
    """As :func:`itpn.training.loop.fit`, without a run's folder."""
    trainer = module.config.trainer
    trainer.accelerator = "gpu" if device.type == "cuda" else "cpu"
    trainer.precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    trainer.devices, trainer.max_steps, trainer.max_epochs, trainer.compile = 1, steps, 100, False
    job = Job(module, lambda: Image.new("RGB", (1, 1)), {}, None)
    run = set_up(make_training_fabric(module, read_launch()), Output(quiet=True), RunFolder(module.config, "test"), job)
    if resume is not None:
        restore_state(run, torch.load(resume, map_location="cpu", weights_only=True))
    batches = read_batches(run)
    while run.step < steps:
        take_step(run, batches, observer.after_pass)
        observer.after_step(run)
    module.cpu()


@pytest.mark.parametrize("name", TASKS)
def test_a_few_steps_of_each_task(device, photos, name):
    module = TASKS[name](photos)
    before = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    observer = Observer()
    fit(module, device, 2, observer)
    assert observer.devices == {device.type}
    assert len(observer.losses) == 2
    assert np.isfinite(observer.losses).all()
    for n, parameter in module.model.named_parameters():
        assert parameter.isfinite().all(), n
        # biases of keys cannot matter; heads of a detector may have met no object
        if parameter.requires_grad and not n.startswith("roi_heads"):
            assert not torch.equal(parameter.cpu(), before[n]), n


@pytest.mark.parametrize("name", ["mfm", "classification"])
def test_a_resumed_run_is_the_uninterrupted_one(device, photos, tmp_path, name):
    """Bit for bit on a CPU. On a GPU as far as its kernels are deterministic.

    Some have no deterministic version, and add up gradients in any order: they differ in the last bits of a float32.
    AdamW turns that into steps that differ where a gradient is near zero, by less than a hundredth of the distance that
    the weights go meanwhile; a lost state of the optimizer, another mask, batch or learning rate change most of it.
    """
    kept = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    try:
        straight, resumed = TASKS[name](photos), TASKS[name](photos)
        seen = Observer((3, tmp_path / "three.ckpt"))
        fit(straight, device, 6, seen)
        seen_later = Observer()
        fit(resumed, device, 6, seen_later, tmp_path / "three.ckpt")
    finally:
        torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])
    state = torch.load(tmp_path / "three.ckpt", weights_only=True)["state_dict"]
    one, other = straight.state_dict(), resumed.state_dict()
    assert one.keys() == other.keys() == state.keys()
    if device.type == "cpu":
        assert seen_later.losses == seen.losses[3:]
        assert all(torch.equal(one[n], other[n]) for n in one)
        return
    assert seen_later.losses == pytest.approx(seen.losses[3:], rel=1e-3)
    apart, moved = (flat(one) - flat(other)).norm(), (flat(one) - flat(state)).norm()
    assert moved > 0
    assert apart < 0.01 * moved


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().cpu().flatten() for tensor in state.values()])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_is_copied_from_pinned_memory_beside_the_step(device, photos, num_workers):
    module = pretraining(photos)
    transform = PretrainingTransform((32, 48))
    options = {"batch_size": 4, "num_workers": num_workers, "seed": 0, "pin_memory": device.type == "cuda"}
    module.loader = TrainingLoader(find_training_images([str(photos)]), transform, **options)
    batch = next(iter(module.loader))
    expected = batch["image"].clone()
    if device.type == "cpu":
        assert torch.equal(copy_batch(module.loader, batch, device, None)["image"], expected)
        module.loader.close()
        return
    assert batch["image"].is_pinned()
    copies = torch.cuda.Stream(device)
    copy_batch(module.loader, batch, device, copies)  # the first takes memory
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # a step that takes a second
        computed = torch.cuda.current_stream().record_event()
        copied = copy_batch(module.loader, batch, device, copies)["image"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    copies.synchronize()
    assert not computed.query()  # the batch is there, and the step before still computes
    assert torch.equal(copied.cpu(), expected)
    module.loader.close()
