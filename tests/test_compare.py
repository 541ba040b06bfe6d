"""`ddptrain compare` says which of several runs is the best, and what is different about it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import yaml
from launching import DDPTRAIN, LIMIT_SECONDS, Finished, read_metrics, read_result, run, start
from matplotlib.image import imread
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment
from tensorboard.plugins.hparams import list_session_groups as session_groups
from test_screen import on_terminal

from ddptrain.cli import main
from ddptrain.observe import drawing
from ddptrain.observe.comparison import Comparison
from ddptrain.observe.table import render, sentence

SHORT = [
    *("experiment=ragged", "train.max_steps=12", "eval.every_steps=4", "log.every_steps=2"),
    *("checkpoint.every_steps=null", "log.tensorboard=false"),
]
RATES = {"careful": "0.0001", "quick": "0.05", "killed": "0.01"}
KILLED = ["env", "DDPTRAIN_FAILPOINT=save: begun@2"]  # with the checkpoint of step 8
CHANGED = ["model.width", "optim.lr", "train.grad_clip.max_norm"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that have come to their end and one that was killed, below one folder."""
    folder = tmp_path_factory.mktemp("compare") / "sweep"
    started = {}
    for name, rate in RATES.items():
        own = {"careful": ["model.width=4", "train.grad_clip.max_norm=null"]}.get(name, [])
        killer = KILLED if name == "killed" else []
        overrides = [f"optim.lr={rate}", *own, f"run.dir={folder / name}"]
        started[name] = start([*killer, *DDPTRAIN, *SHORT, *overrides])
    for name, process in started.items():
        _, err = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == (-signal.SIGKILL if name == "killed" else 0), err
    return folder


@pytest.fixture
def sweep(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "sweep"))


Compare = Callable[..., Finished]


@pytest.fixture
def compare(capfd: pytest.CaptureFixture[str]) -> Compare:
    """The command, in this process, where what it imports is there already."""

    def compared(*arguments: str | Path) -> Finished:
        code = main(["compare", *map(str, arguments)])
        return Finished(arguments, code, *capfd.readouterr())

    return compared


def read_table(text: str) -> list[dict[str, str]]:
    """A row as a mapping from the headers; ``best`` is the mark before a run's name."""
    header, line, *rows = text.split("\n\n")[0].splitlines()
    assert set(line) == {"─"}
    names = ["best", *re.split(r" {2,}", header.strip())]
    cells = [re.split(r" {2,}", row.removeprefix("*").strip()) for row in rows]
    return [
        dict(zip(names, ["*" if row.startswith("*") else "", *values], strict=True))
        for row, values in zip(rows, cells, strict=True)
    ]


def rows_by_name(finished: Finished) -> dict[str, dict[str, str]]:
    """The rows in their order, by the last part of their run's path."""
    assert finished.returncode == 0, finished.stderr
    return {Path(row["run"]).name: row for row in read_table(finished.stdout)}


