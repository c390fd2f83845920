"""Drawing the images of "shapes", the generated data set.

A scene has one or two textured grounds with a few textured, shaded, partly occluded shapes on them. Texture and colour
are independent of a shape's class: only its contour depends on it. Shapes are drawn from their signed distance, which
gives anti-aliased edges, shading and soft shadows at any image size.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from itpn.errors import UserError

Array = npt.NDArray[Any]  # float32, unless stated otherwise
Mask = npt.NDArray[np.bool_]
CLASSES = ("disk", "ring", "triangle", "square", "star", "cross")
GROUNDS = ("clouds", "stripes", "checks", "dots")
SPLITS = ("train", "val")
MIN_SIZE = 32  # pixels: in smaller images the smallest shapes cannot be recognized


@dataclass(frozen=True)
class Instance:
    """One shape: its class, its visible pixels, bool [H, W], and their box (x0, y0, x1, y1)."""

    category: str
    mask: Mask
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image, uint8 [H, W, 3]; its grounds, uint8 [H, W], see `labels`; its shapes from back to front."""

    image: npt.NDArray[np.uint8]
    ground: npt.NDArray[np.uint8]
    instances: list[Instance]

    @property
    def labels(self) -> npt.NDArray[np.uint8]:
        """uint8 [H, W] as in ADE20K: 0 where two grounds blend, then `GROUNDS` from 1, then `CLASSES`."""
        labels = self.ground.copy()
        for instance in self.instances:
            labels[instance.mask] = 1 + len(GROUNDS) + CLASSES.index(instance.category)
        return labels


