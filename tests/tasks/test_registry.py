"""Tasks are known by what they register: nothing outside their folders names one."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

import itpn
from itpn import tasks
from itpn.cli import main
from itpn.errors import UserError
from itpn.models import heads as heads_module
from itpn.models.heads import heads
from itpn.tasks import spec
from itpn.tasks.recipe_files import read_recipe
from itpn.tasks.spec import TaskSpec, all_tasks, register_task
from itpn.training.config import RunConfig

SOURCE = Path(itpn.__file__).parent
# words of others, not of tasks: a key of COCO's annotations, part of a shard's member names, a pipeline tag of the hub
OF_FORMATS = {*((folder, "segmentation") for folder in ("data", "metrics")), ("checkpoints", "image-classification")}


def find_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name, attribute, import and string of a module but its docstrings, with its line."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name
            if node.name.startswith("itpn.tasks."):
                yield node.lineno, node.name.split(".")[2]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("itpn.tasks."):
            yield node.lineno, node.module.split(".")[2]
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.lineno, node.arg


def is_own(kind: object) -> bool:
    """Whether a class of settings stands in a task's folder."""
    return isinstance(kind, type) and kind.__module__.startswith("itpn.tasks.") and kind.__module__.endswith(".config")


def test_no_module_outside_the_tasks_names_one():
    own = [task for task in all_tasks() if task.config.__module__.startswith("itpn.")]
    assert len(own) >= 4
    forbidden = {name for task in own for name in (task.name, task.config.__name__)}
    forbidden |= {kind.__name__ for task in own for kind in get_type_hints(task.config).values() if is_own(kind)}
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        if SOURCE / "tasks" not in path.parents
        for line, name in find_names(ast.parse(path.read_text(encoding="utf-8")))
        if forbidden & set(re.findall(r"\w+", name)) and (path.relative_to(SOURCE).parts[0], name) not in OF_FORMATS
    ]
    assert not found, "\n".join(found)


# what runs any task; networks, data, metrics and checkpoints are of a kind
BLIND = ("commands", "training", "system", "cli.py", "__init__.py", "distributed.py", "errors.py")
WORDS = re.compile(r"pre-?training|classifier|detector|segmenter|classification|detection|segmentation", re.IGNORECASE)


def find_texts(tree: ast.AST, with_helps: bool) -> Iterator[tuple[int, str]]:
    """Strings that a user may read: without docstrings, and the help of settings only with ``with_helps``."""
    own = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, own)]
    left_out = {
        id(line.value)
        for body in bodies
        for number, line in enumerate(body)
        if isinstance(line, ast.Expr) and (number == 0 or not with_helps)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.lineno, node.value


def test_messages_name_no_task():
    """What holds for tasks is asked of them. Helps of a command may name some as examples, those of settings may not:
    every task has these.
    """
    files = [path for path in sorted(SOURCE.rglob("*.py")) if path.relative_to(SOURCE).parts[0] in BLIND]
    assert len(files) > 30
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {text}"
        for path in files
        for line, text in find_texts(
            ast.parse(path.read_text(encoding="utf-8")), SOURCE / "commands" not in path.parents
        )
        if WORDS.search(text)
    ]
    assert not found, "\n".join(found)


def test_words_that_are_looked_for_are_found():
    """The test above can fail."""
    code = 'class A:\n    """detector"""\n    a = 1\n    """a segmenter"""\n    b = f"{a} of a classifier"\n'
    for helps, found in {True: [4, 5], False: [5]}.items():
        assert [line for line, text in find_texts(ast.parse(code), helps) if WORDS.search(text)] == found


def test_names_that_are_looked_for_are_found():
    """The test above can fail."""
    code = 'def f(c):\n    """detection"""\n    return c.task == "detection" or isinstance(c, DetectionConfig)\n'
    assert [name for _, name in find_names(ast.parse(code)) if "etection" in name] == ["detection", "DetectionConfig"]
    code = 'PURPOSES = {"pyramid": "detection, segmentation"}'
    assert "detection, segmentation" in [name for _, name in find_names(ast.parse(code))]
    code = "from itpn.tasks.detection.config import X"
    assert "detection" in [name for _, name in find_names(ast.parse(code))]