def edit(run_dir: Path, **values: Any) -> None:
    """Change what a run's config says, as if it had been trained so; dots are ``__``."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    for key, value in values.items():
        *sections, last = key.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[last] = value
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))


def end(run_dir: Path, **values: Any) -> None:
    """Change what came of a run in the end."""
    result = read_result(run_dir)
    result["metrics"] = {name.replace("__", "/"): value for name, value in values.items()}
    (run_dir / "result.json").write_text(json.dumps(result))


def copies(original: Path, folder: Path, names: Iterable[str]) -> dict[str, Path]:
    return {name: Path(shutil.copytree(original, folder / name)) for name in names}


def told(folder: Path) -> tuple[list[str], str]:
    """The names of the runs in the order of the table, the best with a star; the sentence."""
    comparison = Comparison.of([folder])
    rows = read_table(render(comparison))
    return [row["best"] + Path(row["run"]).name for row in rows], sentence(comparison)


def last_and_best(run_dir: Path) -> tuple[float, float, int]:
    lines = read_metrics(run_dir, "val")
    best = min(lines, key=lambda line: line["loss"])
    return lines[-1]["loss"], best["loss"], best["step"]


def test_the_table_has_what_differs_and_what_came_of_it_best_first(sweep: Path) -> None:
    finished = run([*DDPTRAIN, "compare", str(sweep)])
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    rows = rows_by_name(finished)
    expected = ["best", "run", "status", *CHANGED, "val/loss", "best val/loss"]
    assert list(rows["quick"]) == expected
    ends = {name: last_and_best(sweep / name) for name in RATES}
    assert list(rows) == sorted(ends, key=lambda name: ends[name][0]) != sorted(RATES)
    assert [row["best"] for row in rows.values()] == ["*", "", ""]
    for name, row in rows.items():
        loss, best, step = ends[name]
        assert row["val/loss"] == f"{loss:#.4g}"
        assert row["best val/loss"] == f"{best:#.4g}, step {step}"
        assert row["optim.lr"] == RATES[name]
        assert row["model.width"] == ("4" if name == "careful" else "–")
        assert row["train.grad_clip.max_norm"] == ("null" if name == "careful" else "1.0")
    assert "3 runs of ragged, smallest val/loss first (*)" in finished.stdout
    assert "…" not in finished.stdout
    assert "\x1b" not in finished.stdout


def test_a_run_that_was_killed_is_shown_as_far_as_it_came(sweep: Path, compare: Compare) -> None:
    rows = rows_by_name(compare(sweep))
    assert not (sweep / "killed" / "result.json").exists()
    last = max(line["step"] for split in ("train", "val") for line in
               read_metrics(sweep / "killed", split))  # fmt: skip
    assert 8 <= last <= 12
    assert rows["killed"]["status"] == f"unfinished, step {last}"
    assert rows["careful"]["status"] == rows["quick"]["status"] == "completed"
    (sweep / "killed" / "trial.json").write_text(json.dumps({"status": "pruned"}))
    assert rows_by_name(compare(sweep))["killed"]["status"] == f"pruned, step {last}"


def test_a_run_without_an_evaluation_is_compared_by_its_training_loss(
    sweep: Path, compare: Compare
) -> None:
    metrics = sweep / "killed" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))
    rows = rows_by_name(compare(sweep))
    assert rows["killed"]["status"] == "unfinished, step 2"
    assert rows["killed"]["val/loss"] == rows["killed"]["best val/loss"] == "–"
    for name in RATES:
        loss = read_metrics(sweep / name)[-1]["loss"]
        assert rows[name]["train/loss"] == f"{loss:#.4g}"
    assert list(rows)[-1] == "killed"
    metrics.unlink()
    shown = compare(sweep / "killed").stdout
    assert rows_by_name(Finished([], 0, shown))["killed"]["status"] == "unfinished"
    assert not re.search(" $", shown, re.MULTILINE)


def test_a_folder_stands_for_the_runs_below_it_and_each_counts_once(
    sweep: Path, compare: Compare
) -> None:
    ended = [sweep / "careful", sweep / "quick"]
    (sweep / "link").symlink_to(sweep / "careful")
    (sweep / "careful" / "replays").mkdir()
    shutil.copytree(sweep / "quick", sweep / "careful" / "replays" / "step-00000004")
    finished = compare(sweep.parent, *ended, sweep / "quick", "--output", sweep.parent / "out")
    assert sorted(rows_by_name(finished)) == ["careful", "killed", "quick"]
    assert len(read_table(finished.stdout)) == 3
    assert (sweep.parent / "out" / "compare.png").exists()
    rows = rows_by_name(compare(*ended))
    assert sorted(rows) == ["careful", "quick"]
    assert "status" not in rows["careful"]  # all are completed
    assert (sweep / "compare" / "compare.png").exists()


def test_where_a_run_lies_and_who_takes_it_is_no_difference(sweep: Path, compare: Compare) -> None:
    edit(sweep / "careful", run__name="other", run__resume="must", checkpoint__dir="s3://a/b")
    edit(sweep / "careful", slurm__partition="long", slurm__nodes=2, data__shuffle=False)
    finished = compare(sweep)
    keys = {key for key in read_table(finished.stdout)[0] if "." in key}
    assert keys == {*CHANGED, "data.shuffle", "slurm.nodes"}
    assert "\n3 runs of other, ragged, " in finished.stdout


def test_runs_of_one_config_are_said_to_be(sweep: Path, compare: Compare, tmp_path: Path) -> None:
    same = tmp_path / "same"
    edit(
        copies(sweep / "careful", same, ["one", "two"])["two"], model__width=4.0
    )  # the same number
    finished = compare(same)
    assert "all 2 runs of ragged have the same config; smallest val/loss first" in finished.stdout
    assert list(read_table(finished.stdout)[0]) == ["best", "run", "val/loss", "best val/loss"]
    assert [row["best"] for row in read_table(finished.stdout)] == ["*", "*"]
    assert [row.hparams for row in sessions(same / "compare" / "tensorboard")] == [{}, {}]


def test_order_follows_the_configs_and_what_has_no_number_comes_last(
    sweep: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ends"
    ends = {"a": 1.5, "b": None, "c": 2.5, "d": -3.0}
    runs = copies(sweep / "careful", folder, [*ends, "none"])
    for name, loss in ends.items():
        end(runs[name], val__loss=loss)
    end(runs["none"], val__other=1.0)
    same = "all 5 runs of ragged have the same config"
    assert told(folder) == (
        ["*d", "a", "c", "b", "none"],
        f"{same}; smallest val/loss first (*)",
    )
    for path in runs.values():
        edit(path, checkpoint__mode="max")
    assert told(folder) == (
        ["*c", "a", "d", "b", "none"],
        f"{same}; largest val/loss first (*)",
    )
    edit(runs["a"], checkpoint__metric="val/other")  # on which they do not agree
    names, line = told(folder)
    assert names == ["a", "b", "c", "d", "none"]
    assert line.startswith("5 runs of ragged, in the order given; ")


def test_a_run_that_was_stopped_keeps_the_metrics_it_last_had(
    sweep: Path, compare: Compare
) -> None:
    result = read_result(sweep / "careful") | {"status": "stopped", "step": 11, "metrics": {}}
    (sweep / "careful" / "result.json").write_text(json.dumps(result))
    row = rows_by_name(compare(sweep))["careful"]
    assert row["status"] == "stopped, step 11"
    assert row["val/loss"] == f"{last_and_best(sweep / 'careful')[0]:#.4g}"


def sessions(folder: Path) -> list[Any]:
    """The rows of the HPARAMS tab, as TensorBoard's own backend has them."""
    context = hparams_context(folder)
    statuses = list(map(api_pb2.Status.Value, api_pb2.Status.keys()))
    request = api_pb2.ListSessionGroupsRequest(slice_size=100, allowed_statuses=statuses)
    handler = session_groups.Handler(RequestContext(), context, "", request)
    return list(handler.run().session_groups)


