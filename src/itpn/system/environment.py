"""Environment variables of torchrun and Slurm. Without Lightning, which reads them at its import."""

import os

from itpn.errors import UserError

# numbers that torchrun, Slurm or the first process set for the others
COUNTS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES")
NUMBERS = (
    *(*COUNTS, "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
)


def check_environment() -> None:
    """Raise :class:`UserError` for a variable of torchrun or Slurm that is no number."""
    for name in NUMBERS:
        value = os.environ.get(name, "1")
        if not value.isdecimal() or len(value) > 9 or (name in COUNTS and not int(value)):
            raise UserError(
                f"the environment variable {name} must be a number{' above 0' * (name in COUNTS)}, not {value[:20]!r}: "
                "torchrun and Slurm set it; to start one process, unset it"
            )


def read_number(*names: str, default: int) -> int:
    """The first of some variables that is set, or the default where none is or it is no number."""
    value = next(filter(None, map(os.environ.get, names)), "")
    return int(value) if value.isdecimal() and len(value) <= 9 else default


def is_main_process() -> bool:
    """Whether this is the first process of a run, whoever started the processes: torchrun, Slurm or the first one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return read_number("RANK", default=0) == 0
    if read_number("SLURM_NTASKS", default=1) > 1:
        return read_number("SLURM_PROCID", default=0) == 0
    return read_number("LOCAL_RANK", default=0) == 0 and read_number("NODE_RANK", "GROUP_RANK", default=0) == 0
