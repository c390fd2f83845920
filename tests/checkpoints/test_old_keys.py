"""Files that were written before arguments were renamed build the same networks."""

import pytest
from itpn.checkpoints.architecture import build, read_architecture
from public import save_public

from itpn.checkpoints.convert import convert
from itpn.checkpoints.files import read_checkpoint

# of the metadata that `itpn convert` wrote for these files
OLD = {
    "mm_clip": (
        {"fill_hidden": False},
        {"hidden_units": "mask_token", "hidden_laterals": True, "feature_units": "hidden"},
    ),
    "off_clip_pretrain": (
        {"fill_hidden": False},
        {"hidden_units": "mask_token", "hidden_laterals": True, "feature_units": "all"},
    ),
    "mm_pixel": ({"fill_hidden": True}, {}),
}
NEW = {"add_mask_tokens", "masked_patches", "masked_laterals", "feature_patches"}


@pytest.mark.parametrize("case", OLD)
def test_metadata_with_old_names(case, tmp_path):
    convert(save_public(tmp_path, case), tmp_path / "ours.safetensors")
    checkpoint = read_checkpoint(tmp_path / "ours.safetensors")
    today = read_architecture(checkpoint)
    old_decoder, old_objective = OLD[case]
    stored = checkpoint.metadata["architecture"]
    for part, old in {"decoder": old_decoder, "objective": old_objective}.items():
        stored[part] = {key: value for key, value in stored[part].items() if key not in NEW} | old
    architecture = read_architecture(checkpoint)
    ours, theirs = build(architecture, "pretraining"), build(today, "pretraining")
    assert ours.objective == theirs.objective
    assert (ours.decoder.mask_token is None) == (theirs.decoder.mask_token is None) == (not old_decoder["fill_hidden"])
    assert ours.state_dict().keys() == theirs.state_dict().keys() == checkpoint.tensors.keys()
