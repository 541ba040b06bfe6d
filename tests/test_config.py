"""What cannot work is refused in one line with key and remedy, before torch is imported."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddptrain.compose import PACKAGE, compose, config_trees, options, validate
from ddptrain.config import Config, flatten, to_plain
from ddptrain.errors import Refused
from ddptrain.place import choose_interface, interface_of
from ddptrain.rules import check_world_size

DIGITS = "experiment=digits"
Plain = dict[str, Any]
EXPERIMENTS = [
    *("breast_cancer", "diabetes", "digits", "forecast", "logistic_regression", "purchase"),
    *("recommendation", "recommendation_two_tower", "rosenbrock", "stdlib_lm", "stdlib_modules"),
]
BUILT_IN = PACKAGE.parent / "conf"
OWN_EXPERIMENT = """\
# @package _global_
defaults:
  - override /data: digits
  - override /model: convnet
  - override /task: classification

task: {classes: 10}
train: {max_steps: 3}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, as a user who has nothing of their own starts from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def write(file: str, text: str) -> None:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def refusal(*overrides: str) -> str:
    with pytest.raises(Refused) as told:
        compose(list(overrides))
    return one_line(told.value)


def one_line(error: Refused) -> str:
    line = str(error)
    assert "\n" not in line
    assert error.exit_code == 2
    return line


@pytest.fixture(scope="module")
def plain() -> Plain:
    return to_plain(compose([DIGITS]))


def changed(plain: Plain, key: str, value: Any) -> Plain:
    *path, last = key.split(".")
    new: Plain = copy.deepcopy(plain)
    node = new
    for part in path:
        node = node[part]
    node[last] = value
    return new


def complaint(plain: Plain, key: str, value: Any) -> str:
    """What is said of a config that was fine before this change."""
    with pytest.raises(Refused) as told:
        validate(changed(plain, key, value))
    return one_line(told.value)


# --- typos -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.max_step=3", "unknown key train.max_step; did you mean train.max_steps?"),
        ("+train.max_step=3", "unknown key train.max_step; did you mean train.max_steps?"),
        ("++train.max_step=3", "unknown key train.max_step; did you mean train.max_steps?"),
        ("max_steps=3", "unknown key max_steps; did you mean train.max_steps?"),
        ("train.max_stepz.deep=3", "unknown key train.max_stepz; did you mean train.max_steps?"),
        ("experimnt=digits", "unknown key experimnt; did you mean experiment?"),
        (
            "optim.lrr=1",
            "unknown key optim.lrr: torch.optim.AdamW takes no such argument; "
            "did you mean optim.lr?",
        ),
        ("+model.chanels=3", "did you mean model.channels?"),
    ],
)
def test_a_typo_names_the_key_and_the_nearest(override: str, told: str) -> None:
    assert told in refusal(DIGITS, override)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("data.trian", "unknown key data.trian; did you mean data.train?"),
        ("train.grad_clip.max_nrm", "did you mean train.grad_clip.max_norm?"),
        ("grad_clip", "unknown key grad_clip; did you mean train.grad_clip?"),
        ("task.clases", "did you mean task.classes?"),
        ("schedule.warm_up", "did you mean schedule.warmup?"),
        ("data.train.splt", "did you mean data.train.split?"),
        ("nothing", "unknown key nothing; there is checkpoint, data, eval, experiment"),
        ("run.folder", "unknown key run.folder; there is dir, name, resume"),
    ],
)
def test_a_typo_anywhere_in_the_tree_is_told(plain: Plain, key: str, told: str) -> None:
    assert told in complaint(plain, key, 3)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("experiment=digit", "experiment=digit: no such option; did you mean digits?"),
        ("optim=rmsprob", "optim=rmsprob: no such option; did you mean rmsprop?"),
        (
            "data=nope",
            "data=nope: no such option; there is breast_cancer, diabetes, digits, huggingface",
        ),
        ("schedule=cosin", "schedule=cosin: no such option; did you mean cosine?"),
        ("task=clasification", "did you mean classification?"),
    ],
)
def test_an_unknown_option_of_a_group_names_the_nearest(override: str, told: str) -> None:
    assert told in refusal(DIGITS, override)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("max_steps", "max_step", "unknown key train.max_step; did you mean train.max_steps?"),
        ("train:", "trian:", "unknown key trian; did you mean train?"),
        ("classes", "clases", "did you mean task.classes?"),
        ("/data: digits", "/data: digitz", "data=digitz: no such option; did you mean digits?"),
        ("/data:", "/dta:", "dta"),
        ("override /data", "/data", "override data"),
        ("max_steps: 3", "max_steps: many", "train.max_steps: expected a whole number, got 'many'"),
        ("max_steps: 3", "precision: fp8", "train.precision: expected one of fp32, bf16, fp16"),
        ("train: {max_steps: 3}", "train: 3", "train: expected a section with max_steps"),
        ("{max_steps: 3}", "{max_steps: '${nope}'}", "train.max_steps"),
        ("{max_steps: 3}", "{max_steps: '${oc.env:NOPE}'}", "train.max_steps"),
        ("{max_steps: 3}", "{max_steps: 3", "own.yaml"),
        ("{max_steps: 3}", "{max_steps: 3}\ntrain: {max_epochs: 3}", "own.yaml"),
        ("{max_steps: 3}", "\tmax_steps: 3", "own.yaml"),
    ],
)
def test_a_mistake_in_a_users_experiment_is_told_like_one_on_the_command_line(
    before: str, after: str, told: str
) -> None:
    assert before in OWN_EXPERIMENT
    write("conf/experiment/own.yaml", OWN_EXPERIMENT.replace(before, after))
    assert told in refusal("experiment=own")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "text\n"])