def hparams_context(folder: Path) -> Any:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    return backend_context.Context(TBContext(data_provider=provider))


def test_tensorboard_has_a_row_for_each_run_with_what_differs(
    sweep: Path, compare: Compare
) -> None:
    assert compare(sweep).returncode == 0
    rows = sessions(sweep / "compare" / "tensorboard")
    assert sorted(row.sessions[0].name for row in rows) == sorted(RATES)
    for row in rows:
        name = row.sessions[0].name
        hparams = {key: value.number_value or value.string_value
                   for key, value in row.hparams.items()}  # fmt: skip
        norm = "null" if name == "careful" else "1.0"
        expected = {"optim.lr": float(RATES[name]), "train.grad_clip.max_norm": norm}
        assert hparams == expected | ({"model.width": 4} if name == "careful" else {})
        loss, best, step = last_and_best(sweep / name)
        metrics = {m.name.tag: (m.value, m.training_step) for m in row.metric_values}
        assert set(metrics) == {"final/val/loss", "best/val/loss"}
        assert metrics["final/val/loss"][0] == pytest.approx(loss, rel=1e-6)
        assert metrics["best/val/loss"] == (pytest.approx(best, rel=1e-6), step)
        ended = api_pb2.STATUS_SUCCESS if name != "killed" else api_pb2.STATUS_UNKNOWN
        assert row.sessions[0].status == ended


