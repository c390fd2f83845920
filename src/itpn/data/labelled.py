"""Images with class labels: class folders, tar shards with .cls, parquet files; training and validation splits."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from itpn.data.class_names import are_numbers, join_names, read_class_names
from itpn.data.decode import UnreadableImage
from itpn.data.file_types import (
    CLASSES,
    COMMON_SUFFIXES,
    describe_unread,
    is_array,
    is_image_file,
    is_shard,
    is_table,
)
from itpn.data.files import check_root
from itpn.data.members import list_endings, split_name
from itpn.data.readers import FileReader, Reader, Subset, TableReader, TarReader
from itpn.data.shards import index_shard
from itpn.data.walk import Division, find_division, list_files, list_folders, list_images
from itpn.errors import UserError
from itpn.seeding import derive_seed
from itpn.system.text import as_class

MAX_CLASSES = 10**6  # class indices in shards are below this


@dataclass(frozen=True)
class LabelledImages:
    """Images in a fixed order, each with its class.

    Attributes:
        files: the encoded images.
        labels: class indices, int64 [n].
        classes: names.
        notes: what was left out or is ambiguous, a line each.
    """

    files: Reader
    labels: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[str, bytes | UnreadableImage, int]:
        """Name, encoded image or the error of reading it, and class index."""
        name, data = self.files[index]
        return name, data, int(self.labels[index])

    def name(self, index: int) -> str:
        """See :class:`itpn.data.readers.Reader`."""
        return self.files.name(index)

    def key(self, index: int) -> str:
        """The name of an image without the folders above its class, by which it is drawn wherever the set is."""
        return f"{self.classes[self.labels[index]]}/{os.path.basename(self.files.name(index))}"

    def take(self, indices: np.ndarray) -> "LabelledImages":
        """Some of the images."""
        return replace(self, files=Subset(self.files, indices), labels=self.labels[indices])

    def rename(self, classes: Sequence[str]) -> "LabelledImages":
        """The same images with the class indices of another list of classes.

        Raises:
            UserError: a class with images is not in the list.
        """
        if self.classes == tuple(classes):
            return self
        indices = {name: index for index, name in enumerate(classes)}
        present = [self.classes[label] for label in np.unique(self.labels)]
        if unknown := [name for name in present if name not in indices]:
            raise UserError(
                f"{join_names(unknown)} among the classes of the images, but not of the model, whose are "
                f"{join_names(classes)}{_hint(present)}"
            )
        new = np.array([indices.get(name, -1) for name in self.classes])
        return replace(self, labels=new[self.labels], classes=tuple(classes))


def find_labelled(
    roots: Sequence[str],
    val_roots: Sequence[str] | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
    members: Sequence[str] = (),
    bands: Sequence[str] = (),
) -> tuple[LabelledImages, LabelledImages | None]:
    """Find the training and the validation images, with the same classes.

    A root has ``train`` and ``val``, or else ``test`` (by any name that `itpn.data.splits` knows): folders of class
    folders or of tar shards, or words in the names of shards or parquet files. Or it has class folders only.

    Args:
        members: suffixes of the images in shards, see `itpn.data.members.Choice`.
        bands: of images in one file a band, see `itpn.data.bands.join_bands`.
        val_roots: roots of the validation images, if they are elsewhere.
        val_fraction: if there are no validation images, this fraction of each class is held out; ``seed`` draws it.

    Returns:
        The training images; the validation images, or None if there are none.

    Raises:
        UserError: no such data, an empty class, fewer than two classes, or a class that is in the validation images
            alone.
    """
    train = read_split(roots, "train", members=members, bands=bands)
    assert train is not None  # which is not optional
    counts = np.bincount(train.labels, minlength=len(train.classes))
    where = ", ".join(roots)
    if len(train) and 0 in counts:
        empty = train.classes[int(counts.argmin())]
        raise UserError(f"class {empty} in {where} has no images: add some, or remove it")
    if len(train.classes) < 2:
        raise UserError(
            f"{where} holds {_count(len(train), 'image')} of {_count(len(train.classes), 'class')}: a classifier needs "
            "two classes, a folder each"
        )
    val = read_split(val_roots or roots, "val", optional=val_roots is None, members=members, bands=bands)
    if val is None:
        if not val_fraction:
            return train, None
        held_out = draw_fraction(train, val_fraction, seed)
        held_out = held_out[counts[train.labels[held_out]] > 1]  # a class must not lose its only image
        if not len(held_out):
            raise UserError(f"{where} holds an image of each class: none can be held out; give --data.val-fraction 0")
        rest = np.setdiff1d(np.arange(len(train)), held_out)
        return train.take(rest), train.take(held_out)
    unknown = [val.classes[label] for label in np.unique(val.labels) if val.classes[label] not in train.classes]
    if unknown:
        raise UserError(
            f"{join_names(unknown)} among the classes to evaluate on, but not to train on in {where}: the same names "
            f"are needed in both{_hint(unknown)}"
        )
    return train, val.rename(train.classes)


def read_split(
    roots: Sequence[str],
    split: str,
    optional: bool = False,
    members: Sequence[str] = (),
    bands: Sequence[str] = (),
) -> LabelledImages | None:
    """The images of one split, ``train`` or ``val``, of some roots, or of roots without splits.

    Args:
        members, bands: as of :func:`find_labelled`.

    Returns:
        None if there is no such split and it is ``optional``.

    Raises:
        UserError: there is no such split, or it has no images in folders of classes.
    """
    for root in roots:
        wanted = "a folder of class folders, tar shards or parquet files"
        check_root(root, wanted, ", a tar shard nor a parquet file", lambda root: is_shard(root) or is_table(root))
    divisions = [find_division(root) for root in roots]
    notes = tuple(division.note for division in divisions if division.note and split == "train")
    found = _find_split(roots, divisions, split)
    if found is None:
        if optional:
            return None
        if split == "train" and (other := _find_split(roots, divisions, "val")) is not None:
            raise UserError(f"{other[0]} is to evaluate on, but there is nothing called train beside it to train on")
        found = list(roots)  # class folders, or files of any name
    folders = [path for path in found if os.path.isdir(path)]
    files = [path for path in found if os.path.isfile(path)]
    files += [path for folder in folders for path in list_files(folder)]
    shards = [path for path in files if is_shard(path)]
    tables = [path for path in files if is_table(path)]
    if bands and (shards or tables):
        kind = "tar shards" if shards else "parquet files"
        raise UserError(f"--data.bands is for images in files, not for {kind}: leave it out")
    if shards:
        images = _read_shards(shards, [*folders, *(root for root in roots if os.path.isdir(root))], members)
    elif tables:
        images = _read_tables(tables)
    else:
        images = _read_folders(folders, bands)
    return replace(images, notes=(*notes, *images.notes))


def _find_split(roots: Sequence[str], divisions: Sequence[Division], split: str) -> list[str] | None:
    """Folders and files of a split. The test set is taken for validation only if there is no validation set.

    Raises:
        UserError: one root has training images and another has not.
    """
    for name in (split, "test") if split == "val" else (split,):
        places = [division.places.get(name, []) for division in divisions]
        if any(places):
            if name == "train" and not all(places):
                without = next(root for root, own in zip(roots, places, strict=True) if not own)
                raise UserError(
                    f"{without} has nothing called train, unlike another --data.root: give roots of one kind"
                )
            return [path for own in places for path in own]
    return None


def _read_folders(folders: Sequence[str], bands: Sequence[str]) -> LabelledImages:
    """Read class folders, with images at any depth."""
    places: dict[str, list[str]] = {}  # by name of the class
    for folder in folders:
        for place in list_folders(folder):
            places.setdefault(as_class(os.path.basename(place)), []).append(place)
    classes = sorted(places)
    if classes and "train" in find_division(first := places[classes[0]][0]).places:
        raise UserError(
            f"{first} is divided into training and other images: give folders train and val that hold a folder for "
            "each class"
        )
    paths: list[str] = []
    labels: list[int] = []
    unread: Counter[str] = Counter()
    for label, name in enumerate(classes):
        for place in places[name]:
            found = list_images(place, unread, bands)
            paths += found
            labels += [label] * len(found)
    where = ", ".join(folders)
    for folder in folders:
        loose = [path for path in list_files(folder) if is_image_file(path) and not is_array(path)]
        if loose and not paths:
            raise UserError(f"{folder} holds images ({os.path.basename(loose[0])}), but no folder for each class")
        if loose and classes:
            raise UserError(f"{loose[0]} is in no class folder; {folder} holds a folder for each class")
    if not paths:
        hint = f" of images ({COMMON_SUFFIXES})" if classes else ", tar shards with .cls or parquet files"
        raise UserError(f"{where} holds no class folders{hint}{describe_unread(unread, '; ')}")
    notes = tuple(filter(None, [describe_unread(unread, f"{where}: ")]))
    return LabelledImages(FileReader(paths), np.array(labels, dtype=np.int64), tuple(classes), notes)


def _read_shards(shards: Sequence[str], folders: Sequence[str], members: Sequence[str]) -> LabelledImages:
    """Read pairs of an image and its class, ``NAME.jpg`` and ``NAME.cls``, as in WebDataset."""
    places, names, texts = [], [], []
    left, unread = Counter[str](), Counter[str]()
    for number, path in enumerate(shards):
        for name, start, size, label in index_shard(path, members, left, unread):
            if label is None:
                key = os.path.basename(split_name(name)[0])
                note = describe_unread(unread, "; ")  # it may be a link
                raise UserError(f"{name} in {path} has no {key}.cls beside it: its class is unknown{note}")
            if not label:
                key = split_name(name)[0]
                raise UserError(f"{key}.cls in {path} is empty: its image has no class")
            places.append((number, start, size))
            names.append(f"{os.path.basename(path)}/{name}")
            texts.append(as_class(label))
    if not places:
        raise UserError(f"no images with .cls in the shards ({shards[0]} ...){describe_unread(unread, '; ')}")
    classes = read_class_names(folders, texts)
    if are_numbers(texts):
        if negative := next((text for text in texts if text.startswith("-")), None):
            raise UserError(f"class {negative} in the shards ({shards[0]} ...): leave images without a class out")
        numbers = [int(text) for text in texts]
        if max(numbers) >= MAX_CLASSES:
            raise UserError(f"class {max(numbers)} in the shards ({shards[0]} ...): it must be below {MAX_CLASSES:,}")
        if classes is None:
            classes = [str(number) for number in range(max(numbers) + 1)]
        if max(numbers) >= len(classes):
            raise UserError(f"class {max(numbers)} in the shards ({shards[0]} ...), but {CLASSES} has {len(classes)}")
    else:
        classes = sorted(set(texts)) if classes is None else classes
        if unknown := sorted(set(texts) - set(classes)):
            raise UserError(f"class {unknown[0]!r} in the shards ({shards[0]} ...) is not in {CLASSES}")
        places_of = {name: number for number, name in enumerate(classes)}
        numbers = [places_of[text] for text in texts]
    reader = TarReader(shards, np.array(places, dtype=np.int64), names)
    notes = [f"not read of the shards: {list_endings(left)} (see --data.members)"] if left else []
    notes.append(describe_unread(unread, f"shards ({shards[0]} ...): "))
    return LabelledImages(reader, np.array(numbers, dtype=np.int64), tuple(classes), tuple(filter(None, notes)))


def _read_tables(files: Sequence[str]) -> LabelledImages:
    """Read a data set of Hugging Face, as parquet files."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("parquet files need the library `datasets`: pip install 'itpn[datasets]'") from error
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset("parquet", data_files=list(files), split="train")
    except Exception as error:  # its libraries raise many types
        raise UserError(f"{files[0]} cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
    features = table.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images += [name for name in ("image", "img") if name in features and name not in images]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels += [name for name in ("label", "labels", "fine_label", "class") if name in features and name not in labels]
    if not images or not labels:
        raise UserError(f"{files[0]} needs a column of images and one of labels; it has {', '.join(features)}")
    values, feature = table[labels[0]], features[labels[0]]
    try:
        table = table.cast_column(images[0], datasets.Image(decode=False)).select_columns([images[0]])
    except Exception as error:  # its libraries raise many types
        raise UserError(f"column {images[0]} of {files[0]} holds no images ({type(error).__name__})") from error
    if any(value is None or (isinstance(value, int) and value < 0) for value in values):
        raise UserError(f"column {labels[0]} of {files[0]} lacks labels (as test sets' do): leave the file out")
    if isinstance(feature, datasets.ClassLabel):
        classes, numbers = list(feature.names), list(values)
    elif all(isinstance(value, int) for value in values) and max(values) < 10 * len(values):
        classes, numbers = [str(number) for number in range(max(values) + 1)], list(values)
    else:
        names, indices = np.unique([str(value) for value in values], return_inverse=True)
        classes, numbers = names.tolist(), indices.tolist()
    return LabelledImages(TableReader(table, images[0]), np.array(numbers, dtype=np.int64), tuple(classes))


def draw_fraction(images: LabelledImages, fraction: float, seed: int) -> np.ndarray:
    """Draw a fraction of each class, at least one image of each; indices in ascending order.

    The draw depends on seed and name of each image: moving the folder or adding images changes it little.
    """
    # "share" is part of the seed: another word would draw other images
    order = np.array([derive_seed(seed, "share", images.key(index)) for index in range(len(images))], dtype=np.uint64)
    chosen = []
    for label in range(len(images.classes)):
        own = np.flatnonzero(images.labels == label)
        if len(own):
            chosen.append(own[np.argsort(order[own], kind="stable")][: max(1, round(fraction * len(own)))])
    return np.sort(np.concatenate(chosen))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('s') else 's'}"


def _hint(names: Sequence[str]) -> str:
    """A hint for classes that are named by numbers."""
    return f"; shards take names from a {CLASSES} beside them" if all(name.isdigit() for name in names) else ""
