"""Tables and figures of the examples."""

import pytest
from presenting import COLOURS, aligned, colour, new_figure, progress

TABLE = """| | entries | cost |
|---|---|---|
| before | 0 | +0.0% |
| a long name | 1,000 | |"""


def test_columns_of_a_table_stand_under_each_other_and_hold_what_they_held():
    made = aligned(f"first\n{TABLE}\nlast").splitlines()
    assert (made[0], made[-1]) == ("first", "last")
    assert len({len(line) for line in made[1:-1]}) == 1
    assert made[3].startswith("| before      |") and made[3].endswith("  0 | +0.0% |")

    def cells(lines: list[str]) -> list[list[str]]:
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "--" not in line]

    assert cells(made[1:-1]) == cells(TABLE.splitlines())
    assert set(made[2]) == set("|-: ")
    assert aligned("no table") == "no table"


def test_a_method_has_one_colour_and_others_have_one_each():
    assert colour("wanda", 5) == COLOURS["wanda"]
    assert len({colour("another", index) for index in range(8)}) == 8
    assert len(set(COLOURS.values())) == len(COLOURS)


@pytest.mark.parametrize("columns", [1, 2])
def test_figures_have_axes_beside_each_other(columns):
    figure, axes = new_figure(6, 4, columns)
    assert figure.axes == axes and len(axes) == columns


def test_progress_is_silent_where_nobody_watches(capsys):
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