def draw_scene(
    seed: int, split: str, index: int, *, img_size: int | tuple[int, int] = 96, category: str | None = None
) -> Scene:
    """Draw scene ``index`` of a split; it depends on the arguments only.

    Args:
        img_size: side, or (height, width), in pixels.
        category: draw this one shape, large (classification); by default one to five of any class, the first
            of which goes through `CLASSES` with the index, so that each occurs in the smallest set.

    Raises:
        UserError: an unknown split or class, a negative seed or index, a side below `MIN_SIZE`.
    """
    height, width = check_size(img_size)
    if split not in SPLITS or category not in (None, *CLASSES):
        raise UserError(f"no split {split!r} or class {category!r}: there are {SPLITS} and {CLASSES}")
    if seed < 0 or index < 0:
        raise UserError(f"seed and index must not be negative, not {seed} and {index}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index, category is None])
    # Lengths are fractions of the shorter side, random ones too: another size shows the same scene.
    pixel = 1 / min(height, width)
    x, y = np.meshgrid(*((np.arange(n, dtype=np.float32) + 0.5) * pixel for n in (width, height)))  # [H, W]
    light = _draw_direction(rng)
    canvas, ground, hue = _draw_grounds(rng, x, y, pixel)

    masks: list[Mask] = []
    areas: list[int] = []
    names: list[str] = []
    for number in range(1 if category else rng.integers(1, 6)):
        name = category or (CLASSES[index % len(CLASSES)] if number == 0 else str(rng.choice(CLASSES)))
        for _ in range(4):  # tries to find a position that leaves enough of every earlier shape visible
            shape = _draw_shape(rng, name, x, y, pixel, (0.2, 0.4) if category else (0.12, 0.28))
            mask = np.zeros((height, width), bool)
            mask[shape.window] = shape.distance() < 0
            if all((m & ~mask).sum() > 0.4 * area for m, area in zip(masks, areas, strict=True)):
                break
        else:
            continue
        masks = [m & ~mask for m in masks] + [mask]
        areas.append(int(mask.sum()))
        names.append(name)
        _paint_shape(rng, canvas[shape.window], shape, light, pixel, hue)

    canvas *= (0.95 + 0.25 * ((x - x.mean()) * light[0] + (y - y.mean()) * light[1]))[..., None]
    canvas += 0.01 * rng.standard_normal((height, width, 1), dtype=np.float32)  # grain
    image = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(image, ground, [Instance(n, m, _box(m)) for n, m in zip(names, masks, strict=True)])


@dataclass(frozen=True)
class _Shape:
    """A shape at its place: the window of the image that holds it and its shadow, and positions from its centre."""

    name: str
    radius: float
    axis: Array
    stretch: float
    window: tuple[slice, slice]
    dx: Array
    dy: Array

    def distance(self, shift: tuple[float, float] = (0, 0)) -> Array:
        """Signed distance from the contour of the shape, turned to ``axis`` and narrowed across it."""
        dx, dy, axis = self.dx + shift[0], self.dy + shift[1], self.axis
        along, across = dx * axis[0] + dy * axis[1], dy * axis[0] - dx * axis[1]
        narrow = self.radius * self.stretch
        return _DISTANCES[self.name](along / self.radius, across / narrow) * narrow


def _draw_shape(
    rng: np.random.Generator, name: str, x: Array, y: Array, pixel: float, radii: tuple[float, float]
) -> _Shape:
    radius = rng.uniform(*radii)
    centre = [rng.uniform(0.75 * radius, n * pixel - 0.75 * radius) for n in reversed(x.shape)]
    axis, stretch = _draw_direction(rng), rng.uniform(0.85, 1.0)
    columns, rows = (
        slice(max(int((c - 1.4 * radius) / pixel), 0), int((c + 1.4 * radius) / pixel) + 2) for c in centre
    )
    dx, dy = x[rows, columns] - centre[0], y[rows, columns] - centre[1]
    return _Shape(name, radius, axis, stretch, (rows, columns), dx, dy)


def _paint_shape(
    rng: np.random.Generator, window: Array, shape: _Shape, light: Array, pixel: float, hue: float
) -> None:
    """Paint a shape and its shadow into its window of the canvas, float32 [h, w, 3]."""
    dx, dy, radius, distance = shape.dx, shape.dy, shape.radius, shape.distance()
    reach = 0.16 * radius * light
    shadow = shape.distance((reach[0], reach[1]))
    window *= 1 - 0.5 * _smoothstep(0.4 - shadow / (0.35 * radius))[..., None]
    texture = _draw_texture(str(rng.choice(["plain", "gradient", *GROUNDS])), rng, dx, dy, pixel, radius)
    # A hue unlike the grounds', so that the shape stands out.
    first, second = _draw_colours(rng, hue + rng.uniform(0.2, 0.8), saturation=(0.5, 0.95), value=(0.45, 1))
    bevel = 0.72 + 0.28 * _smoothstep(-distance / (0.25 * radius))
    shade = bevel * (1 + 0.22 * (dx * light[0] + dy * light[1]) / radius)
    colour = (first + (second - first) * texture[..., None]) * shade[..., None]
    window += (colour - window) * np.clip(0.5 - distance / pixel, 0, 1)[..., None]


def check_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width) < MIN_SIZE:
        raise UserError(f"sample images must be at least {MIN_SIZE} pixels a side, not {height}x{width}")
    return height, width


def _star(x: Array, y: Array, points: int, inner: float) -> Array:
    """Distance to a star with tips at radius 1; to a regular polygon when ``inner`` is cos(pi / points)."""
    half = np.pi / points
    radius = np.hypot(x, y)
    angle = np.abs((np.arctan2(y, x) + half) % (2 * half) - half)  # folded into half a tip
    edge = np.array([1 - inner * np.cos(half), inner * np.sin(half)], np.float32)
    edge /= np.hypot(*edge)
    return (radius * np.cos(angle) - 1) * edge[1] + radius * np.sin(angle) * edge[0]


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.3, np.maximum(x, y) - 0.95)


_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {  # signed distances, negative inside, about 1 in radius
    "disk": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.23,
    "triangle": lambda x, y: _star(x, y, 3, 0.5),
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.75,
    "star": lambda x, y: _star(x, y, 5, 0.45),
    "cross": _cross,
}