def test_an_experiment_without_content_is_told_by_name(text: str) -> None:
    write("conf/experiment/own.yaml", text)
    told = refusal("experiment=own")
    assert "did you mean experiment?" not in told
    assert "own" in told


@pytest.mark.parametrize("text", ["train: {max_steps: 3}\n", OWN_EXPERIMENT.partition("\n")[2]])
def test_an_experiment_without_its_header_is_told_what_is_missing(text: str) -> None:
    """Without it Hydra puts everything below the key `experiment`, which nobody expects."""
    write("conf/experiment/own.yaml", text)
    assert "# @package _global_" in refusal("experiment=own")


def test_a_typo_in_an_option_of_the_users_own_is_told() -> None:
    write("conf/optim/mine.yaml", "_target_: torch.optim.SGD\nlr: 1\nmomentun: 0.9\n")
    assert "did you mean optim.momentum?" in refusal(DIGITS, "optim=mine")
    assert "did you mean mine?" in refusal(DIGITS, "optim=mne")


@pytest.mark.parametrize("override", ["train.max_steps", "=5", "a==b", "a='b", "a={b", "", "a b=c"])
def test_what_is_no_override_is_told(override: str) -> None:
    told = refusal(DIGITS, override)
    assert "override" in told
    assert "Config group override must be" not in told


