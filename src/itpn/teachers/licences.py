"""Under which licence the weights of a teacher are published, where that is known."""

import contextlib
import re
from pathlib import Path

import timm
from timm.models import get_pretrained_cfg

from itpn.errors import MachineError, UserError
from itpn.system.text import read_text
from itpn.teachers.plan import TeacherPlan

# of the authors' own weights of models of transformers. CLIP is not among them: its many publishers have many licences
AUTHORS = {
    "dinov3_vit": "dinov3-license",
    "dinov3_convnext": "dinov3-license",
    "dinov2": "apache-2.0",
    "dinov2_with_registers": "apache-2.0",
    "siglip_vision_model": "apache-2.0",
    "siglip2_vision_model": "apache-2.0",
}


def licence_of(plan: TeacherPlan) -> str | None:
    """The licence of a teacher's weights with who says so, as ``apache-2.0, says timm``; None if nobody does."""
    if plan.checkpoint is not None:
        card = _read_card(Path(plan.checkpoint) / "README.md")
        if card is not None:
            return f"{card}, says {plan.checkpoint}/README.md"
    if plan.name in AUTHORS:
        return f"{AUTHORS[plan.name]} for those that its authors published"
    if plan.name == "clip" or plan.name.endswith("_vision_model"):
        return None
    licence = _timm_licence(plan.architecture)
    if licence is None:
        return None
    return f"{licence}, says timm" if plan.checkpoint is None else f"{licence} for those of this name, says timm"


def _timm_licence(name: str) -> str | None:
    """Of a name with a tag its own; of one without, that of all tags if they agree."""
    names = [name] if "." in name else timm.list_pretrained(f"{name}.*")
    licences = {cfg.license for tagged in names if (cfg := get_pretrained_cfg(tagged)) is not None}
    return licences.pop() if len(licences) == 1 else None


def _read_card(path: Path) -> str | None:
    """What the head of a model card, as the hub has them, calls its licence."""
    if not path.is_file():
        return None
    with contextlib.suppress(UserError, MachineError):  # no text: as good as none
        head = re.match(r"---\n(.*?)\n---", read_text(path), re.DOTALL)
        lines = (
            dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([\w.+-]{1,60})", head[1], re.MULTILINE))
            if head
            else {}
        )
        return lines.get("license_name") or lines.get("license")
    return None
