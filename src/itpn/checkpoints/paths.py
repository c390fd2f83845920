"""What names a checkpoint. Without torch, so that a wrong name is answered at once."""

from pathlib import Path

from itpn.errors import UserError, refusal

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
    try:
        found = bool(checkpoint) and Path(checkpoint).exists()
    except OSError as error:  # a name that no file can have
        raise refusal(f"{what} {checkpoint}", error) from error
    if not found:
        raise UserError(f"{what} {checkpoint or repr(checkpoint)} does not exist")
