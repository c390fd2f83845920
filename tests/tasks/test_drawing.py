"""Drawings of objects."""

import torch

from itpn.tasks.drawing import draw_objects, name_colour


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
