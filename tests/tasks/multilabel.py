"""Multi-label classification: an image has any number of classes. A task of its own, in one recipe file.

A data folder holds images, `train.csv` and `val.csv`, with a line for each image: its name, and its classes separated
by spaces.
"""

import csv
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multilabel_average_precision

import itpn
from itpn.data.augment import ClassificationTransform, EvaluationTransform
from itpn.data.evaluation import make_evaluation_loader
from itpn.data.image_type import Pixels
from itpn.data.normalize import Normalize
from itpn.data.readers import FileReader
from itpn.errors import UserError
from itpn.models.backbone import Backbone, find_backbone
from itpn.models.build import build_backbone
from itpn.models.heads import Head
from itpn.models.spec import NetworkSpec
from itpn.system.writing import write_whole
from itpn.tasks.data import RunData, make_training_loader
from itpn.tasks.evaluation import EvaluationRequest, Evaluator
from itpn.tasks.finetuning.config import FineTuningConfig, NetworkConfig, check_fine_tuning
from itpn.tasks.finetuning.module import FineTuningModule
from itpn.tasks.finetuning.network import (
    backbone_options,
    build_network,
    find_network,
    keep_predictor,
    name_classes,
    resolve_network,
)
from itpn.tasks.info import describe_classifier
from itpn.tasks.pixels import stored_read_settings
from itpn.tasks.prediction import read_batches, read_preprocessing
from itpn.training.config import CropsConfig, EvaluationConfig, RunConfig

# --- settings


@dataclass
class MultiLabelDataConfig(CropsConfig):
    """Images with any number of classes."""

    root: str = "data"
    """Folder of the images, `train.csv` and `val.csv`."""
    img_size: int = 224
    """Pixels of a side."""
    mean: tuple[float, ...] | None = None
    """Mean subtracted from each channel; None for the checkpoint's, or ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation that each channel is divided by; None for the checkpoint's, or ImageNet's."""