def test_several_values_are_a_sweep() -> None:
    assert "--multirun" in refusal(DIGITS, "optim.lr=0.1,0.2")
    assert "--multirun" in refusal("experiment=digits,breast_cancer")


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.max_steps=many", "train.max_steps: expected a whole number, got 'many'"),
        ("train.max_steps=", "train.max_steps: expected a whole number"),
        ("train.max_steps=${nope}", "train.max_steps"),
        ("~train.max_epochs", "train.max_epochs: not set; say train.max_epochs=<value>"),
        ("task.classes=???", "task.classes: not set; say task.classes=<value>"),
        ("train=5", "train"),
        ("train=[1]", "train"),
    ],
)
def test_a_wrong_override_names_the_key_and_what_is_expected(override: str, told: str) -> None:
    line = refusal(DIGITS, override)
    assert told in line
    assert "Config group override must be" not in line


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("train.max_steps", 1.5, "train.max_steps: expected a whole number"),
        ("train.max_steps", True, "train.max_steps: expected a whole number"),
        ("train.max_steps", [1], "train.max_steps: expected a whole number"),
        ("train.max_steps", {"a": 1}, "train.max_steps: expected a whole number"),
        ("train.grad_clip.max_norm", "big", "train.grad_clip.max_norm: expected a number, got "),
        ("train.grad_clip.max_norm", float("nan"), "train.grad_clip.max_norm: expected a number"),
        ("train.compile", "maybe", "train.compile: expected true or false, got 'maybe'"),
        ("seed", None, "seed: "),
        ("checkpoint.metric", ["a"], "checkpoint.metric: "),
        ("checkpoint.metric", None, "checkpoint.metric: "),
        ("train.precision", "fp8", "train.precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        ("run.resume", "always", "run.resume: expected one of auto, never, must, got 'always'"),
        ("parallel.strategy", "dp", "parallel.strategy: expected one of ddp, got 'dp'"),
        ("train.device", "gpu", "train.device: expected one of auto, cpu, cuda, got 'gpu'"),
        ("checkpoint.mode", "up", "checkpoint.mode: expected one of max, min, got 'up'"),
        ("launch.nproc_per_node", "many", "launch.nproc_per_node: expected 'auto' or a number"),
        ("launch.nproc_per_node", 0, "launch.nproc_per_node: expected 'auto' or a number"),
        ("train.grad_clip", 1, "train.grad_clip: expected a section with max_norm, per_unit"),
        ("launch", 5, "launch: expected a section with nproc_per_node, max_restarts, interface"),
        ("model.channels", "wide", "model.channels: expected int, got 'wide'"),
        ("model.dropout", [1], "model.dropout: expected float, got [1]"),
        ("schedule.warmup", True, "schedule.warmup: expected float, got True"),
    ],
)
def test_a_wrong_value_names_the_key_and_what_is_expected(
    plain: Plain, key: str, value: Any, told: str
) -> None:
    assert told in complaint(plain, key, value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model._target_", "ddptrain.models.ConvNett", "did you mean ddptrain.models.ConvNet?"),
        ("model._target_", "nowhere.Net", "model._target_: no module 'nowhere'"),
        ("model._target_", "torch.nn", "torch.nn is a module; name a class or function"),
        ("model._target_", None, "model._target_"),
        ("model", {"channels": 3}, "model._target_: not set"),
        ("model", 3, "model: expected a section with _target_, got 3"),
        ("optim._target_", "torch.optim.Adamm", "did you mean torch.optim.Adam?"),
        ("optim", {"lr": 1}, "optim._target_: not set"),
        ("optim", 3, "optim: expected a section with _target_, got 3"),
        ("task", {"_target_": "ddptrain.tasks.Classification"}, "task.classes: ddptrain.tasks"),
        ("task", 3, "task: expected a section with _target_, got 3"),
        ("schedule", 3, "schedule: expected a section with _target_, got 3"),
        ("data.train._target_", "ddptrain.data.sets.Digit", "did you mean ddptrain.data.sets.Di"),
        ("data.train", {"_target_": "ddptrain.data.sets.Digits"}, "data.train.split: ddptrain"),
        ("data.train", {"split": "train"}, "data.train._target_: not set"),
        ("data.train", 3, "data.train: expected a section with _target_, got 3"),
        ("data.val", [1], "data.val: expected a section with _target_, got [1]"),
        ("data.test", "text", "data.test: expected a section with _target_, got 'text'"),
    ],
)
def test_a_target_that_cannot_be_built_is_refused(
    plain: Plain, key: str, value: Any, told: str
) -> None:
    assert told in complaint(plain, key, value)


TASK_WITHOUT_MODEL = """
    from ddptrain import Task
    class Alone(Task):
        def __init__(self, width: int = 3):
            super().__init__()
"""


def test_a_group_may_be_left_out_as_the_root_of_the_tree_does() -> None:
    write("own.py", TASK_WITHOUT_MODEL)
    write("conf/task/alone.yaml", "_target_: own.Alone\n")
    assert compose(["data=digits", "task=alone", "train.max_steps=1"]).model is None
    assert compose([DIGITS, "model=null", "task=alone", "~task.classes"]).model is None


def test_a_task_that_needs_a_model_needs_one(plain: Plain) -> None:
    assert "model" in complaint(plain, "model", None)


def test_a_model_for_a_task_that_takes_none_is_refused(plain: Plain) -> None:
    write("own.py", TASK_WITHOUT_MODEL)
    assert "model" in complaint(plain, "task", {"_target_": "own.Alone"})


OWN_MODULE = """
    from __future__ import annotations
    {imports}
    class Net({base}):
        def __init__(self, width: int, start: {annotation} = None) -> None:
            super().__init__()
"""


@pytest.mark.parametrize(
    ("imports", "base", "annotation"),
    [
        ("", "object", "float | None"),
        ("from torch import Tensor, nn", "nn.Module", "Tensor | None"),
        ("import torch", "torch.nn.Module", "torch.Tensor | None"),
        ("from torch.nn import Module", "Module", "Module | None"),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"widht": 3}, "unknown key model.widht: own.Net takes no such argument; did you mean"),
        ({"start": None}, "model.width: own.Net needs it"),
        ({"width": "wide"}, "model.width: expected int, got 'wide'"),
        ({"_target_": "own.Nett", "width": 3}, "did you mean own.Net?"),
        ({"width": 3}, None),
        ({"width": 3, "start": None}, None),
    ],
)
def test_a_users_own_class_is_checked_like_a_built_in_one(
    plain: Plain,
    imports: str,
    base: str,
    annotation: str,
    arguments: Plain,
    told: str | None,
) -> None:
    write("own.py", OWN_MODULE.format(imports=imports, base=base, annotation=annotation))
    own = {"_target_": "own.Net", **arguments}
    if told is None:
        assert validate(changed(plain, "model", own)).model == own
    else:
        assert told in complaint(plain, "model", own)
    assert "own" not in sys.modules


