"""The description of a network is one value: nobody changes it under another's hands."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch

from itpn.models.build import build
from itpn.models.spec import NetworkSpec, spec_of
from itpn.models.variants import BACKBONES


def test_a_description_cannot_be_changed():
    backbone = {**BACKBONES["itpn_nano"], "img_size": [64, 64]}
    options = {"decoder": {"heads": {"pixel": 768}}, "levels": [1, 2]}
    spec = NetworkSpec(backbone, {"width": 32, "depth": 1}, head="pretraining", options=options)
    before = json.dumps(spec.to_dict())
    backbone["embed_dim"] = options["decoder"]["heads"]["pixel"] = 1
    options["levels"].append(3)
    for change in (
        lambda own: own.backbone.update(embed_dim=1),
        lambda own: own.pyramid.pop("width"),
        lambda own: own.options["decoder"].__setitem__("heads", {}),
        lambda own: own.options["decoder"]["heads"].clear(),
    ):
        for own in (spec, copy.deepcopy(spec), pickle.loads(pickle.dumps(spec)), dataclasses.replace(spec)):
            with pytest.raises(TypeError, match="cannot be changed"):
                change(own)
    own = spec.to_dict()
    own["options"]["decoder"]["heads"]["pixel"] = own["backbone"]["embed_dim"] = 1
    assert json.dumps(spec.to_dict()) == before
    assert json.dumps(dataclasses.asdict(spec)) == before
    assert pickle.loads(pickle.dumps(spec)) == spec == spec.with_options(levels=[1, 2])


def test_networks_are_copied_and_stored_with_it(tmp_path):
    model = build(NetworkSpec({**BACKBONES["itpn_nano"], "img_size": (64, 64)}))
    torch.save(model, tmp_path / "model.pt")
    stored = torch.load(tmp_path / "model.pt", weights_only=False)
    assert spec_of(stored) == spec_of(copy.deepcopy(model)) == spec_of(model)