def test_every_row_has_the_columns_of_all(sweep: Path, compare: Compare) -> None:
    """TensorBoard takes its columns from the first row that it finds."""
    edit(sweep / "killed", optim__momentum=0.5)
    end(sweep / "careful", val__loss=1.0, test__loss=2.0)
    assert compare(sweep).returncode == 0
    folder = sweep / "compare" / "tensorboard"
    for name in RATES:
        handler = get_experiment.Handler(
            RequestContext(), hparams_context(folder / name), "", api_pb2.GetExperimentRequest()
        )
        columns = handler.run()
        assert {info.name for info in columns.hparam_infos} == {*CHANGED, "optim.momentum"}
        tags = {info.name.tag for info in columns.metric_infos}
        assert tags == {"final/val/loss", "final/test/loss", "best/val/loss"}


def test_the_picture_has_a_curve_for_each_run(sweep: Path, compare: Compare) -> None:
    assert compare(sweep).returncode == 0
    picture = imread(sweep / "compare" / "compare.png")
    height, width, _ = picture.shape
    assert width == 1500
    assert 400 < height < 1500
    for half in (picture[:, : width // 2], picture[:, width // 2 :]):
        for place in range(len(RATES)):
            color = np.array(matplotlib.colormaps["tab10"](place)[:3])
            near = np.abs(half[..., :3] - color).max(axis=-1) < 0.02
            assert near.sum() > 20, (place, half.shape)


def test_of_many_runs_the_colour_is_the_rank_and_the_axis_what_the_values_need(
    sweep: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    for number, path in enumerate(
        copies(sweep / "careful", folder, map(str, range(10, 24))).values()
    ):
        edit(path, optim__lr=10.0**-number, model__width=number + 1, seed=1 + 90 * number)
        edit(path, optim__weight_decay=0.0 if number % 2 else 10.0**-number)
        edit(path, data__train__once=r"$\frac$" if number % 2 else "_b\n")
        end(path, val__loss=10.0**number)
    figure = drawing._figure(Comparison.of([folder]))
    scales = {axes.get_xlabel(): axes.get_xscale() for axes in figure.axes}
    expected = {
        "optimiser step": "linear", "seed": "linear", "model.width": "linear", "optim.lr": "log",
        "optim.weight_decay": "symlog", "data.train.once": "linear",
    }  # fmt: skip
    assert expected.items() <= scales.items()
    assert "rank by val/loss, 1 is the best" in scales
    heights = {axes.get_xlabel(): axes.get_yscale() for axes in figure.axes}
    assert (heights["optimiser step"], heights["seed"]) == ("linear", "log")
    assert not any(figure.legends)
    curves = next(axes for axes in figure.axes if axes.get_xlabel() == "optimiser step").lines
    assert len({tuple(line.get_color()) for line in curves}) == 14
    drawing.draw(Comparison.of([folder]), tmp_path / "many.png")  # with signs of formulas in it
    assert imread(tmp_path / "many.png").shape[1] == 1500


def test_numbers_that_no_axis_reaches_are_left_out_of_the_picture_alone(
    sweep: Path, compare: Compare
) -> None:
    edit(sweep / "careful", optim__lr=1e308, model__width=10**400)
    end(sweep / "careful", val__loss=1e308)
    end(sweep / "quick", val__loss=-1e308)
    edit(sweep / "quick", optim__lr=-1e308)
    rows = rows_by_name(compare(sweep))
    assert list(rows) == ["quick", "killed", "careful"]
    assert rows["careful"]["val/loss"] == "1.000e+308"
    assert rows["careful"]["optim.lr"] == "1e+308"


def test_a_later_comparison_replaces_what_an_earlier_one_left_and_nothing_else(
    sweep: Path, compare: Compare
) -> None:
    folder = sweep / "compare"
    assert compare(sweep).returncode == 0
    (folder / "notes.txt").write_text("mine")
    before = (folder / "compare.png").read_bytes()
    shutil.rmtree(sweep / "careful")
    assert compare(sweep, *sweep.iterdir()).stderr == ""  # the folder itself is among them
    assert {path.name for path in folder.iterdir()} == {"compare.png", "tensorboard", "notes.txt"}
    assert (folder / "compare.png").read_bytes() != before
    assert len(sessions(folder / "tensorboard")) == 2


@pytest.mark.parametrize("name", ["compare.png", "tensorboard", "config.yaml"])
def test_nothing_is_replaced_that_is_not_its_own(
    sweep: Path, compare: Compare, tmp_path: Path, name: str
) -> None:
    other = tmp_path / "other" / name
    other.parent.mkdir()
    if name == "tensorboard":
        other.mkdir()
    else:
        other.touch()
    finished = compare(sweep, "--output", other.parent)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert "name another folder with --output" in finished.stderr
    assert [path.name for path in other.parent.iterdir()] == [name]


def test_what_holds_no_run_is_refused_in_a_line_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    program = (
        "import sys; from ddptrain.cli import main; code = main(sys.argv[1:]); "
        "print(*{'torch', 'matplotlib', 'tensorboard'} & set(sys.modules)); sys.exit(code)"
    )
    for path in ("empty", "missing"):
        command = [sys.executable, "-c", program, "compare", str(tmp_path / path)]
        finished = run(command, tmp_path)
        assert finished.returncode == 2
        assert finished.stdout.strip() == ""
        assert finished.stderr.count("\n") == 1
        assert re.search(
            "^ddptrain: .*expected a run's directory.*folder with runs", finished.stderr
        )
    assert not any((tmp_path / "empty").iterdir())


DAMAGE = {
    "config.yaml": ["a: [", "- 1", "defaults: []", "!!python/object:os.system {}"],
    "result.json": ["{", "[]", '{"metrics": 3, "step": "x", "status": [1]}',
                    '{"status": "completed", "metrics": {"val/loss": "low", "a": [1]}}'],
    "metrics.jsonl": ["{\n", '{"step": null, "split": "val", "loss": 1}\n{"step": 1}\n[]\n',
                      '{"step": 4, "split": "val", "loss": "x"}\n'],
}  # fmt: skip


@pytest.mark.parametrize(("file", "text"), [(f, t) for f, texts in DAMAGE.items() for t in texts])
def test_damaged_files_end_nothing(sweep: Path, compare: Compare, file: str, text: str) -> None:
    (sweep / "careful" / file).write_text(text)
    shown = compare(sweep)
    names = sorted(rows_by_name(shown))
    assert "Traceback" not in shown.stderr
    if file == "config.yaml":
        assert names == ["killed", "quick"]
        assert re.fullmatch("left out: .*config.yaml: .*\n", shown.stderr)
    else:
        assert names == sorted(RATES)


def test_text_of_others_does_nothing_to_a_terminal(sweep: Path, compare: Compare) -> None:
    edit(sweep / "careful", data__train__once="\x1b[31m[bold]red\nline")
    out = compare(sweep).stdout
    assert "\x1b" not in out
    assert r"'\x1b[31m[bold]red\nline'" in out


def test_a_terminal_gets_the_columns_it_has_room_for_and_the_names_of_others(
    sweep: Path, compare: Compare
) -> None:
    end(sweep / "quick", val__loss=0.1, **{f"val__number_{n}": float(n) for n in range(20)})
    code, seen = on_terminal([*DDPTRAIN, "compare", str(sweep)])
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", seen.decode()).replace("\r", "")
    table, others, _ = text.split("\n\n")
    assert max(map(len, table.splitlines())) <= 120
    assert all(name in table for name in ("quick", "width", "max_norm", "step 12", "number_0"))
    assert "number_19" not in table
    assert re.match("no room for .*val/number_9; a pipe", others)
    assert rows_by_name(compare(sweep))["quick"]["val/number_19"] == "19.00"