def test_a_file_that_hides_a_built_in_is_refused() -> None:
    for name in ("config.yaml", "optim/adamw.yaml", "experiment/digits.yaml"):
        write(f"conf/{name}", "seed: 3\n")
        line = refusal(DIGITS)
        assert f"{Path('conf') / name}: hides the built-in" in line
        assert "give it another name" in line
        (Path("conf") / name).unlink()
    compose([DIGITS])


# --- what no single key can tell ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "data.train: nothing to train; choose an experiment"),
        (["data=digits"], "task: nothing to train"),
        ([DIGITS, "train.micro_batch_size=7"], "is not a multiple of train.micro_batch_size=7"),
        ([DIGITS, "train.micro_batch_size=7"], "fit: [1, 2, 4, 8, 16, 32, 64, 128]"),
        ([DIGITS, "train.global_batch_size=130"], "train.global_batch_size=130 is not a multiple"),
        ([DIGITS, "train.max_epochs=null"], "train.max_steps: set it, or train.max_epochs"),
        ([DIGITS, "~data.val"], "eval.every_steps=100 but data.val is not set"),
        ([DIGITS, "eval.every_steps=null"], "checkpoint.keep_best=1 needs a metric"),
        ([DIGITS, "run.resume=must"], "run.resume=must but run.dir is not set"),
        ([DIGITS, "~optim"], "optim"),
        ([DIGITS, "~schedule"], "schedule"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(overrides: list[str], told: str) -> None:
    assert told in refusal(*overrides)


POSITIVE = [
    *("train.max_steps", "train.max_epochs", "train.global_batch_size", "train.micro_batch_size"),
    *("train.grad_clip.max_norm", "eval.every_steps", "eval.micro_batch_size", "log.every_steps"),
    *("checkpoint.every_steps", "checkpoint.keep_last", "parallel.bucket_mb"),
]
NOT_NEGATIVE = [
    *("checkpoint.keep_best", "checkpoint.keep_faults"),
    *("data.workers", "launch.max_restarts"),
]


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in POSITIVE for value in (0, -1)] + [(key, -1) for key in NOT_NEGATIVE],
)
def test_numbers_that_make_no_sense_are_refused(plain: Plain, key: str, value: int) -> None:
    least = "a number above 0" if key in POSITIVE else "0 or more"
    assert complaint(plain, key, value).startswith(f"{key}: expected {least}, got {value}")


@given(micro_batches=st.integers(1, 500), micro=st.integers(1, 500), ranks=st.integers(1, 20_000))
def test_more_ranks_than_micro_batches_are_refused_with_a_remedy_that_works(
    micro_batches: int, micro: int, ranks: int
) -> None:
    config = Config()
    config.train.global_batch_size = micro_batches * micro
    config.train.micro_batch_size = micro
    if ranks <= micro_batches:
        check_world_size(config, ranks)
        return
    with pytest.raises(Refused) as told:
        check_world_size(config, ranks)
    line = one_line(told.value)

    def work(size: int) -> int:
        return micro_batches * micro // size

    assert f"{ranks} ranks share {micro_batches} micro-batch" in line
    if remedy := re.search(r"or train\.micro_batch_size=(\d+) or less would do", line):
        config.train.micro_batch_size = int(remedy[1])
        check_world_size(config, ranks)
        assert config.train.global_batch_size % int(remedy[1]) == 0
        larger = range(int(remedy[1]) + 1, micro)
        assert not [d for d in larger if micro_batches * micro % d == 0 and work(d) >= ranks]
    else:
        assert f"train.global_batch_size must be at least {ranks}" in line
        assert ranks > micro_batches * micro


# --- what is in conf/ --------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_survives_its_own_storing(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    assert config.run.name == experiment
    assert validate(to_plain(config)) == config
    stored = yaml.safe_load(yaml.safe_dump(to_plain(config)))
    assert validate(stored) == config
    assert not [key for key, value in flatten(stored).items() if value == "???"]


