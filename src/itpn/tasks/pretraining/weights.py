"""A run that starts from the weights of a file, and which options build the file's network."""

from itpn.checkpoints.files import Checkpoint
from itpn.checkpoints.load import start_from
from itpn.checkpoints.match import Finding
from itpn.errors import UserError
from itpn.masked.masked_model import MaskedImageModel
from itpn.models.spec import NetworkSpec, spec_of
from itpn.models.variants import PUBLISHED_PYRAMID, PYRAMIDS
from itpn.system.checks import ChannelMap
from itpn.tasks.pretraining.config import PretrainingConfig


def load_weights(model: MaskedImageModel, checkpoint: Checkpoint, channel_map: ChannelMap | None = None) -> list[str]:
    """Copy into a run's model what fits of a file.

    A part that the file lacks keeps its random initialization (a decoder, heads; a pyramid, if the file has none at
    all). A backbone or pyramid of another shape is refused: it is another model.

    Args:
        channel_map: see :func:`itpn.checkpoints.match.match`.

    Returns:
        What is not as in the file, a sentence each.

    Raises:
        UserError: the file holds another model, and which options would build it; or values that are not finite.
    """
    contents, source = checkpoint.contents, checkpoint.source

    def check(findings: list[Finding]) -> None:
        problems = [f.text for f in findings if f.kind == "harmful"]
        if any(name.startswith("pyramid.") for name in checkpoint.tensors):  # one there is not drawn anew
            problems += [f.text for f in findings if f.kind == "random" and f.names[0].startswith("pyramid.")]
        if not problems:
            return
        if contents.variant is None:
            own = contents.backbone
            sizes = f"{own['embed_dim']} channels and {'+'.join(map(str, own['depths']))} blocks"
            raise UserError(
                f"checkpoint {source} holds a network of {sizes}, which no model of `itpn list` has: `itpn train` "
                "cannot start from it (itpn.load can)"
            )
        options = describe_options(contents.spec(PretrainingConfig.task), model)
        hint = f"; it takes {options}" if options else ""
        raise UserError(f"checkpoint {source} holds another model: it {problems[0]}{hint}")

    return start_from(model, checkpoint, check, channel_map=channel_map)


def describe_options(spec: NetworkSpec, model: MaskedImageModel) -> str:
    """The options of `itpn train` that turn a recipe's network into the file's; empty where none would."""
    theirs, ours = _options(spec), _options(spec_of(model))
    if theirs["name"] != ours["name"]:
        own = PYRAMIDS.get(str(theirs["name"]), PUBLISHED_PYRAMID)  # comes with the name
        ours |= {"pyramid-width": own["width"], "pyramid-depth": own["depth"]}
    return " ".join(f"--model.{o} {v}" for o, v in theirs.items() if v is not None and v != ours[o])


def _options(spec: NetworkSpec) -> dict[str, str | int | None]:
    """Options of `itpn train` that build a network."""
    backbone, pyramid, decoder = spec.backbone, spec.pyramid or {}, spec.options.get("decoder") or {}
    return {
        "name": spec.variant,
        "patch-size": backbone["patch_size"],
        "rel-pos-bias": str(bool(backbone.get("rel_pos_bias"))),
        "init-values": "0.1" if backbone.get("init_values") else "None",
        "pyramid-width": pyramid.get("width"),
        "pyramid-depth": pyramid.get("depth"),
        "decoder-embed-dim": decoder.get("width"),
        "decoder-depth": decoder.get("depth"),
        "decoder-num-heads": decoder.get("num_heads") if decoder.get("depth") else None,
    }
