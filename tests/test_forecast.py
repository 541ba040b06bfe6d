"""A series is forecast from what was known at each origin, and from nothing else."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from several_ranks import build, take_steps
from torch import Tensor

from ddptrain.compose import compose
from ddptrain.data import Series
from ddptrain.data.baselines import arima_forecasts
from ddptrain.data.dates import read_dates
from ddptrain.data.sets import Macrodata
from ddptrain.data.splits import SPLITS
from ddptrain.data.tabular import TabularFile
from ddptrain.data.walk_forward import Columns, Split, WalkForward
from ddptrain.errors import Refused
from ddptrain.launch.worker import TIMEOUT
from ddptrain.models import MLP
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place

Given = dict[str, Any]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def columns_of(*values: np.ndarray[Any, Any]) -> Columns:
    days = np.arange(len(values[0])).astype("datetime64[D]").astype("datetime64[s]")
    named = {name: column for name, column in zip("xyz", values, strict=False)}
    return Columns("made up", days, named, lambda row: f"row {row + 1}")


def splits_of(columns: Columns, parts: Split, log: tuple[str, ...] = ()) -> dict[str, WalkForward]:
    return {
        split: WalkForward(columns, split, parts, log, True, None, None, None) for split in SPLITS
    }


made_up: Given = {
    "seed": st.integers(0, 1000),
    "rows": st.integers(30, 60),
    "window": st.integers(1, 4),
    "horizon": st.integers(1, 3),
    "shares": st.tuples(st.integers(6, 14), st.integers(4, 8), st.integers(4, 8)),
}


def made(seed: int, rows: int, window: int, horizon: int, shares: tuple[int, ...]) -> Any:
    draw = np.random.default_rng(seed)
    values = np.exp(draw.normal(size=(2, rows)).cumsum(1) / 10)
    parts = Split(window, horizon, [share / sum(shares) for share in shares], None, None)
    return values, parts


@given(**made_up, changed=st.integers(0, 59), column=st.integers(0, 1))
def test_what_comes_later_changes_nothing_of_an_earlier_forecast(
    changed: int, column: int, **how: Any
) -> None:
    """Not a bit of a split's samples what a later split holds; nor of a window, or of what a model
    makes of it, what comes after its origin."""
    values, parts = made(**how)
    assume(changed < how["rows"])
    before = splits_of(columns_of(*values), parts, ("y",))
    values[column, changed] *= 7
    after = splits_of(columns_of(*values), parts, ("y",))
    ends = parts.ends(columns_of(*values).dates)
    model = MLP(2 * parts.window, [3], 1)
    for split in SPLITS:
        past, change = before[split].tensors
        again, change_again = after[split].tensors
        if changed >= ends[split]:
            assert torch.equal(past, again)
            assert torch.equal(change, change_again)
        for number, origin in enumerate(before[split].origins):
            if ends["train"] <= changed and origin < changed:
                assert torch.equal(model(past[number]), model(again[number]))


@given(**made_up)
def test_splits_follow_each_other_and_miss_no_row(**how: Any) -> None:
    values, parts = made(**how)
    ends = parts.ends(columns_of(*values).dates)
    first = {"train": 0, "val": ends["train"], "test": ends["val"]}
    for split, samples in splits_of(columns_of(*values), parts).items():
        origins = np.array(samples.origins)
        known = max(first[split], parts.window + (split == "train"))
        forecast = np.arange(known - 1 + parts.horizon, ends[split])
        assert (origins + parts.horizon).tolist() == forecast.tolist()
        assert (samples.series[origins + parts.horizon] - samples.series[origins]) == pytest.approx(
            samples.tensors[1].double().numpy() * samples.scale, rel=1e-6
        )


def test_a_change_is_by_mean_and_deviation_of_training() -> None:
    from statsmodels.datasets import macrodata

    table = macrodata.load_pandas().data
    options: Given = {"value": "unemp", "features": ["realgdp"], "log": ["realgdp"], "window": 3}
    test = Macrodata("test", **options, scale_target=False)
    rate, growth = table["unemp"].to_numpy(), np.diff(np.log(table["realgdp"].to_numpy()))
    moves = np.diff(rate)
    by = [(x - x[:141].mean()) / x[:141].std() for x in (moves, growth)]
    assert len(test) == 30
    past, change = test[0]
    assert change == pytest.approx(rate[173] - rate[172])
    assert past.tolist() == pytest.approx(np.stack(by, 1)[169:172].ravel(), rel=1e-5)
    scaled = Macrodata("test", **options)
    assert scaled.tensors[1].std() / test.tensors[1].std() == pytest.approx(1 / moves[3:141].std())


@given(step=st.floats(1e-3, 1e3), start=st.floats(0, 1e3), is_log=st.booleans())
def test_changes_that_differ_by_rounding_alone_are_not_divided_by_it(
    step: float, start: float, is_log: bool
) -> None:
    """A series that goes up by the same from row to row, or grows by the same rate."""
    values = (2 + step / 1e3) ** np.arange(40.0) if is_log else start + step * np.arange(40)
    parts, logs = Split(3, 2, [0.5, 0.25, 0.25], None, None), ("x",) if is_log else ()
    for samples in splits_of(columns_of(values), parts, logs).values():
        assert samples.scale == 1
        assert samples.tensors[0].abs().max() < 1e-6
    values[17] *= 1.01
    assert splits_of(columns_of(values), parts, logs)["train"].scale != 1


def write(rows: list[str], name: str = "sales.csv", header: str = "month,sold,price") -> str:
    Path(name).write_text("\n".join([header, *rows]) + "\n")
    return name


def months(count: int) -> list[str]:
    return [f"{1990 + i // 12}-{1 + i % 12:02},{100 + i % 7},{5 + i % 3}" for i in range(count)]


SALES: Given = {"path": "sales.csv", "date": "month", "value": "sold", "window": 4}


def test_a_later_date_makes_a_later_fold() -> None:
    write(months(60))

    def fold(until: str | int | None, test_rows: int | None = None) -> dict[str, tuple[int, int]]:
        found = {}
        for split in SPLITS:
            made = Series(split, **SALES, until=until, test_rows=test_rows)
            found[split] = (made.origins.start + 1, made.origins.stop + 1)
        return found

    assert fold(None) == {"train": (5, 42), "val": (42, 51), "test": (51, 60)}
    assert fold(1992, 12) == {"train": (5, 30), "val": (30, 36), "test": (36, 48)}
    assert fold("1993", 12) == {"train": (5, 40), "val": (40, 48), "test": (48, 60)}
    assert fold("1993-02") == {"train": (5, 31), "val": (31, 38), "test": (38, 60)}
    assert fold("1993-02-01", 3)["test"] == (38, 41)
    assert fold("1993-01-31", 3)["test"] == (37, 40)


def test_dates_may_be_parquets_own_or_text() -> None:
    days = [date(2020, 1, 1 + i) for i in range(30)]
    sold = [float(i * i % 11) for i in range(30)]
    plain = write([f"{day},{value}" for day, value in zip(days, sold, strict=True)], header="d,v")
    found = [Series("train", plain, "d", "v", 3)]
    for dates in (
        days,
        [day.isoformat() for day in days],
        pyarrow.array(days).cast("timestamp[ns]"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"d": dates, "v": sold}), "t.parquet")
        found.append(Series("train", "t.parquet", "d", "v", 3))
    for other in found[1:]:
        assert all(map(torch.equal, found[0].tensors, other.tensors))


def write_dates(dates: Any) -> Given:
    values = [float(i * i % 11) for i in range(len(dates))]
    pyarrow.parquet.write_table(pyarrow.table({"d": dates, "v": values}), "t.parquet")
    return {"path": "t.parquet", "date": "d", "value": "v", "window": 3}


def test_a_day_is_that_of_the_rows_own_time_zone() -> None:
    """At midnight in Berlin it is still the day before in Greenwich."""
    days = pyarrow.array(np.datetime64("2008-12-01") + np.arange(40))
    local = pyarrow.compute.assume_timezone(days.cast("timestamp[us]"), "Europe/Berlin")
    for dates in (days, local):
        test = Series("test", **write_dates(dates), until=2008)
        assert (test.origins.start, test.known) == (30, 31)


@pytest.mark.parametrize(
    ("until", "known"), [("2020-10-25T01:59", 24), ("2020-10-25T02:29", 25), ("2020-10-25", 70)]
)
def test_the_hour_that_a_clock_shows_twice_is_no_error(until: str, known: int) -> None:
    first = np.datetime64("2020-10-24T12:00", "us")
    dates = pyarrow.array(first + np.arange(80) * np.timedelta64(30, "m"))
    dates = dates.cast(pyarrow.timestamp("us", "UTC")).cast(
        pyarrow.timestamp("us", "Europe/Berlin")
    )
    write_dates(dates)
    parts = Split(3, 1, [0.7, 0.15, 0.15], until, None)
    assert parts.ends(read_dates(TabularFile("t.parquet"), "d"))["val"] == known


def test_rows_may_be_less_than_a_second_apart() -> None:
    first = np.datetime64("2020-01-01T00:00:00", "ns")
    for step in (10**8, 1):  # 100 ms, and what is no whole microsecond
        dates = first + np.arange(30) * np.timedelta64(step, "ns")
        assert len(Series("train", **write_dates(pyarrow.array(dates)))) == 17
    dates[9] = dates[8]
    with pytest.raises(Refused, match=r"row 10: the date 2020-01-01T00:00:00.000000008 in .*twice"):
        Series("train", **write_dates(pyarrow.array(dates)))
    dates[9] = dates[7]
    with pytest.raises(Refused, match=r"00007 in column 'd' comes after 2020-01-01T00:00:00.00000"):
        Series("train", **write_dates(pyarrow.array(dates)))
    unknown = pyarrow.array(dates).cast(pyarrow.timestamp("ns", "Nowhere/Land"))
    with pytest.raises(Refused, match=r"does not know \(.*Nowhere/Land.*\); install tzdata, or"):
        Series("train", **write_dates(unknown))


ROWS = months(40)
WRONG: dict[str, tuple[list[str], Given, str]] = {
    "order": ([*ROWS[:9], ROWS[10], ROWS[9], *ROWS[11:]], {},
              "line 12: the date 1990-10-01 in column 'month' comes after 1990-11-01; sort"),
    "twice": ([*ROWS[:9], ROWS[8], *ROWS[9:]], {},
              "sales.csv: line 11: the date 1990-09-01 in column 'month' is there twice; take one"),
    "no date": ([*ROWS, "soon,1,1"], {},
                "sales.csv: line 42: 'soon' in column 'month' is no date; write it as 2009-07-01"),
    "no such day": ([*ROWS, "2001-02-30,1,1"], {}, "line 42: '2001-02-30' in column 'month'"),
    "no date there": ([*ROWS, ",1,1"], {}, "sales.csv: line 42 has no date in column 'month'"),
    "missing": ([*ROWS[:5], "1990-06,,1", *ROWS[6:]], {},
                "sales.csv: line 7 has no value in column 'sold'; fill it in with what"),
    "text": ([*ROWS[:5], "1990-06,few,1", *ROWS[6:]], {},
             "line 7: 'few' in column 'sold', which is of numbers; correct it, or leave"),
    "text beside": ([*ROWS[:5], "1990-06,1,low", *ROWS[6:]], {"features": ["price"]},
                    "line 7: 'low' in column 'price'"),
    "logarithm": ([*ROWS[:5], "1990-06,0,1", *ROWS[6:]], {"log": ["sold"]},
                  "sales.csv: line 7: 0 in column 'sold' has no logarithm; take it out of log"),
    "log of what": (ROWS, {"log": ["price"]}, "log: 'price' is none of the columns read, sold"),
    "value": (ROWS, {"value": "solt"}, "value: sales.csv has no column 'solt'; did you mean sold?"),
    "date": (ROWS, {"date": "mont"}, "date: sales.csv has no column 'mont'; did you mean month?"),
    "features": (ROWS, {"features": ["cost"]}, "features: sales.csv has no column 'cost'"),
    "no list": (ROWS, {"features": "price"},
                "features: expected a list of texts, such as [one, two], got 'price'"),
    "no list of log": (ROWS, {"log": "sold"}, "log: expected a list of texts, such as"),
    "window": (ROWS, {"window": 0}, "window: expected a number above 0, got 0"),
    "until": (ROWS, {"until": "May"}, "until: expected a date such as 2009-07-01, 2009-07 or 2009"),
    "too early": (ROWS, {"until": "1980"}, "40 rows, to 1993-04-01, train has 0, too few for"),
    "inputs": (ROWS, {"features": ["price"], "inputs": 4},
               "4 steps of sold, price are 8 inputs, but model.inputs=4; set model.inputs=8"),
    "outputs": (ROWS, {"loss": "gaussian", "outputs": 1}, "the model has 1; set model.outputs=2"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_forecast_from_is_refused_with_its_place(case: str) -> None:
    rows, options, told = WRONG[case]
    write(rows)
    with pytest.raises(Refused) as refused:
        Series("train", **(SALES | options))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_columns_of_macrodata_are_a_list() -> None:
    for key in ("features", "log"):
        with pytest.raises(Refused, match=f"{key}: expected a list of texts, .* got 'unemp'"):
            Macrodata("train", "unemp", 4, **{key: "unemp"})


def test_a_series_that_is_too_short_says_which_split_and_what_to_do() -> None:
    write(ROWS[:8])
    with pytest.raises(Refused) as refused:
        Series("train", **SALES | {"window": 12})
    assert str(refused.value) == (
        "sales.csv: of 8 rows, to 1990-08-01, train has 6, too few for a sample: window=12 and "
        "horizon=1 take 14; make them smaller, choose other fractions or another date for until"
    )
    with pytest.raises(Refused, match=r"test has 1, .*horizon=2 take 2; .*or set data.test=null"):
        Series("test", **SALES | {"window": 2}, horizon=2, fractions=[0.75, 0.125, 0.125])


def test_arima_is_statsmodels_extended_by_what_was_known() -> None:
    from statsmodels.tsa.arima.model import ARIMA

    test = Macrodata("test", "unemp", 4)
    fitted = ARIMA(test.series[:173], order=(1, 1, 0)).fit()
    expected = []
    for origin in test.origins:
        expected.append((fitted.forecast(1)[0] - test.series[origin]) / test.scale)
        fitted = fitted.append(test.series[origin + 1 : origin + 2])
    assert arima_forecasts(test).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("refit_every", [None, 2])
def test_arima_does_not_look_ahead(refit_every: int | None) -> None:
    test = Macrodata("test", "unemp", 4, horizon=2, test_rows=6)
    before = arima_forecasts(test, refit_every=refit_every)
    assert len(before) == 5
    test.series = test.series + (np.arange(203) >= test.origins[3])
    after = arima_forecasts(test, refit_every=refit_every)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])


def test_a_trained_models_forecasts_hold_nothing_of_what_came_later(tmp_path: Path) -> None:
    """Changed in the middle of the test: the weights, and the forecasts up to there, are the same
    bits."""
    overrides = [
        *("data=series", "data.train.path=sales.csv", "data.train.date=month", "model=mlp"),
        *("data.train.value=sold", "data.train.window=4", "model.inputs=4", "model.outputs=1"),
        *("task=regression", "train.max_steps=12", "train.global_batch_size=8"),
    ]
    rows, forecasts = months(60), []
    for later in ("", "9"):
        write([row.replace(",1", f",{later}1") if i > 55 else row for i, row in enumerate(rows)])
        trainer = build(compose(overrides), Ranks(Place(), CPU, TIMEOUT), tmp_path)
        take_steps(trainer, 0, 12)
        test = trainer.evaluations["test"].fetcher.source.dataset
        forecasts.append(torch.cat([trainer.task.model(past[None]) for past, _ in test]))
    known = sum(origin <= 55 for origin in test.origins)
    assert 0 < known < len(test)
    assert torch.equal(forecasts[0][:known], forecasts[1][:known])
    assert not torch.equal(forecasts[0][known:], forecasts[1][known:])


def test_diabetes_is_standardised_by_training_alone() -> None:
    from ddptrain.data.sets import Diabetes

    both: list[Tensor] = list(Diabetes("train").tensors)
    assert [tuple(part.shape) for part in both] == [(309, 10), (309,)]
    for part in both:
        assert part.mean(0).abs().max() < 1e-5
        assert (part.std(0, correction=0) - 1).abs().max() < 1e-5
    assert len(Diabetes("val")) + len(Diabetes("test")) == 442 - 309
