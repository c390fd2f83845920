"""`itpn demo`: the whole story on generated images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from itpn.commands.options import shown


@dataclass(frozen=True)
class Demo:
    """The whole story on generated images: pre-train, classify, detect, segment."""

    output_dir: Annotated[Path, shown("DIR")] = Path("runs/demo")
    """Where everything goes."""

    def run(self) -> None:
        from itpn.tasks.demo import demo

        demo(self.output_dir)
