"""What the documents point at exists, and the commands that they show are understood."""

import re
from pathlib import Path

import pytest

from itpn.commands.parsing import read_fields
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
