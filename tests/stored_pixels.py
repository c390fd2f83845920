"""Images that are no photographs, for tests of what is done to their pixels."""

from itpn.data.image_type import ImageType, Pixels


def make_pixels(channels, dtype, low=(0,), high=(1,), mean=(0,), nodata=None):
    """The type and value range of images.

    Args:
        dtype: of torch.
        mean: as the pixels are stored, one number or one for each channel.
    """
    low, high, mean = (own * channels if len(own) == 1 else own for own in (low, high, mean))
    scaled = tuple((value - least) / (most - least) for value, least, most in zip(mean, low, high, strict=True))
    return Pixels(ImageType(channels, str(dtype).removeprefix("torch.")), low, high, scaled, (1.0,), nodata)
