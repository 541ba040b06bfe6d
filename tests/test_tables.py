"""A table of the user's: what is learnt of which rows, and what is refused, in which words."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import DDPTRAIN, run, train
from own_files import write_example

from ddptrain.build import build_source
from ddptrain.compose import compose
from ddptrain.data import Table
from ddptrain.data.splits import SPLITS, split_indices
from ddptrain.errors import Refused

TEN = "x,kind,y\n" + "".join(f"{i},{'ab'[i % 2]},{'no' if i % 3 else 'yes'}\n" for i in range(10))
Given = dict[str, Any]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "t.csv") -> str:
    Path(name).write_bytes(text.encode())
    return name


def write_parquet(columns: Given) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), "t.parquet")
    return "t.parquet"


def tables(**options: Any) -> list[Table]:
    return [Table(split, **options) for split in SPLITS]


@given(
    samples=st.integers(1, 5000),
    parts=st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any),
)
def test_splits_are_disjoint_and_complete(samples: int, parts: list[int]) -> None:
    fractions = [part / sum(parts) for part in parts]
    found = [split_indices(samples, split, fractions) for split in SPLITS]
    assert sorted(np.concatenate(found).tolist()) == list(range(samples))
    for indices, fraction in zip(found, fractions, strict=True):
        assert abs(len(indices) - samples * fraction) <= 1


@pytest.mark.parametrize("fractions", [[0.5, 0.5], [0.5, 0.5, 0.5], [1.5, -0.5, 0], 1, ["a", 0, 1]])
def test_fractions_that_are_none(fractions: Any) -> None:
    with pytest.raises(Refused, match="three numbers that add up to 1"):
        split_indices(10, "train", fractions)


def test_numbers_are_standardised_by_training_rows_alone() -> None:
    x = np.arange(100.0) ** 2
    path = write("x,same,y\n" + "".join(f"{v},7,{i % 2}\n" for i, v in enumerate(x)))
    found = tables(path=path, target="y")
    seen = x[split_indices(100, "train")]
    for split, table in zip(SPLITS, found, strict=True):
        mine = x[split_indices(100, split)]
        expected = torch.from_numpy((mine - seen.mean()) / seen.std()).float()
        features, labels = table.tensors
        torch.testing.assert_close(features[:, 0], expected)
        assert not features[:, 1].any()  # the same in all rows: 0, and nothing infinite
        assert labels.tolist() == [i % 2 for i in split_indices(100, split)]
    changed = x.copy()
    changed[split_indices(100, "test")] += 1e6
    path = write("x,same,y\n" + "".join(f"{v},7,{i % 2}\n" for i, v in enumerate(changed)))
    assert torch.equal(Table("train", path, "y").tensors[0], found[0].tensors[0])


def test_a_column_that_training_has_one_value_of_is_not_divided_by_rounding() -> None:
    path = write("x,part,y\n" + "0.1,train,a\n0.1,train,b\n" * 3 + "0.2,val,a\n0.1,val,b\n")
    val = Table("val", path, "y", split_column="part")
    assert val.tensors[0].flatten().tolist() == pytest.approx([0.1, 0])
    rows = "".join(f"{10**9 + i % 2},train,{'ab'[i % 2]}\n" for i in range(6))
    training = Table("train", write("x,part,y\n" + rows), "y", split_column="part")
    assert training.tensors[0].flatten().tolist() == [-1, 1] * 3  # little beside it, but no noise


def test_texts_are_one_hot_or_numbers_of_the_training_rows(caplog: Any) -> None:
    path = write(
        "kind,part,y\n" + "red ,train,1\nblue,train,0\n green,train,1\nblue,val,0\nblack,val,1\n"
    )
    options: Given = {"path": path, "target": "y", "split_column": "part"}
    training, val = Table("train", **options), Table("val", **options)
    assert training.feature_names == ["kind=blue", "kind=green", "kind=red"]
    assert training.tensors[0].tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert val.tensors[0].tolist() == [[1, 0, 0], [0, 0, 0]]
    assert "data.val: column 'kind' has texts that no row of training has" in caplog.text
    assert "black" in caplog.text
    numbered = [Table(split, **options, encoding="number") for split in ("train", "val")]
    assert [t.tensors[0][:, 0].tolist() for t in numbered] == [[3, 1, 2], [1, 0]]


def test_numbers_may_be_categories_and_features_be_chosen() -> None:
    rows = "".join(f"{i},{80000 + i % 3},{i},{i % 2}\n" for i in range(30))
    path = write("id,postal,x,y\n" + rows)
    chosen = Table("train", path, "y", features=["x", "postal"], categorical=["postal"])
    assert chosen.feature_names == ["x", "postal=80000", "postal=80001", "postal=80002"]
    left = Table("train", path, "y", exclude=["id", "postal"])
    assert left.feature_names == ["x"]


def test_missing_values_become_the_mean_of_training_or_go_with_their_row(caplog: Any) -> None:
    path = write(
        "x,kind,part,y\n1,a,train,0\n3,,train,1\n?,b,train,1\n,a,val,0\n5,n/a,val,1\n2,b,val,0\n"
    )
    options: Given = {
        "path": path, "target": "y", "split_column": "part", "missing_values": ["?", "n/a"],
    }  # fmt: skip
    training, val = (Table(split, **options, missing="mean") for split in ("train", "val"))
    # Mean 2, deviation 1.
    assert training.tensors[0].tolist() == [[-1, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert val.tensors[0].tolist() == [[0, 1, 0], [3, 0, 0], [0, 0, 1]]
    rows = "".join(f"{'' if i % 5 == 0 else i},{i % 2}\n" for i in range(200))
    path = write("x,y\n" + rows)
    kept = Table("train", path, "y", missing="drop")
    indices = [i for i in split_indices(200, "train").tolist() if i % 5]
    assert kept.tensors[1].tolist() == [i % 2 for i in indices]
    assert f"{140 - len(indices)} of 140 rows lack a value and are dropped" in caplog.text


def test_classes_are_numbered_in_order_and_keep_their_names() -> None:
    cells = ["10", "9", "2"] * 20
    table = Table("train", write("x,y\n" + "".join(f"1,{c}\n" for c in cells)), "y")
    assert table.class_names == ["2", "9", "10"]
    assert table.tensors[1].dtype == torch.int64
    indices = split_indices(60, "train")
    assert [table.class_names[label] for label in table.tensors[1]] == [cells[i] for i in indices]
    mixed = ["3+", "1", "2"] * 20
    table = Table("train", write("x,y\n" + "".join(f"1,{c}\n" for c in mixed)), "y")
    assert table.class_names == ["1", "2", "3+"]


def test_regression_has_numbers_that_may_be_standardised() -> None:
    y = np.linspace(3, 900, 100)
    path = write("x,y\n" + "".join(f"{i},{v}\n" for i, v in enumerate(y)))
    seen, mine = y[split_indices(100, "train")], y[split_indices(100, "val")]
    plain = Table("val", path, "y", regression=True, outputs=1)
    torch.testing.assert_close(plain.tensors[1], torch.from_numpy(mine).float())
    scaled = Table("val", path, "y", regression=True, standardise_target=True)
    assert scaled.scale is not None
    assert scaled.scale.mean == pytest.approx(seen.mean())
    expected = torch.from_numpy((mine - seen.mean()) / seen.std()).float()
    torch.testing.assert_close(scaled.tensors[1], expected)


def test_parquet_of_all_types_is_what_csv_of_the_same_is() -> None:
    rows = 40
    columns: Given = {
        "whole": pyarrow.array(range(rows), pyarrow.int16()),
        "flag": pyarrow.array([i % 4 == 0 for i in range(rows)]),
        "kind": pyarrow.array(["ab"[i % 2] for i in range(rows)]).dictionary_encode(),
        "large": pyarrow.array([f"t{i % 3}" for i in range(rows)], pyarrow.large_string()),
        "real": pyarrow.array([None if i == 7 else i / 4 for i in range(rows)]),
        "y": pyarrow.array([i % 3 for i in range(rows)], pyarrow.int64()),
        "__index_level_0__": pyarrow.array(range(rows)),
    }
    lines = [
        f"{i},{int(i % 4 == 0)},{'ab'[i % 2]},t{i % 3},{'' if i == 7 else i / 4},{i % 3}"
        for i in range(rows)
    ]
    csv = write("\n".join(["whole,flag,kind,large,real,y", *lines]))
    for mine, other in zip(
        tables(path=write_parquet(columns), target="y", missing="mean"),
        tables(path=csv, target="y", missing="mean"),
        strict=True,
    ):
        assert mine.feature_names == other.feature_names
        assert all(map(torch.equal, mine.tensors, other.tensors))


def test_a_file_for_each_split() -> None:
    paths = {
        "train": write("x,y\n0,a\n2,b\n", "one.csv"),
        "val": write("y;x\nb;5\na;1\n".replace(";", "\t"), "two.tsv"),
    }
    training, val = Table("train", paths, "y"), Table("val", paths, "y")
    assert training.tensors[0].tolist() == [[-1], [1]]
    assert val.tensors[0].tolist() == [[4], [0]]
    assert val.tensors[1].tolist() == [1, 0]
    with pytest.raises(Refused, match="path: it names nothing for test, only for train, val"):
        Table("test", paths, "y")
    with pytest.raises(Refused, match="split_column: there is a file for each split"):
        Table("val", paths, "y", split_column="x")
    write("z,y\nb,5\n", "two.tsv")
    with pytest.raises(Refused, match=r"two.tsv has no column"):
        Table("val", paths, "y")


def long(cell: str, row: int, column: int = 0) -> str:
    """60 rows of numbers, with one cell that is another."""
    lines = [[str(i), str(i % 2)] for i in range(60)]
    lines[row][column] = cell
    return "x,y\n" + "".join(f"{','.join(line)}\n" for line in lines)


WRONG: dict[str, tuple[str, Given, str]] = {
    "no such column": (
        "long_name,y\n1,a\n",
        {"target": "long_nam"},
        "target: t.csv has no column 'long_nam'; did you mean long_name?",
    ),
    "another delimiter": (
        "x;y\n1;a\n",
        {},
        "target: t.csv has no column 'y'; there is x;y (one column only: is delimiter another?)",
    ),
    "no such feature": (TEN, {"features": ["xx"]}, "features: t.csv has no column 'xx'"),
    "no such excluded": (TEN, {"exclude": ["knd"]}, "column 'knd'; did you mean kind?"),
    "no list": (TEN, {"features": "x"}, "features: expected a list of texts, such as"),
    "no choice": (TEN, {"missing": "men"}, "missing: expected one of refuse, mean, drop, got"),
    "text among numbers": (
        long("n/a", 15),
        {},
        "t.csv: line 17: 'n/a' in column 'x', which is of numbers; correct it, or say that it is a "
        "missing value (missing_values: [n/a]), or that the column is of categories "
        "(categorical: [x])",
    ),
    "not a number": (long("nan", 15), {}, "line 17: 'nan' in column 'x', which is of numbers"),
    "too large": (long("1e999", 15), {}, "line 17: '1e999' in column 'x', which is of numbers"),
    "missing": (
        long("", 15),
        {},
        "t.csv: column 'x' has no value in 1 of 60 rows, first in line 17; fill them in, set "
        "missing=mean to take the mean of training, missing=drop to leave these rows out, or "
        "exclude the column",
    ),
    "missing target": (
        long(" ", 15, 1),
        {"missing": "mean"},
        "t.csv: column 'y' has no value in 1 of 60 rows, first in line 17; fill them in, or set "
        "missing=drop to leave these rows out",
    ),
    "nothing but missing": (
        "x,y\n" + ",a\n,b\n" * 20,
        {"missing": "mean"},
        "column 'x' has no value in any row of training; exclude it",
    ),
    "all dropped": (
        "x,y\n" + ",a\n,b\n" * 20,
        {"missing": "drop"},
        "missing=drop leaves no row of split train",
    ),
    "one class": ("x,y\n" + "1,a\n" * 30, {}, "the training split has one class only, 'a'"),
    "empty file": ("", {}, "t.csv: it is empty; a header and rows are expected"),
    "header only": ("x,y\n", {}, "t.csv: it is empty; a header and rows are expected"),
    "same names": ("x,y,x\n1,2,3\n", {}, "t.csv: 2 columns are called 'x'; rename them"),
    "no name": (",x,y\n0,1,2\n", {}, "t.csv: column 1 has no name in the header; give it one"),
    "too many cells": (
        'x,y\n1,"a\nb"\n\n2,b,c\n',
        {},
        "t.csv: line 5 has 3 cells, the header has 2; correct the line, or put quotes round",
    ),
    "nothing but the target": ("y\n" + "a\nb\n" * 20, {}, "no column left besides the target 'y'"),
    "names of rows": (
        "name,y\n" + "".join(f"n{i},{i % 2}\n" for i in range(60)),
        {},
        "column 'name' has 42 different texts in 42 rows of training, so it tells rows apart",
    ),
    "a number as target": (
        long("0.5", 15, 1),
        {},
        "target 'y' has 3 different numbers, such as 1, which are no classes; set regression=true",
    ),
    "other inputs": (
        TEN * 1 + "1,c,no\n" * 9,
        {"inputs": 5, "fractions": [1, 0, 0]},
        "t.csv: there are 4 features (x, kind=a, kind=b, kind=c), but model.inputs=5; "
        "set model.inputs=4",
    ),
    "other classes": (TEN, {"classes": 3}, "there are 2 classes (no, yes), but task.classes=3"),
    "other outputs": (TEN, {"outputs": 3}, "2 classes (no, yes), but the model has 3 outputs"),
    "one output of three classes": (
        "x,y\n" + "1,a\n1,b\n1,c\n" * 20,
        {"outputs": 1},
        "there are 3 classes (a, b, c), but the model has 1 output; give it 3",
    ),
    "classes of a regression": (TEN, {"target": "x", "regression": True, "classes": 2},
                                "regression=true, but task.classes=2"),
    "outputs of a regression": (TEN, {"target": "x", "regression": True, "outputs": 2},
                                "it is one number, but the model has 2 outputs; give it 1"),
    "nothing to standardise": (TEN, {"standardise_target": True}, "standardise_target: a class is"),
    "no split": (
        "x,part,y\n1,train,a\n2,tset,b\n",
        {"split_column": "part"},
        "t.csv: line 3: 'tset' in column 'part' is no split; did you mean test?",
    ),
    "nothing of a split": (
        "x,part,y\n1,val,a\n2,val,b\n",
        {"split_column": "part"},
        "t.csv: no row has 'train' in column 'part'; set data.train=null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case: str) -> None:
    text, options, message = WRONG[case]
    with pytest.raises(Refused) as refused:
        Table("train", **({"path": write(text), "target": "y"} | options))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_wrong_with_a_file() -> None:
    with pytest.raises(Refused, match=r"nowhere.csv: no such file \(looked for from /"):
        Table("train", "nowhere.csv", "y")
    with pytest.raises(Refused, match=r"t.xlsx: expected a file whose name ends in one of .csv"):
        Table("train", "t.xlsx", "y")
    Path("t.csv").write_bytes("x,y\n1,a\n2,é\n".encode("latin-1"))
    with pytest.raises(Refused, match=r"t.csv: line 3 is not UTF-8; save the file as UTF-8"):
        Table("train", "t.csv", "y")
    with pytest.raises(Refused, match=r"t.parquet: no Parquet that can be read: "):
        Table("train", write(TEN, "t.parquet"), "y")
    dates = write_parquet({"day": [date(2026, 1, 1)] * 9, "y": [0, 1, 0] * 3})
    with pytest.raises(Refused, match=r"column 'day' is of type date32.day., neither numbers"):
        Table("train", dates, "y")
    path = write_parquet({"x": [1.0, None, float("nan")] * 3, "y": [0, 1, 0] * 3})
    with pytest.raises(Refused, match="column 'x' has no value in 6 of 9 rows, first in row 2;"):
        Table("train", path, "y")


def test_classes_of_a_split() -> None:
    said = {"split_column": "part", "target": "y"}
    path = write("x,part,y\n1,train,a\n1,train,b\n1,val,a\n1,val,c\n1,test,b\n1,test,b\n")
    with pytest.raises(Refused, match=r"t.csv: line 5 is of class 'c', of which the training"):
        Table("val", path, **said)
    with pytest.raises(Refused, match="split test has one class only, 'b'"):
        Table("test", path, **said)


def test_fractions_that_leave_nothing() -> None:
    with pytest.raises(Refused, match=r"fractions=\[1, 0, 0\] of 10 rows leave none for val;"):
        Table("val", write(TEN), "y", fractions=[1, 0, 0])


@given(
    st.lists(
        st.text(st.sampled_from('ab,"\n é'), max_size=5).map(str.strip), min_size=1, max_size=30
    ),
    st.data(),
)
def test_the_line_that_is_named_is_where_the_row_begins(cells: list[str], data: Any) -> None:
    """In a file with quotes, line ends within cells, and empty lines."""
    from ddptrain.data.csv_file import line_of, read_columns, read_header

    lines, begins = ["x,key"], []
    for number, cell in enumerate(cells):
        if data.draw(st.booleans()):
            lines.append("")
        begins.append(sum(line.count("\n") + 1 for line in lines) + 1)
        quoted = cell.replace('"', '""')
        lines.append(f'"{quoted}",{number}')
    path = Path(write("\n".join(lines) + "\n"))
    assert read_header(path, ",") == ["x", "key"]
    texts, keys = read_columns(path, ",", 2)
    assert texts.to_pylist() == cells
    assert keys.to_pylist() == [str(i) for i in range(len(cells))]
    assert [line_of(path, ",", i + 1) for i in range(len(cells))] == begins


def test_without_pyarrow_one_line_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from ddptrain.data import Table\n"
        f"Table('train', {write(TEN)!r}, 'y')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"Refused: tables are read with pyarrow, .*ddptrain\[tables\]", last)


def test_val_and_test_take_what_train_says(tmp_path: Path) -> None:
    write_example(tmp_path, "table")
    config = compose(["experiment=mine", "data.train.fractions=[0.6,0.2,0.2]"])
    sources = [build_source(config, split) for split in SPLITS]
    assert [len(source.dataset) for source in sources] == [36, 12, 12]
    assert config.data.test["inputs"] == 4
    names = [source.dataset.feature_names for source in sources]
    assert names == [["bill", "mass", "island=Biscoe", "island=Dream"]] * 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.inputs=3",
            "data.train: penguins.csv: there are 4 features (bill, mass, island=Biscoe, "
            "island=Dream), but model.inputs=3; set model.inputs=4",
        ),
        (
            "data.train.missing=refuse",
            "data.train: penguins.csv: column 'mass' has no value in 1 of 60 rows, first in "
            "line 12; fill them in, set missing=mean",
        ),
    ],
)
def test_a_training_is_refused_before_it_begins(
    tmp_path: Path, override: str, message: str
) -> None:
    write_example(tmp_path, "table")
    finished = run([*DDPTRAIN, "experiment=mine", override], tmp_path)
    assert finished.returncode == 2
    assert message in finished.stderr.strip().splitlines()[-1]


@pytest.mark.long
def test_a_table_gives_the_same_bits_on_one_rank_and_on_two(tmp_path: Path) -> None:
    write_example(tmp_path, "table")
    short = ["experiment=mine", "parallel.reduction=exact", "train.max_steps=6", "data.test=null"]
    found = [train(tmp_path / f"run{n}", n, *short, folder=tmp_path) for n in (1, 2)]
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"]
    assert found[0]["metrics"] == found[1]["metrics"]
