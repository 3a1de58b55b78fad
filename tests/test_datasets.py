"""The reader refuses what it cannot read, and says where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyroem import datasets
from pyroem.errors import DataError


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "table.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_shipped_data() -> None:
    assert datasets.names() == ["airquality", "earthquakes", "faithful"]
    columns, values = datasets.load("faithful")
    assert columns == ["eruptions", "waiting"]
    assert values.shape == (272, 2)
    assert values.dtype == torch.float64
    assert values[0].tolist() == [3.6, 79.0]
    columns, values = datasets.load("earthquakes", ["count"])
    assert columns == ["count"]
    assert values.shape == (107, 1)
    columns, values = datasets.load("airquality", ["Ozone", "Solar.R", "Wind", "Temp"])
    assert values.isnan().sum(0).tolist() == [37, 7, 0, 0]


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match=r"earthquakes, faithful; got 'Faitful'.*'faithful'\?"):
        datasets.load("Faitful")


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n3,4\n",
        "a;b\n1;2\n3;4\n",
        "a\tb\n1\t2\n3\t4",
        "\ufeffa,b\r\n1,2\r\n3,4\r\n",
        '"a","b"\n"1","2"\n 3 , 4e0 \n',
        "\na,b\n\n1,2\n3,4\n\n\n",
    ],
    ids=["comma", "semicolon", "tab", "BOM and CRLF", "quotes and blanks", "blank lines"],
)
def test_formats(tmp_path: Path, text: str) -> None:
    columns, values = datasets.read_csv(write(tmp_path, text))
    assert columns == ["a", "b"]
    assert values.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("x, in cm;y\n1;2\n", ["x, in cm", "y"]),
        ('"x, in cm",y\n1,2\n', ["x, in cm", "y"]),
        ('"a;b;c",y\n1,2\n', ["a;b;c", "y"]),
        ("only\n1\n2\n", ["only"]),
    ],
)
def test_delimiter_is_the_one_that_fits_the_rows(
    tmp_path: Path, text: str, names: list[str]
) -> None:
    assert datasets.read_csv(write(tmp_path, text))[0] == names


@given(
    values=st.lists(
        st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
        min_size=1,
    ),
    delimiter=st.sampled_from(datasets.DELIMITERS),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[float]], delimiter: str
) -> None:
    rows = [["a", "b", "c"], *([repr(number) for number in row] for row in values)]
    text = "\n".join(delimiter.join(row) for row in rows)
    path = write(tmp_path_factory.mktemp("csv"), text)
    assert datasets.read_csv(path)[1].tolist() == values


MIXED = "id,name,size,weight\n1,ann,,60\n2,bob,NA,70\n3,cyd,,80\n"


def test_numeric_columns_are_taken_and_the_others_named(tmp_path: Path) -> None:
    path = write(tmp_path, MIXED)
    columns, values = datasets.read_csv(path)
    assert columns == ["id", "weight"]
    assert values.tolist() == [[1, 60], [2, 70], [3, 80]]
    assert datasets.left_out(path) == {
        "name": "line 2: 'ann' is not a number",
        "size": "it is empty",
    }


def test_a_column_of_numbers_has_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, "id;size\n1;1.5\n2;1,5\n3;2.5\n")
    with pytest.raises(DataError, match=r"'size', line 3.*decimal numbers"):
        datasets.read_csv(path)
    assert datasets.read_csv(path, ["id"])[0] == ["id"]


@pytest.mark.parametrize("cell", ["", "NA", "NaN", "null", "?", " na "])
def test_missing_cells_are_nan(tmp_path: Path, cell: str) -> None:
    path = write(tmp_path, f"id;size\n1;1.5\n2;{cell}\n3;2.5\n")
    columns, values = datasets.read_csv(path)
    assert columns == ["id", "size"]
    assert values[:, 1].isnan().tolist() == [False, True, False]


def test_column_without_a_name_is_row_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, '"","x"\n1,5\n2,6\n')
    assert datasets.read_csv(path)[0] == ["x"]
    assert datasets.left_out(path) == {"column 1": "it has no name"}
    assert datasets.read_csv(path, [1])[0] == ["column 1"]


def test_columns_by_name_or_position_in_the_order_asked(tmp_path: Path) -> None:
    path = write(tmp_path, MIXED)
    for chosen in (["weight", "id"], [4, 1], ["4", "id"]):
        columns, values = datasets.read_csv(path, chosen)
        assert columns == ["weight", "id"]
        assert values[0].tolist() == [60, 1]


def test_a_number_that_is_a_name_is_a_name(tmp_path: Path) -> None:
    path = write(tmp_path, "x,1\n5,6\n")
    assert datasets.read_csv(path, ["1"])[1].tolist() == [[6]]
    assert datasets.read_csv(path, [1])[1].tolist() == [[5]]


@pytest.mark.parametrize("cell", ["abc", "1,5", "1_0", "inf", "1e999"])
def test_bad_cell_names_file_column_line_and_text(tmp_path: Path, cell: str) -> None:
    path = write(tmp_path, f"a;b\n1;2\n3;{cell}\n5;x\n6;x\n")
    with pytest.raises(DataError) as caught:
        datasets.read_csv(path, ["b"])
    message = str(caught.value)
    assert str(path) in message
    assert f"column 'b', line 3: expected a finite number; got {cell!r}" in message
    assert "(2 more in this column)" in message


def test_blank_line_in_a_single_column_is_a_missing_cell(tmp_path: Path) -> None:
    _, values = datasets.read_csv(write(tmp_path, "a\n1\n\n2\n\n"), ["a"])
    assert values[:, 0].isnan().tolist() == [False, True, False]


def test_line_numbers_count_lines_inside_quotes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 4: expected"):
        datasets.read_csv(write(tmp_path, 'note,b\n"two\nlines",1\nz,q\n'), ["b"])


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("", None, "the file is empty"),
        ("\n\n", None, "the file is empty"),
        ("a,b\n", None, "expected rows below the column names"),
        ("1.5,2\n3,4\n", None, "expected column names in the first line; got numbers"),
        ("a,b,a\n1,2,3\n", None, "expected each column name once; got a "),
        ("a,b\n1,2\n3\n4,5,6\n", None, r"line 3: expected 2 cells.*got 1 \(1 more such rows\)"),
        ("a,b\n1,2,3\n", None, "line 2: expected 2 cells.*got 3"),
        ('a,b\n"1"2,3\n', None, "expected a CSV file"),
        ("a,b\nx,NA\n", None, r"got none: a \(line 2: 'x' is not a number\); b"),
        ("Ozone,b\n1,2\n", ["ozne"], r"columns Ozone, b; got 'ozne'\. Did you mean 'Ozone'\?"),
        ("a,b\n1,2\n", ["zzz"], r"got 'zzz'\.$"),
        ("a,b\n1,2\n", [3], "expected a column from 1 to 2; got 3"),
        ("a,b\n1,2\n", [0], "expected a column from 1 to 2; got 0"),
        ("a,b\n1,2\n", ["a", 1], "columns: expected different ones"),
        ("a,b\n1,2\n", [], "at least one"),
        ("a,b\n1,2\n", "a", "Expected a list of columns"),
    ],
)
def test_malformed_tables(
    tmp_path: Path, text: str, columns: list[str | int] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        datasets.read_csv(write(tmp_path, text), columns)


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected UTF-8 text; byte 1"):
        datasets.read_csv(write(tmp_path, "aé,b\n1,2\n", encoding="latin-1"))


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        datasets.read_csv(tmp_path / "absent.csv")


def test_cells_are_categories_where_they_are_asked_for_as_such(tmp_path: Path) -> None:
    """Whether they are numbers is a matter of the whole column; missing cells are None."""
    path = write(tmp_path, "a,b,c,d\n1,x, 2.0,\n01,1,NA,\n,?,3,\n")
    cells = datasets.sheet(path)
    assert [cells.is_numeric(i) for i in range(4)] == [True, False, True, True]
    assert cells.categories(0) == [1.0, 1.0, None]
    assert cells.categories(1) == ["x", "1", None]
    assert cells.categories(2) == [2.0, None, 3.0]
    assert cells.texts(2) == ["2.0", None, "3"]
    assert cells.categories(3) == [None, None, None]
    assert [cells.place(row) for row in range(3)] == ["line 2", "line 3", "line 4"]
    with pytest.raises(DataError, match="column 'b', line 2: expected a finite number; got 'x'"):
        cells.numbers(1)


def test_the_cells_of_shipped_data() -> None:
    cells = datasets.shipped("airquality")
    assert cells.header[0] == "Ozone" and sum(c is None for c in cells.categories(0)) == 37
