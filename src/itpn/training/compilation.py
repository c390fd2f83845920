"""torch.compile: which runs use it, and what happens where the compiler fails."""

from collections.abc import Sequence

import lightning as L
import torch
from rich.console import Console
from torch import nn

from itpn.errors import MachineError, NonFiniteLoss, UserError
from itpn.system.console import print_note
from itpn.training.config import TrainerConfig

COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")


class Compilation:
    """The networks of a run that torch.compile has taken, until it fails on one of them.

    Args:
        networks: compiled in place, each as a graph of its own.
        required: whether a failure ends the run instead of its compilation.
        console: takes what is said by the main process; None in the others.

    Attributes:
        active: whether steps are compiled.
        pending: whether the first step, which compiles, is still to be done.
    """

    def __init__(self, networks: Sequence[nn.Module] = (), required: bool = False, console: Console | None = None):
        self._networks = networks
        self._required = required
        self._console = console
        self.active = self.pending = bool(networks)

    def gives_up(self, error: Exception, fabric: L.Fabric, in_backward: bool) -> bool:
        """Whether the compiler made a pass fail; the networks are then taken back, and the pass can be repeated.

        Of a first pass anything is taken for it: what fails without the compiler as well fails again. A repeated pass
        is that of a run which was never compiled: it draws the same random numbers.

        Args:
            in_backward: whether the backward pass had begun, in which processes exchange gradients.

        Raises:
            MachineError: compilation is required; or other processes wait for the rest of a backward pass, which
                cannot begin again.
        """
        # of dozens of types, from the compiler's own to those of the operating system
        if isinstance(error, UserError | MachineError | NonFiniteLoss) or not self.active:
            return False
        if not (self.pending or type(error).__module__.startswith(COMPILERS)):
            return False
        reason = describe_failure(error)
        if self._required:
            raise MachineError(f"--trainer.compile: torch.compile failed: {reason}") from None
        if fabric.world_size > 1 and in_backward:
            raise MachineError(f"torch.compile failed: {reason}; start again with --trainer.compile False") from None
        self.active = self.pending = False
        for network in self._networks:
            network._compiled_call_impl = None
        torch.compiler.reset()
        message = f"torch.compile failed: {reason}; steps are not compiled from here on, and slower"
        if self._console is None:
            print_note(f"process {fabric.global_rank}: {message}")
        else:
            print_note(message, self._console)
        return True


def pays(device: torch.device) -> bool:
    """Whether steps gain more time than their compilation takes."""
    return device.type == "cuda"


def describe_failure(error: Exception) -> str:
    """Type and first line of what the compiler raised, or of what was raised inside it."""
    while isinstance(inner := getattr(error, "inner_exception", None), Exception):
        error = inner
    lines = [line for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if not lines:
        return kind
    return lines[0] if kind in lines[0] else f"{kind}: {lines[0]}"


def compile_networks(
    networks: Sequence[nn.Module], settings: TrainerConfig, fabric: L.Fabric, by_default: bool, console: Console
) -> Compilation:
    """Compile in place, where the settings ask for it or it pays: on a GPU, if ``by_default``."""
    wanted = settings.compile
    if wanted is None:
        wanted = by_default and pays(fabric.device)
    if not wanted or not networks:
        return Compilation()
    parts = (part for network in networks for part in network.modules())
    if torch.__version__ < "2.15" and any(getattr(part, "grad_checkpointing", False) for part in parts):
        # older DDP cannot split a graph with recomputed parts; gradients are then sent after the backward pass
        torch._dynamo.config.optimize_ddp = False
    # a failure in the backward pass shows in the forward pass already, before processes send gradients to each other
    torch._functorch.config.force_non_lazy_backward_lowering = True
    for network in networks:
        network.compile()
    console.print("compiling the network: the first step takes a minute or more, the others are faster for it")
    return Compilation(networks, bool(settings.compile), console if fabric.is_global_zero else None)
