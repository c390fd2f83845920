"""`itpn info`: how large a network is, what it costs, what comes out where."""

import torch
from rich.table import Table
from timm import create_model

from itpn.checkpoints.files import read_checkpoint
from itpn.models.backbone import Backbone
from itpn.models.build import build
from itpn.models.spec import NetworkSpec
from itpn.models.variants import BACKBONES, PUBLISHED_PYRAMID, PYRAMIDS, WITH_PYRAMID
from itpn.system.console import Answer
from itpn.tasks.describing import Rows, count_parameters, describe_backbone, describe_maps, describe_stages, make_images
from itpn.tasks.spec import task_of
from itpn.training.config import RunConfig


def print_info(name: str, config: RunConfig | None, checkpoint: str | None = None) -> None:
    """Print parameters, MACs and shapes of a recipe's network, or of a model when there is no config.

    Args:
        checkpoint: gives the network of a recipe that takes it from one.
    """
    found = None if checkpoint is None else read_checkpoint(checkpoint)
    rows = describe_model(name) if config is None else task_of(config).describe(name, config, found)
    table = Table(title=name, show_header=False, title_justify="left")
    for title, text in rows:
        if title or text:
            table.add_row(title, text)
        else:
            table.add_section()
    Answer().print(table)


def describe_model(name: str) -> Rows:
    """Of a model that timm knows: a backbone, with its pyramid where there is one."""
    base = next((plain for plain, whole in WITH_PYRAMID.items() if whole == name), name)
    with torch.device("meta"):  # shapes without values
        backbone = create_model(base)
    assert isinstance(backbone, Backbone)
    size = (224, 224)
    aside = ", pyramid aside," if base != name else ""
    rows = [
        ("parameters", f"{count_parameters(backbone):.2f} M{aside} with a classifier of 1000 classes"),
        *describe_backbone(backbone, size),
        ("", ""),
        *describe_stages(backbone, size),
    ]
    if base in WITH_PYRAMID:
        with torch.device("meta"):
            whole = build(NetworkSpec(BACKBONES[base], PYRAMIDS.get(base, PUBLISHED_PYRAMID)))
        maps = whole.eval()(make_images(backbone, size)).values()
        rows += describe_maps("pyramid", maps, whole)
    return rows
