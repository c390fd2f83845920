"""Tasks are known by what they register: nothing outside their folders names one."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

import itpn
from itpn.models.heads import heads
from itpn.tasks.spec import TaskSpec, all_tasks, register_task
from itpn.training.config import RunConfig

SOURCE = Path(itpn.__file__).parent
# a key of COCO's annotations, and part of a shard's member names: words of file formats, not of tasks
OF_FORMATS = {(folder, "segmentation") for folder in ("data", "metrics")}


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
    tasks = [task for task in all_tasks() if task.config.__module__.startswith("itpn.")]
    assert len(tasks) >= 4
    forbidden = {name for task in tasks for name in (task.name, task.config.__name__)}
    forbidden |= {kind.__name__ for task in tasks for kind in get_type_hints(task.config).values() if is_own(kind)}
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        if SOURCE / "tasks" not in path.parents
        for line, name in find_names(ast.parse(path.read_text(encoding="utf-8")))
        if name in forbidden and (path.relative_to(SOURCE).parts[0], name) not in OF_FORMATS
    ]
    assert not found, "\n".join(found)


def test_names_that_are_looked_for_are_found():
    """The test above can fail."""
    code = 'def f(c):\n    """detection"""\n    return c.task == "detection" or isinstance(c, DetectionConfig)\n'
    assert [name for _, name in find_names(ast.parse(code)) if "etection" in name] == ["detection", "DetectionConfig"]
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


def test_a_spec_and_its_settings_have_one_name():
    class OtherConfig(RunConfig):
        task = "other"

    spec = all_tasks()[0]
    with pytest.raises(ValueError, match=r"OtherConfig\.task is 'other'"):
        register_task(TaskSpec(**{**vars(spec), "config": OtherConfig}))