@pytest.mark.parametrize("task", all_tasks(), ids=lambda task: task.name)
def test_every_part_of_a_task_can_be_imported(task):
    """Parts are named by module and function, which nothing else checks."""
    for field, part in vars(task).items():
        if hasattr(part, "load"):
            assert callable(part.load()), field
    head = heads()[task.name]
    assert head.purpose
    assert head.parts


@pytest.mark.parametrize("task", all_tasks(), ids=lambda task: task.name)
def test_settings_that_may_change_are_settings_of_the_task(task):
    sections = get_type_hints(task.config)
    for section, names in task.config.free.items():
        if section in {field.name for field in dataclasses.fields(task.config)}:
            assert names <= {field.name for field in dataclasses.fields(sections[section])}


TWIN = """
import dataclasses
import itpn
from itpn.tasks.classification import TASK
from itpn.tasks.configs import ClassificationConfig

class Config(ClassificationConfig):
    task = "{name}"

itpn.register_task(dataclasses.replace(TASK, name="{name}", config=Config))
config = Config()
"""


@pytest.fixture
def registries(monkeypatch):
    """What a test registers is known in it only."""
    monkeypatch.setattr(spec, "_TASKS", dict(spec._TASKS))
    monkeypatch.setattr(heads_module, "_HEADS", dict(heads_module._HEADS))
    spec.load_installed_tasks.cache_clear()
    yield
    spec.load_installed_tasks.cache_clear()


def test_a_recipe_file_registers_its_task_again(tmp_path, registries):
    """A run that resumes reads it again, as it may have changed."""
    (tmp_path / "own.py").write_text(TWIN.format(name="own"))
    first, again = (read_recipe(str(tmp_path / "own.py"))[1] for _ in range(2))
    assert type(first) is not type(again)
    assert spec.find_task("own").config is type(again)


@pytest.mark.parametrize("name", ["own", "classification"])
def test_a_name_is_registered_by_one_module(tmp_path, registries, capsys, name):
    """A second one would take the task's files."""
    for file in ("first.py", "second.py"):
        (tmp_path / file).write_text(TWIN.format(name=name))
    if name == "own":
        read_recipe(str(tmp_path / "first.py"))
    before = spec.find_task(name)
    assert main(["info", str(tmp_path / "second.py")]) == 2
    owner = tmp_path / "first.py" if name == "own" else tasks.__file__
    message = f"ValueError: {owner} has registered a task {name!r} already: choose another name"
    assert capsys.readouterr().err.splitlines() == [
        f"itpn: recipe file {tmp_path / 'second.py'} does not run: {message}"
    ]
    assert spec.find_task(name) is before


def install(folder: Path, name: str, module: str) -> None:
    """A package of one module with a task."""
    (folder / f"{name}.py").write_text(module)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[itpn.tasks]\nmine = {name}:TASK\n")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("TASK = 1", "AttributeError: 'int' object has no attribute 'config'"),
        (TWIN.format(name="classification"), f"ValueError: {tasks.__file__} has registered a task 'classification'"),
    ],
)
def test_an_installed_package_that_cannot_register_its_task(tmp_path, registries, monkeypatch, capsys, module, reason):
    name = f"broken_{len(module)}"
    install(tmp_path, name, module)
    monkeypatch.syspath_prepend(tmp_path)
    message = f"the installed package {name} cannot register its task mine; mend or uninstall it: {reason}"
    assert main(["inspect", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"itpn: {message}")
    with pytest.raises(UserError, match=re.escape(message)):
        itpn.load(tmp_path / "model.safetensors")


def test_two_installed_packages_of_one_task(tmp_path, registries, monkeypatch):
    for name in ("twin_a", "twin_b"):
        install(tmp_path, name, TWIN.format(name="twin").replace("itpn.register_task", "TASK = "))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"twin_[ab]\.py has registered a task 'twin' already"):
        spec.load_installed_tasks()


def test_a_spec_and_its_settings_have_one_name():
    class OtherConfig(RunConfig):
        task = "other"

    first = all_tasks()[0]
    with pytest.raises(ValueError, match=r"OtherConfig\.task is 'other'"):
        register_task(TaskSpec(**{**vars(first), "config": OtherConfig}))
