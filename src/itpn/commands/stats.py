"""`itpn stats`: what the pixels of a folder's images are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from itpn.commands.options import Members, of_data, shown
from itpn.data.files import find_training_images
from itpn.data.image_type import check_value_range
from itpn.errors import UserError
from itpn.system.checks import PositiveInt

NODATA = "Value of pixels without data; NaN always is, and what a GeoTIFF declares."
AXES = "Order of the axes of arrays (.npy, .npz, HDF5)."
RANGE = "Values that become 0 and 1: dtype; LOW HIGH; or PLOW% PHIGH%."
BANDS = "Of images in one file a band: the ends of the files' names, as B02.tif B03.tif."
USUAL_RANGE = "dtype of 8 bits, 0.1% 99.9% of others"


@dataclass(frozen=True)
class Stats:
    """Compute mean, std, percentiles and the fraction without data of the channels of images, and write stats.json.

    `itpn train` takes mean, std and value range from the stats.json of its --data.root, where they are not given and
    the images are no photographs of 8 bits; without one, or after the images have changed, it computes them from 512 of
    the images.
    """

    images: Annotated[Positional[str], shown("DIR")]
    """Folder of images, as --data.root; of one that is divided into train and others, the training images."""
    out: Annotated[Path | None, shown("FILE", "(default: stats.json in DIR)")] = None
    """File for the numbers."""
    sample: Annotated[PositiveInt | None, shown("N", "(default: all images)")] = None
    """Read so many images, evenly spaced over folders and shards."""
    value_range: Annotated[tuple[str, ...], of_data("value-range", "VALUE [VALUE ...]", USUAL_RANGE, RANGE)] = ()
    nodata: Annotated[float | None, of_data("nodata", "VALUE", "what the files declare", NODATA)] = None
    axes: Annotated[Literal["CHW", "HWC"] | None, of_data("axes", "CHW|HWC", "channels are the shorter axis", AXES)] = (
        None
    )
    bands: Annotated[tuple[str, ...], of_data("bands", "END [END ...]", "images of one file each", BANDS)] = ()
    members: Members = ()
    max_pixels: Annotated[
        PositiveInt | None, of_data("max-pixels", "N", "2**27", "Images of more pixels are skipped.")
    ] = None

    def run(self) -> None:
        check_value_range(self.value_range)
        source = find_training_images((self.images,), self.members, self.bands)
        if source.cache:
            raise UserError(f"{self.images} holds cached features: give the folder of the images")
        from itpn.data.decode import MAX_PIXELS
        from itpn.data.stored import ReadSettings
        from itpn.tasks.statistics import report_statistics

        if self.out is None and not Path(self.images).is_dir():
            raise UserError(f"{self.images} is no folder, into which the numbers could be written: give --out FILE")
        out = Path(self.images, "stats.json") if self.out is None else self.out
        reading = ReadSettings(self.max_pixels or MAX_PIXELS, self.axes, self.nodata)
        report_statistics(source, self.images, reading, self.value_range, self.sample, out)
