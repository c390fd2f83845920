"""What the documents point at exists, and the commands that they show are understood."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from pydicom.data import get_testdata_file

from itpn.cli import COMMANDS, main
from itpn.commands.options import RecipeCommand
from itpn.commands.parsing import parse, parse_with_recipe, read_fields
from itpn.tasks.recipe_files import list_recipes
from itpn.tasks.spec import all_tasks

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_files_of_the_repository_exist(page):
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_*]+\.py)`", page.read_text()):
        assert any(list(folder.glob(name)) for folder in (ROOT, ROOT / "src/itpn")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_options_and_recipes_exist(page):
    text = page.read_text()
    known = {option for task in all_tasks() for field in read_fields(task.config) for option in field.options}
    for option in re.findall(r"--(?:model|teacher|data|optimizer|trainer|probe|evaluation)\.[a-z0-9-]+", text):
        assert option in known, option
    for recipe in re.findall(r"(?<![\w-])(?:fast-)?itpn-[a-z]+_[\w-]*\w", text):
        assert recipe in list_recipes() or recipe.endswith("coslr"), recipe


def read_commands(page: str, section: str = "") -> list[list[str]]:
    """The words of each command of ours in the code blocks of a page, from a section on."""
    text = (ROOT / "docs" / page).read_text()
    lines = text[text.index(section) :].replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ "))[1:] for line in lines if re.match(r"(\$ )?itpn [a-z]+ ", line)]


SHOWN = read_commands("scientific_images.md")


@pytest.mark.parametrize("words", SHOWN, ids=map(" ".join, SHOWN))
def test_commands_are_understood(words):
    command = COMMANDS[words[0]]
    if issubclass(command, RecipeCommand):
        parsed = parse_with_recipe(command, words[1:], "itpn")
        assert parsed.recipe == words[1]
        if words[0] == "train":
            parsed.config.check()
    else:
        parse(command, words[1:], "itpn")


def test_dicom_arrays_and_ome_tiff_take_one_command_each(tmp_path, monkeypatch):
    """As the page shows them, on small files."""
    monkeypatch.chdir(tmp_path)
    folders = ["data/ct", "data/arrays", "data/ome"]
    for folder in folders:
        Path(folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(2):
        shutil.copy(get_testdata_file("CT_small.dcm", download=False), f"data/ct/IM{number:04}")
        np.save(f"data/arrays/{number}.npy", rng.integers(0, 3000, (64, 64, 12), dtype=np.int16))
        stains = rng.integers(0, 3000, (2, 64, 64), dtype=np.uint16)
        tifffile.imwrite(f"data/ome/{number}.ome.tif", stains, metadata={"axes": "CYX"})
    commands = [words for words in read_commands("scientific_images.md") if words[3:4] and words[3] in folders]
    assert [words[3] for words in commands] == folders
    small = ["--data.num-workers", "0", "--data.batch-size", "2", "--trainer.max-steps", "1"]
    for words in commands:
        assert main([*words, *small, "--trainer.accelerator", "cpu"]) == 0
        assert Path("runs/itpn-pixel_nano", words[words.index("--name") + 1], "model.safetensors").is_file()