def test_the_experiments_are_these() -> None:
    assert options("experiment") == EXPERIMENTS


@settings(max_examples=10)
@given(
    seed=st.integers(),
    lr=st.floats(1e-12, 1e6),
    max_norm=st.none() | st.floats(1e-300, 1e300),
    name=st.text("ab:{}[]#'\"\\ -?é", min_size=1),
)
def test_any_values_survive_storing(
    plain: Plain, seed: int, lr: float, max_norm: float | None, name: str
) -> None:
    config = validate(plain)
    config.seed, config.optim["lr"], config.run.name = seed, lr, name
    config.train.grad_clip.max_norm = max_norm
    assert validate(yaml.safe_load(yaml.safe_dump(to_plain(config)))) == config


def schema_keys(schema: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(schema).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            keys += schema_keys(hint, f"{prefix}{name}.")
        elif hint is not Any:
            keys.append(f"{prefix}{name}")
    return keys


def test_every_key_of_the_schema_has_a_value_in_conf() -> None:
    in_conf: set[str] = set()
    for file, prefix in (
        ("config", ""),
        ("train/default", "train."),
        ("checkpoint/default", "checkpoint."),
        ("log/default", "log."),
        ("resilience/default", "resilience."),
        ("parallel/ddp", "parallel."),
        ("slurm/default", "slurm."),
    ):
        content = yaml.safe_load((BUILT_IN / f"{file}.yaml").read_text())
        content.pop("defaults", None)
        in_conf |= {prefix + key for key in flatten(content)}
    assert in_conf == set(schema_keys(Config))


@pytest.mark.parametrize(
    "file",
    ["config", "train/default", "checkpoint/default", "log/default", "parallel/ddp"],
)
def test_every_key_is_explained_by_a_comment(file: str) -> None:
    """Above it, or above the first of neighbours that one comment explains together."""
    lines = (BUILT_IN / f"{file}.yaml").read_text().splitlines()
    explained, bare = False, []
    for line in lines:
        text = line.strip()
        if text.startswith("#"):
            explained = True
        elif not text:
            explained = False
        elif not explained and not text.startswith("-") and text.partition(":")[2]:
            bare.append(text)
    assert not bare


def test_every_file_of_a_group_begins_with_what_it_is() -> None:
    files = [file for file in BUILT_IN.rglob("*.yaml")]
    assert len(files) > 15
    bare = [
        str(file.relative_to(BUILT_IN))
        for file in files
        if not file.read_text().startswith("# ") and file.parent.name != "optim"
    ]
    assert not bare


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_headed_by_the_command_that_runs_it(experiment: str) -> None:
    text = (BUILT_IN / "experiment" / f"{experiment}.yaml").read_text()
    command = next(line for line in text.splitlines() if " -m ddptrain " in line)
    assert command.endswith(f"-m ddptrain experiment={experiment}")


def test_the_contracts_keys_exist() -> None:
    contract = [
        *("seed", "run.name", "run.dir", "run.resume", "train.max_steps", "train.max_epochs"),
        *("train.global_batch_size", "train.micro_batch_size", "train.precision"),
        *("train.grad_clip.max_norm", "eval.every_steps", "log.every_steps"),
        *("checkpoint.every_steps", "checkpoint.keep_last", "parallel.strategy"),
        *("parallel.reduction", "launch.nproc_per_node"),
    ]
    assert set(contract) <= set(schema_keys(Config))


def test_enumerations_are_written_as_they_are_named() -> None:
    """A name is what a user types, what is stored, and what is compared after a resume."""
    enums = [hint for hint in vars(sys.modules["ddptrain.config"]).values() if _is_enum(hint)]
    assert len(enums) >= 6
    assert all(member.name == member.value for enum in enums for member in enum)


def _is_enum(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Enum) and thing is not Enum


def test_a_users_tree_adds_to_the_built_in_one(folder: Path) -> None:
    assert config_trees() == [BUILT_IN]
    write("conf/experiment/own.yaml", OWN_EXPERIMENT)
    assert config_trees() == [BUILT_IN, folder / "conf"]
    assert options("experiment") == sorted([*EXPERIMENTS, "own"])
    config = compose(["experiment=own", "train.max_steps=5"])
    assert (config.run.name, config.train.max_steps) == ("own", 5)
    assert compose(["experiment=own", "run.name=mine"]).run.name == "mine"


def test_experiments_have_the_last_word_but_for_the_command_line() -> None:
    assert compose([DIGITS]).optim["lr"] == 0.003
    assert compose([DIGITS, "optim=sgd", "optim.lr=0.5"]).optim["lr"] == 0.5


# --- anything at all ---------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["train", "max_steps", "optim", "lr", "data", "model", "=", ".", "+", "~", "[", "]", "{", "}",
     ":", ",", "1", "null", "a", "'", '"', "${", "$", "@", "/", "-", "???", "é", "\\", " "]
)  # fmt: skip


