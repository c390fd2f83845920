"""What names a checkpoint. Without torch, so that a wrong name is answered at once."""

from pathlib import Path

from itpn.errors import UserError

HUB = "hf-hub:"  # before the name of a repository, as timm writes it


def check_file(checkpoint: str, what: str = "checkpoint") -> None:
    """Find a missing file early.

    Raises:
        UserError: it is not there.
    """
    if checkpoint.startswith(HUB):
        return
    if "://" in checkpoint:
        raise UserError(f"{what} {checkpoint} is an address: download the file and give its path, or {HUB}OWNER/NAME")
    if not checkpoint or not Path(checkpoint).exists():
        raise UserError(f"{what} {checkpoint or repr(checkpoint)} does not exist")
