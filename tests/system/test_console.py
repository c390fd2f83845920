"""Tables of 80 columns."""

import io
from pathlib import Path

import pytest

from itpn.system.console import Output, make_table

LONG = "/data/my photos/" + "a-folder-of-a-long-name/" * 4 + "model.safetensors"


@pytest.mark.parametrize(
    "value", [Path(LONG), LONG.replace(" ", "-"), Path("runs/with blanks in/its name/" + "x" * 28)]
)
def test_paths_stay_in_one_piece(value):
    page = io.StringIO()
    Output(file=page, width=80).print(make_table(f"of {LONG}", {"weights": value, "loss": "0.1234 [bold]"}))
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    assert lines[0] == f"of {LONG}"
    assert sum(str(value) in line for line in lines[1:]) == 1
    assert sum("0.1234 [bold]" in line for line in lines) == 1
    assert max(map(len, lines[1:-1])) <= 80


def test_a_path_that_fits_stays_in_the_table():
    """Texts of several words are wrapped."""
    page = io.StringIO()
    rows = {"weights": Path("runs/classifier_small/default/model.safetensors"), "note": "some words " * 20}
    Output(file=page, width=80).print(make_table("finished", rows))
    lines = page.getvalue().splitlines()
    assert "│ weights │ runs/classifier_small/default/model.safetensors " in page.getvalue()
    assert len(lines) == 8
    assert max(map(len, lines)) == 80
