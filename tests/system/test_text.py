"""Text files in the encodings that editors write, and file names of any bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import itpn
from itpn.errors import UserError
from itpn.system.text import as_file_name, decode_text, one_line, read_lines, read_text, readable
from itpn.system.writing import open_whole
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.recipe_files import read_recipe
from itpn.training.config import write_yaml

ROOT = Path(itpn.__file__).parents[1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(end.join(["größe", " b ", "漢", "", ""]).encode(encoding))
    assert read_text(path) == "größe\n b \n漢\n\n"
    assert read_lines(path) == ["größe", "b", "漢"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a\ncafé\n".encode("latin-1"), r"byte 0xe9 in line 2\): save it as UTF-8"),
        ("größe".encode("utf-16-le"), "byte 0xf6 in line 1"),
        ("ab".encode("utf-16-le"), "line 1 holds a zero byte"),
        (b"\xef\xbb\xbfa\n\xff", "byte 0xff in line 2"),
    ],
)
def test_other_encodings_are_refused_in_a_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.txt is not text in UTF-8 \({reason}") as error:
        read_text(tmp_path / "x.txt")
    assert "\n" not in str(error.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.txt does not exist"):
        read_text(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match="is a folder, not a text file"):
        read_text(tmp_path)


def test_names_of_any_bytes() -> None:
    name = os.fsdecode(b"caf\xe9\n[red].jpg")
    assert readable(name) == "caf\\xe9\n[red].jpg"
    assert one_line(name) == "caf\\xe9\\n[red].jpg"
    assert one_line("größe\x1b\u2028") == "größe\\x1b\\u2028"
    assert readable("half \ud800") == "half \\ud800"
    assert as_file_name("größe") == "größe"
    assert decode_text(b"", "x") == ""


def test_the_locale_does_not_matter(tmp_path: Path) -> None:
    """Where Python takes file names and files for ASCII, UTF-8 is still UTF-8."""
    path = tmp_path / "größe.txt"
    path.write_text("größe\n", encoding="utf-8")
    code = (
        "import sys; from itpn.system.text import *; path = as_file_name('größe.txt'); "
        "print(sys.getfilesystemencoding(), ascii(readable(path)), ascii(read_lines(path)))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    found = subprocess.check_output([sys.executable, str(script)], cwd=tmp_path, env=environment, text=True)
    assert found == "ascii 'gr\\xf6\\xdfe.txt' ['gr\\xf6\\xdfe']\n"


def test_settings_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    write_yaml(path, "mine", PretrainingConfig())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_recipe(str(path)) == ("mine", PretrainingConfig())
    path.write_bytes("recipe: caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.yml is not text in UTF-8"):
        read_recipe(str(path))


@pytest.mark.parametrize("name", ["a" * 251 + ".csv", "ü" * 120 + ".csv", "x" * 99 + "ü.csv"])
def test_files_of_the_longest_names_are_written(tmp_path, name):
    """The unfinished file has a shorter name, cut within a character where that falls so."""
    with open_whole(tmp_path / name) as file:
        (partial,) = os.listdir(tmp_path)
        assert len(os.fsencode(partial)) <= 104
        assert partial.endswith(".tmp")
        file.write(b"1")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"1"
