"""What stands in for a recipe's augmentation of colours where images are no photographs."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from itpn.data.augment import check_photographs
from itpn.data.image_type import PHOTO
from itpn.tasks.pixels import image_type, pixels_of
from itpn.training.config import AnyConfig

# Recipes' augmentation of colours, what it is off, and the channel jitter that takes its place: None for that of its
# own strength. RandAugment's is the colour jitter that timm uses without it; that of photometric distortion, which
# changes brightness by up to 0.125 and contrast by up to 0.5 in every other image, has the same root mean square.
COLOURS: dict[str, tuple[Any, float | None]] = {
    "color_jitter": (0.0, None),
    "auto_augment": (None, 0.4),
    "photometric": (False, 0.25),
}


def replace_colours(config: AnyConfig, given: Collection[str] = ()) -> tuple[AnyConfig, list[str]]:
    """Resolved settings whose augmentation of colours is replaced by channel jitter where images are no photographs.

    Args:
        given: names of settings of data that the user gave.

    Returns:
        The settings, and what was replaced, in a sentence.

    Raises:
        UserError: the user gave it.
    """
    data = config.data
    off = {name: value for name, (value, _) in COLOURS.items() if getattr(data, name, value) != value}
    if not off or getattr(data, "dtype", None) in (None, PHOTO):
        return config, []
    kind = image_type(config)
    for name in off:
        if name in given:
            check_photographs(pixels_of(config), _option(name), "--data.channel-jitter")
    strength = data.channel_jitter or max(COLOURS[name][1] or getattr(data, name) for name in off)
    note = (
        f"{' and '.join(map(_option, off))} of the recipe {'are' if len(off) > 1 else 'is'} for photographs: images of "
        f"{kind} are augmented by --data.channel-jitter {strength:g}"
    )
    return replace(config, data=replace(data, **off, channel_jitter=strength)), [note]


def _option(name: str) -> str:
    return f"--data.{name.replace('_', '-')}"
