"""`itpn convert`: a checkpoint under the names of another code base."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import DisallowNone, Positional, arg

from itpn.checkpoints.paths import check_file
from itpn.commands.options import NumHeads, TaskFile, shown
from itpn.system.console import Output


@dataclass(frozen=True)
class Convert:
    """Convert a checkpoint from one code base's format to another's."""

    source: Annotated[Positional[str], shown("CKPT")]
    """A checkpoint that `itpn inspect` knows."""
    target: Annotated[Positional[Path], shown("FILE")]
    """The file to write: .safetensors for itpn's format, .pth or .pt for the others."""
    to: Annotated[
        DisallowNone[Literal["itpn", "official", "mmpretrain"] | None], arg(help_behavior_hint="(optional)")
    ] = None
    """Target format: itpn's, that of the authors' code or that of mmpretrain; needed for a .pth or .pt."""
    num_heads: NumHeads = None
    task_file: TaskFile = None

    def run(self) -> None:
        check_file(self.source)
        from itpn.checkpoints.convert import convert

        done = convert(self.source, self.target, self.to, self.num_heads)
        lines = [f"{self.target}: {done.count} tensors under the names of {done.form}"]
        parts = Counter(name.partition(".")[0] for name in done.left)
        for part, count in parts.items():
            lines.append(f"left out, for it has no place there: {part} ({count} tensor{'s' * (count != 1)})")
        for name, value in done.unsaid.items():
            lines.append(f"names and shapes do not say {name}={value!r}: set it in the code that reads the file")
        if done.nonfinite:
            count = sum(done.nonfinite.values())
            lines.append(f"{count} infinite numbers or NaN were kept as they are, in {', '.join(done.nonfinite)}")
        for line in lines:
            Output().print(line, markup=False, highlight=False, soft_wrap=True)
