"""Reader of COCO's layout."""

import json
import re
from pathlib import Path

from itpn.data.invalid import InvalidAnnotations
from itpn.data.layouts import Coco, ImageRules, Parts, search_folders
from itpn.data.splits import SPLITS
from itpn.data.walk import split_places
from itpn.errors import UserError
from itpn.system.text import decode_text, read_bounded

MAX_JSON = 2**33  # bytes: Objects365, the largest public set, has 6 GB


def read_coco(root: Path, split: str, invalid: InvalidAnnotations, rules: ImageRules) -> Parts | None:
    """Read COCO's layout: a JSON file for each split; ``root`` may be such a file."""
    file = root if root.is_file() else _find_json(root, split)
    if file is None:
        return None
    places = [file.parent]
    if file.parent.name == "annotations":
        root = file.parent.parent
        year = re.sub("^(instances|image_info)_", "", file.stem, flags=re.IGNORECASE)
        word = re.match(r"[A-Za-z]*", year)[0]  # type: ignore[index]  # matches anything
        names = dict.fromkeys([year, year.replace("-dev", ""), word, word.lower()])
        places = [*(root / name for name in names if name), root / "images" / year]
    return _read_json(file), search_folders([*places, root / "images", root], rules.bands), str(file)


def _find_json(root: Path, split: str) -> Path | None:
    for word in SPLITS[split]:
        notes = root / "annotations"
        files = _list_json(notes, f"instances_{word}") or _list_json(notes, f"image_info_{word}")
        for folder in split_places(root, word):
            files += _list_json(folder)
        if len(files) > 1:
            raise UserError(
                f"{len(files)} annotation files for {word} in {root} ({files[0].name}, {files[1].name}): keep one, or "
                "give the file in place of the folder"
            )
        if files:
            return files[0]
    return None


def _list_json(folder: Path, start: str = "") -> list[Path]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.suffix.lower() == ".json" and path.name.lower().startswith(start)]


def _read_json(path: Path) -> Coco:
    try:
        content = json.loads(decode_text(read_bounded(path, MAX_JSON, start=b"{"), str(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    parts = ("images", "annotations", "categories")
    if isinstance(content, dict) and "images" in content:
        content.setdefault("annotations", [])  # as for the images of the test server
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in parts):
        raise UserError(f"{path} is not in COCO's form: it needs lists of images, annotations and categories")
    return content
