"""`itpn demo`: the whole story on generated images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from itpn.commands.options import shown


@dataclass(frozen=True)
class Demo:
    """Pre-train, classify, detect and segment, on generated images."""

    output_dir: Annotated[Path, shown("DIR")] = Path("runs/demo")
    """Folder for images, runs and predictions."""

    def run(self) -> None:
        from itpn.tasks.demo import demo

        demo(self.output_dir)