@dataclass
class MultiLabelConfig(RunConfig):
    """Settings of a run of multi-label classification."""

    task: ClassVar[str] = "multi_label"
    model: NetworkConfig = field(default_factory=NetworkConfig)
    data: MultiLabelDataConfig = field(default_factory=MultiLabelDataConfig)
    optimizer: FineTuningConfig = field(default_factory=FineTuningConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check(self) -> None:
        super().check()
        check_fine_tuning(self)


# --- data


class MultiLabelImages:
    """Images and their classes: ``images[i]`` is name, encoded image and float32 [classes] of zeros and ones."""

    def __init__(self, files: FileReader, labels: np.ndarray, classes: tuple[str, ...]) -> None:
        self.files, self.labels, self.classes = files, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return *self.files[index][:2], self.labels[index]

    def name(self, index: int) -> str:
        return self.files.name(index)


def read_rows(path: Path) -> list[tuple[str, list[str]]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [(str(path.parent / row[0]), row[1].split()) for row in csv.reader(file)]
    except (OSError, IndexError) as error:
        raise UserError(f"{path} must hold an image and its classes in each line: {error}") from error


def read_images(rows: list[tuple[str, list[str]]], classes: Sequence[str]) -> MultiLabelImages:
    labels = np.array([[name in own for name in classes] for _, own in rows], dtype=np.float32)
    return MultiLabelImages(FileReader([path for path, _ in rows]), labels, tuple(classes))


def find_data(config: MultiLabelConfig) -> RunData:
    train, val = (read_rows(Path(config.data.root, f"{split}.csv")) for split in ("train", "val"))
    classes = sorted({name for _, own in train for name in own})
    return RunData(read_images(train, classes), read_images(val, classes))


def view(transform: Any, image: Tensor, labels: np.ndarray) -> dict[str, Tensor]:
    return {"image": transform(image), "label": torch.from_numpy(labels)}


class TrainingTransform:
    """As a classifier's images are augmented; the label is a vector."""

    def __init__(self, config: MultiLabelConfig) -> None:
        data = config.data
        self.augment = ClassificationTransform(
            (data.img_size,) * 2, data.crop_scale, data.crop_ratio, data.interpolation
        )

    def __call__(self, image: Any, rng: Any, labels: np.ndarray) -> dict[str, Tensor]:
        return {**self.augment(image, rng, 0), "label": torch.from_numpy(labels)}


# --- network and training


class MultiLabelHead(Head):
    """A linear layer on the mean of the last stage, as a classifier has it."""

    parts: Mapping[str, str] = {"backbone.head.": "classifier", "backbone.fc_norm.": "classifier"}
    classes = ("backbone.head.", "backbone.fc_norm.")
    arguments = ("num_classes",)
    pyramid = False
    purpose = "multi-label classification"

    def build(self, spec: NetworkSpec) -> Backbone:
        return build_backbone(spec, **spec.options)

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        return None  # its tensors are those of a classifier; files say that they are of this task

    def complete(self, spec: NetworkSpec) -> NetworkSpec:
        return spec.with_options(num_classes=2)

    def summarize(self, spec: NetworkSpec) -> str:
        return f"a multi-label classifier of {spec.options['num_classes']} classes"


def resolve(
    config: MultiLabelConfig, checkpoint: Any, data: RunData | None = None
) -> tuple[MultiLabelConfig, list[str]]:
    return resolve_network(config, checkpoint), []


def build_model(config: MultiLabelConfig, data: RunData, checkpoint: Any) -> tuple[nn.Module, list[str]]:
    return build_with(config, data.train.classes, checkpoint)


def build_with(config: MultiLabelConfig, classes: tuple[str, ...], checkpoint: Any) -> tuple[nn.Module, list[str]]:
    size = (config.data.img_size,) * 2
    contents = find_network(config.model, checkpoint, size)
    theirs = contents.heads.get(config.task)
    kept, notes = keep_predictor(checkpoint, classes, None if theirs is None else theirs["num_classes"])
    backbone = {**contents.backbone, "img_size": size, **backbone_options(config.model)}
    spec = NetworkSpec(backbone, head=config.task, options={"num_classes": len(classes)})
    network, more = build_network(spec, config.model, contents, checkpoint, () if kept else MultiLabelHead.classes)
    return network, notes + more


def build_recipe(config: MultiLabelConfig, num_classes: int | None = None, checkpoint: Any = None) -> Any:
    config, _ = resolve(config, checkpoint)
    return build_with(config, name_classes(checkpoint, num_classes or 2), checkpoint)


class MultiLabelModule(FineTuningModule):
    """Binary cross-entropy of each class."""

    def training_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        loss = F.binary_cross_entropy_with_logits(self.model(self.normalize(batch["image"])), batch["label"])
        return {"loss": loss, "metrics": {"loss": loss.detach()}}

    def preprocessing(self) -> dict[str, Any]:
        data = self.config.data
        return {"mean": data.mean, "std": data.std, "size": [data.img_size] * 2}


def build_module(model: nn.Module, config: MultiLabelConfig, recipe: str, data: RunData) -> MultiLabelModule:
    make_loader = functools.partial(make_training_loader, config, data.train, TrainingTransform(config))
    return MultiLabelModule(model, config, recipe, data.train.classes, make_loader)


def describe_data(config: MultiLabelConfig, data: RunData) -> dict[str, str]:
    return {"data": f"{len(data.train.classes)} classes", "size": f"{config.data.img_size} px"}


# --- evaluation, prediction, info


class MultiLabelEvaluator(Evaluator[dict[str, float]]):
    """Mean average precision over the classes."""

    names = ("map",)
    best = "map"
    files = ("evaluation.json",)

    def __init__(self, config: MultiLabelConfig, images: MultiLabelImages) -> None:
        self.config, self.images, self.classes = config, images, images.classes
        self.normalize = Normalize(Pixels(mean=config.data.mean, std=config.data.std))

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, rank: int, world_size: int) -> Iterable[dict[str, Any]]:
        data = self.config.data
        crop = functools.partial(view, EvaluationTransform((data.img_size,) * 2, 1.0, data.interpolation))
        return make_evaluation_loader(self.images, crop, data.batch_size, data.num_workers, rank, world_size)

    def to(self, device: torch.device) -> None:
        self.normalize.to(device)

    def compare(self, network: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        images = self.normalize(batch["image"].to(self.normalize.mean.device))
        return network(images).float().sigmoid().cpu(), batch["label"]

    def score(self, parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        probabilities, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        precision = multilabel_average_precision(probabilities, labels.long(), len(self.classes))
        return {"map": float(precision)}

    def metrics(self, scores: dict[str, float]) -> dict[str, float]:
        return scores

    def write(self, scores: dict[str, float], folder: Path, about: Mapping[str, Any]) -> None:
        write_whole(folder / "evaluation.json", json.dumps({**about, **scores}).encode())

    def rows(self, scores: dict[str, float], about: Mapping[str, Any]) -> dict[str, str]:
        return {"images": f"{len(self)} {about['data']}", "mAP": f"{scores['map']:.1%}"}

    def summarize(self, metrics: Mapping[str, float | None]) -> dict[str, str]:
        return {"mAP": f"{metrics['map']:.1%} of {len(self)} images"}


def build_evaluator(config: MultiLabelConfig, data: RunData) -> MultiLabelEvaluator:
    return MultiLabelEvaluator(config, data.val)


def resolve_evaluation(config: MultiLabelConfig, request: EvaluationRequest) -> Any:
    checkpoint = request.checkpoint
    size = checkpoint.preprocessing["size"][0]
    model = replace(config.model, name=None, patch_size=None)
    return resolve(replace(config, model=model, data=replace(config.data, img_size=size)), checkpoint)[0], {}


def find_evaluation_data(config: MultiLabelConfig, model: nn.Module, request: EvaluationRequest) -> Any:
    images = read_images(read_rows(Path(config.data.root, "val.csv")), request.checkpoint.metadata["classes"])
    return MultiLabelEvaluator(config, images), f"of {config.data.root}"


@torch.no_grad()
def predict(model: nn.Module, checkpoint: Any, source: Any, options: Any) -> None:
    crop, normalize = read_preprocessing(checkpoint, model)
    lines = ["image,classes"]
    for names, images in read_batches(source, crop, stored_read_settings(checkpoint, options.max_pixels)):
        for name, row in zip(names, model(normalize(images)).sigmoid(), strict=True):
            own = [label for label, value in zip(checkpoint.metadata["classes"], row, strict=True) if value > 0.5]
            lines.append(f"{Path(name).name},{' '.join(own)}")
    write_whole(options.out / "predictions.csv", ("\n".join(lines) + "\n").encode())
    print(options.out / "predictions.csv")


def describe(config: MultiLabelConfig, checkpoint: Any) -> list[tuple[str, str]]:
    backbone = find_backbone(build_recipe(config, None, checkpoint)[0])
    return describe_classifier(backbone, f"{backbone.num_classes} classes that may occur together")


TASK = itpn.register_task(
    itpn.TaskSpec(
        name="multi_label",
        config=MultiLabelConfig,
        head=MultiLabelHead,
        find_data=find_data,
        resolve=resolve,
        build_model=build_model,
        build_recipe=build_recipe,
        build_module=build_module,
        build_evaluator=build_evaluator,
        describe_data=describe_data,
        describe=describe,
        evaluation_options=("--data.root", "--data.batch-size"),
        resolve_evaluation=resolve_evaluation,
        find_evaluation_data=find_evaluation_data,
        predict=predict,
    )
)

config = MultiLabelConfig(
    model=NetworkConfig(name="hivit_tiny", scratch=True),
    optimizer=FineTuningConfig(base_lr=1e-3, betas=(0.9, 0.999), layer_decay=0.75, warmup_epochs=1),
)