@settings(max_examples=40)
@given(words=st.lists(WORDS, min_size=1, max_size=6))
def test_whatever_is_typed_is_taken_or_refused_in_one_line(words: list[str]) -> None:
    try:
        composed = compose([DIGITS, "".join(words)])
    except Refused as error:
        one_line(error)
    else:
        assert composed.train.global_batch_size


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a${}?.", max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab_"), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=50)
@given(key=st.sampled_from([*schema_keys(Config), "task", "model", "data.val"]), value=VALUES)
def test_whatever_is_stored_is_taken_or_refused_by_its_key(
    plain: Plain, key: str, value: Any
) -> None:
    try:
        config = validate(changed(plain, key, value))
    except Refused as error:
        line = one_line(error)
        top = key.split(".")[0]
        assert top in line or "eval" in line or "checkpoint" in line, line
    else:
        assert isinstance(config, Config)


# --- without torch -----------------------------------------------------------------------------

PROGRAM = """
import contextlib, io, json, sys
from ddptrain.cli import main
told = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as left:
            code = left.code
    heavy = {"torch", "numpy", "torchmetrics", "tensorboard", "sklearn", "rich"} & set(sys.modules)
    told.append([code, out.getvalue(), err.getvalue(), sorted(heavy)])
print(json.dumps(told))
"""
ANSWERS: list[tuple[list[str], str]] = [
    (["config", DIGITS], "global_batch_size: 128"),
    (["config", "experiment=stdlib_lm"], "ddptrain.models.GPT"),
    (["--help"], "digits"),
    (["train", "--help"], "--multirun"),
]
REFUSALS: list[tuple[list[str], str]] = [
    (["config", DIGITS, "train.max_step=3"], "did you mean train.max_steps?"),
    (["train", DIGITS, "train.max_step=3"], "did you mean train.max_steps?"),
    ([DIGITS, "optim.lrr=3"], "did you mean optim.lr?"),
    (["rank", "experiment=digit"], "did you mean digits?"),
    (["train", DIGITS, "launch.nproc_per_node=2", "train.micro_batch_size=128"], "2 ranks share"),
    (["train", DIGITS, "run.resume=must", "run.dir=nowhere"], "holds no checkpoint"),
    (["rerun", "nowhere"], "nowhere: not a run"),
    (["trian", DIGITS], "trian"),
    ([], "choose an experiment"),
    (["evaluate", "nowhere"], "nowhere: not a run"),
    (["export", "nowhere"], "nowhere: not a run"),
]
Told = dict[str, tuple[int, str, str, list[str]]]


def own_process(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *command]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What each command says and has imported, all in one process that starts in a bare folder."""
    folder = tmp_path_factory.mktemp("bare")
    commands = [arguments for arguments, _ in ANSWERS + REFUSALS]
    done = own_process(folder, "-c", PROGRAM, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    told = json.loads(done.stdout)
    return {str(command): tuple(one) for command, one in zip(commands, told, strict=True)}


@pytest.mark.parametrize(("arguments", "expected"), ANSWERS, ids=lambda value: str(value))
def test_answers_come_without_torch(answers: Told, arguments: list[str], expected: str) -> None:
    code, out, err, imported = answers[str(arguments)]
    assert (code, err, imported) == (0, "", [])
    assert expected in out


@pytest.mark.parametrize(("arguments", "expected"), REFUSALS, ids=lambda value: str(value))
def test_refusals_come_without_torch(answers: Told, arguments: list[str], expected: str) -> None:
    code, out, err, imported = answers[str(arguments)]
    assert (code, out, imported) == (2, "", [])
    assert expected in err
    assert err.count("\n") == 1


def test_the_process_ends_with_the_code_of_a_refusal(folder: Path) -> None:
    done = own_process(folder, "-m", "ddptrain", DIGITS, "train.max_step=3")
    assert done.returncode == 2
    assert done.stderr.startswith("ddptrain: unknown key train.max_step;")
    assert done.stdout == ""


def test_an_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(Refused, match=r"launch\.interface=eth99: this machine has .*lo"):
        choose_interface("eth99")
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
