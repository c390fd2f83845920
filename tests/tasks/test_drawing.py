"""Drawings of objects, and images beside one another."""

import torch
from PIL import Image, ImageDraw

from itpn.tasks.drawing import (
    HEADER,
    PADDING,
    caption_files,
    draw_objects,
    name_colour,
    tile_images,
)


def test_a_small_object_in_a_large_one_shows_its_colour():
    """Whichever is the likelier; torchvision paints black what two masks have in common."""
    image = torch.full((3, 320, 320), 128, dtype=torch.uint8)
    masks = torch.zeros(2, 1, 320, 320)
    masks[0, 0, 100:310, 100:310] = 1
    masks[1, 0, 200:260, 200:260] = 1
    for scores in (torch.tensor([0.9, 0.8]), torch.tensor([0.8, 0.9])):
        found = {
            "boxes": torch.tensor([[100.0, 100, 310, 310], [200, 200, 260, 260]]),
            "labels": torch.tensor([1, 2]),
            "scores": scores,
            "masks": masks,
        }
        drawn = draw_objects(image, found, ("cat", "dog"), 0.5)
        for place, label in (((150, 150), 1), ((230, 250), 2)):
            expected = [0.55 * 128 + 0.45 * value for value in name_colour(label)]
            assert all(abs(a - b) <= 1 for a, b in zip(drawn.getpixel(place), expected, strict=True))
        assert drawn.getpixel((20, 20)) == (128, 128, 128)
    found["scores"] = torch.tensor([0.9, 0.1])
    assert draw_objects(image, found, ("cat", "dog"), 0.5).getpixel((230, 250))[0] == int(
        0.55 * 128 + 0.45 * name_colour(1)[0]
    )


def test_images_have_the_names_of_their_files_below(monkeypatch):
    """Long ones without their middle; above, long titles without their end."""
    written = {}
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, place, text, **options: (written.update({place: text}), draw(self, place, text, **options)),
    )
    name = "a photo with a long name of the 28th of November.jpg"
    images = [Image.new("RGB", (100, 60), "green")] * 3
    board = tile_images(images, ["cat", name, "dog"], per_row=2, captions=caption_files(["p/1.png", f"p/{name}", "2"]))
    row = HEADER + 60 + PADDING + HEADER
    assert board.size == (2 * 104 + PADDING, 2 * row + PADDING)
    below = row - HEADER + 4
    assert (written[PADDING, below], written[PADDING, row + below]) == ("1.png", "2")
    start, _, end = written[2 * PADDING + 100, below].partition("\u2026")
    assert name.startswith(start)
    assert name.endswith(end)
    assert min(len(start), len(end)) > 4
    title = written[2 * PADDING + 100, 4]
    assert title.endswith("\u2026")
    assert name.startswith(title[:-1])
    pixels = board.crop((104 + PADDING, below - 4 + PADDING, 104 + PADDING + 100, below - 4 + HEADER))
    assert min(pixels.convert("L").tobytes()) < 100  # the text is there
    assert not any(value < 255 for value in board.crop((208, below, 212, below + 12)).convert("L").tobytes())


def test_files_of_the_same_name_are_told_apart():
    assert caption_files(["a/cat/1.png", "a/dog/1.png"]) == ["cat/1.png", "dog/1.png"]
    assert caption_files(["a/1\n.png", "b/2.png"]) == ["1\\n.png", "2.png"]