def _draw_grounds(rng: np.random.Generator, x: Array, y: Array, pixel: float) -> tuple[Array, Array, float]:
    """Draw two grounds that meet in a wavy line, often outside the image.

    Returns:
        canvas float32 [H, W, 3]; labels uint8 [H, W], 1 for the first of `GROUNDS`, 0 where two blend; mean hue.
    """
    across, along = _draw_direction(rng), _draw_direction(rng)
    offset, phase, wave = rng.uniform(-0.6, 0.6), rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.06)
    distance = (x - x.mean()) * across[0] + (y - y.mean()) * across[1] - offset
    distance += wave * np.sin(12 * (x * along[0] + y * along[1]) + phase)
    blend = np.clip(0.5 + distance / max(3 * pixel, 0.03), 0, 1)
    kinds = rng.permutation(len(GROUNDS))[:2]
    hue, difference = rng.uniform(), rng.uniform(-0.08, 0.08)
    layers = []
    for kind, ground_hue in zip(kinds, (hue - difference, hue + difference), strict=True):
        texture = _draw_texture(GROUNDS[kind], rng, x, y, pixel, 0.5)[..., None]
        first, second = _draw_colours(rng, ground_hue, saturation=(0.15, 0.5), value=(0.45, 0.95))
        layers.append(first + (second - first) * texture)
    canvas = layers[0] + (layers[1] - layers[0]) * blend[..., None]
    labels = np.where(blend == 0, kinds[0] + 1, np.where(blend == 1, kinds[1] + 1, 0))
    return canvas, labels.astype(np.uint8), hue


def _draw_texture(kind: str, rng: np.random.Generator, x: Array, y: Array, pixel: float, size: float) -> Array:
    """Draw an anti-aliased pattern in 0..1 at positions x, y [H, W], for a surface of about ``size``."""
    axis = _draw_direction(rng)
    u, v = x * axis[0] + y * axis[1], y * axis[0] - x * axis[1]
    period = max(rng.uniform(0.25, 0.5) * size, 0.07)
    slope = 2 * np.pi * pixel / period  # of the sine, a pixel
    match kind:
        case "plain":
            return np.zeros_like(x)
        case "gradient":
            return _smoothstep(0.5 + u / (2 * size))
        case "clouds":
            return _draw_clouds(rng, *x.shape)
        case "stripes":
            return np.clip(0.5 + np.sin(u * (2 * np.pi / period)) / slope, 0, 1)
        case "checks":
            return np.clip(0.5 + np.sin(u * (np.pi / period)) * np.sin(v * (np.pi / period)) / slope, 0, 1)
        case "dots":
            u, v = (w / period - np.round(w / period) for w in (u, v))
            return np.clip(0.5 + (0.28 - np.hypot(u, v)) * period / pixel, 0, 1)
    raise ValueError(kind)


def _draw_clouds(rng: np.random.Generator, height: int, width: int) -> Array:
    """Smooth noise of three octaves, [height, width] in 0..1."""
    total = np.zeros((height, width), np.float32)
    for cells, weight in ((3, 0.6), (6, 0.3), (12, 0.15)):
        grid = rng.random((cells, cells), dtype=np.float32)
        total += weight * np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip((total - 0.25) / 0.55, 0, 1)


def _draw_colours(
    rng: np.random.Generator, hue: float, *, saturation: tuple[float, float], value: tuple[float, float]
) -> tuple[Array, Array]:
    """Two related colours, each [3] in 0..1, one lighter than the other."""
    s, v = rng.uniform(*saturation), rng.uniform(*value)
    shift = rng.uniform(0.18, 0.4) * (-1 if v > 0.65 else 1)
    near = (hue + rng.uniform(-0.08, 0.08)) % 1, s * rng.uniform(0.6, 1), v + shift
    first, second = colorsys.hsv_to_rgb(hue % 1, s, v), colorsys.hsv_to_rgb(*near)
    return np.array(first, np.float32), np.array(second, np.float32)


def _draw_direction(rng: np.random.Generator) -> Array:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


def _smoothstep(t: Array) -> Array:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _box(mask: Mask) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
