"""Files that were written before networks had one description: what they say of themselves builds the same networks.

``data/older_files.json`` holds the metadata of such files, and a digest of their tensors' names and shapes.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from itpn.checkpoints.adapters import ours
from itpn.checkpoints.files import Checkpoint, named_tensors
from itpn.checkpoints.load import find_spec
from itpn.models.build import build

FILES = json.loads((Path(__file__).parent / "data" / "older_files.json").read_text())


def read(name: str) -> Checkpoint:
    metadata = ours.read_metadata(FILES[name]["metadata"], name)
    return Checkpoint(name, "itpn", {}, metadata=metadata)


@pytest.mark.parametrize("name", FILES)
def test_the_network_is_the_same(name):
    checkpoint = read(name)
    assert checkpoint.spec is not None
    head = FILES[name]["metadata"]["task"]
    assert checkpoint.spec.head == (None if head in ("pyramid", "backbone") else head)
    with torch.device("meta"):
        tensors = named_tensors(build(find_spec(checkpoint, None, {})))
    shapes = sorted((name, list(tensor.shape)) for name, tensor in tensors.items())
    assert len(shapes) == FILES[name]["tensors"]
    assert hashlib.sha256(json.dumps(shapes).encode()).hexdigest() == FILES[name]["sha256"]


def test_the_objective_is_the_same():
    """No tensor shows how patches are masked, and what is compared."""
    with torch.device("meta"):
        clip = build(read("clip").spec).objective
        converted = build(read("mm_clip").spec).objective
    assert (clip.mask, clip.mask_ratio, clip.masked_patches, clip.masked_laterals) == ("block", 0.4, "mask_token", True)
    assert (clip.feature_patches, clip.weights) == ("all", {"feature": 1.0, "auxiliary": 1.0})
    assert (converted.masked_patches, converted.feature_loss) == ("mask_token", "cosine")
    assert converted.feature_patches == "masked"


def test_what_is_guessed_is_remembered():
    for name in ("off_det_pixel", "off_seg"):
        assert any(guess.startswith("norm_eps") for guess in ours.read_guesses(read(name).metadata))
    assert ours.read_guesses(read("pixel").metadata) == []
