"""Loading never runs code from a file: what came with a run may have been written by anybody."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import DDPTRAIN, Finished, run, train

from ddptrain.checkpoint.media import Disk
from ddptrain.checkpoint.saved import MODEL, OPTIMIZER
from ddptrain.checkpoint.store import MANIFEST, Store, sealed
from ddptrain.cli import main
from ddptrain.compose import compose
from ddptrain.errors import EXIT_COMPLETED, EXIT_FAILED, EXIT_REFUSED, Refused
from ddptrain.files import read_json
from ddptrain.observe.loggers import read_json_lines
from ddptrain.run_directory import RunDirectory
from ddptrain.trust import check_objects, check_targets

Node = dict[str, Any]
TRAINING = ["experiment=digits", "train.max_steps=2", "checkpoint.every_steps=1"]
QUICK = ["eval.every_steps=null", "checkpoint.keep_best=0", "log.tensorboard=false"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to start from, with a module that leaves a canary there when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    canary = tmp_path / "canary"
    (tmp_path / "loose/deep").mkdir(parents=True)
    text = (
        f"import os, subprocess as sp\nfrom os import system as thing\nopen({str(canary)!r}, 'w')\n"
        "from os import *\nclass Net: ...\n"
    )
    for name in ("trap.py", "loose/deep/trap.py"):
        (tmp_path / name).write_text(text)
    finders = [f for f in sys.meta_path if type(f).__name__ == "DistutilsMetaFinder"]
    yield tmp_path
    for finder in finders:  # once asked for pip, setuptools' own could not be imported any more
        vars(finder).clear()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    train(path, 1, *TRAINING, *QUICK)
    return path


@pytest.fixture
def victim(trained: Path, tmp_path: Path) -> RunDirectory:
    """A copy of a run, to do harm to."""
    return RunDirectory(Path(shutil.copytree(trained, tmp_path / "victim")))


def edit(file: Path, key: str, value: Any) -> None:
    """Set a key of a stored config, as somebody who gives a run away might."""
    plain = yaml.safe_load(file.read_text())
    node = plain
    *path, last = key.split(".")
    for part in path:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = value
    file.write_text(yaml.safe_dump(plain))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as told:
        call()
    assert "\n" not in str(told.value)
    assert told.value.exit_code == EXIT_REFUSED
    return str(told.value)


def harm(folder: Path) -> Node:
    return {"_target_": "os.system", "command": f"touch {folder / 'canary'}"}


def unharmed(folder: Path) -> bool:
    return not (folder / "canary").exists()


# --- targets, by their source ------------------------------------------------------------------

PYTHON = [
    *("os.system", "posix.system", "subprocess.run", "subprocess.Popen", "builtins.eval"),
    *("builtins.exec", "builtins.__import__", "builtins.open", "builtins.getattr", "builtins.type"),
    *("importlib.import_module", "runpy.run_path", "pickle.load", "_pickle.loads", "marshal.loads"),
    *("functools.partial", "functools.reduce", "operator.methodcaller", "shutil.rmtree"),
    *("pathlib.Path.write_text", "pathlib.os.system", "collections._sys.modules.get"),
    *("ctypes.CDLL", "webbrowser.open", "urllib.request.urlopen", "timeit.timeit", "this"),
    *("code.interact", "pdb.run", "multiprocessing.Process", "logging.config.fileConfig"),
    *("random._os.system", "antigravity.fly", "datetime.sys.exit", "math.inf.fromhex"),
]
PACKAGES = [
    *("hydra.utils.get_method", "hydra.utils.instantiate", "hydra.utils.call", "hydra.main"),
    *("omegaconf.OmegaConf.load", "yaml.unsafe_load", "joblib.load", "cloudpickle.loads"),
    *("pip.main", "setuptools.setup", "pytest.main", "jinja2.Template", "sympy.sympify"),
    *("sklearn.datasets.fetch_20newsgroups", "scipy.test", "PIL.Image.open", "PIL.ImageMath.eval"),
    *("sklearn.utils._joblib.joblib.load", "torchmetrics.os.system", "scipy.io.savemat.os.system"),
    *("numpy.load", "numpy.save", "numpy.memmap", "numpy.fromfile", "numpy.f2py.compile"),
    *("numpy.random.test", "numpy.ctypeslib.load_library", "numpy.testing.rundocs"),
    *("torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.compile"),
    *("torch.from_file", "torch.package.PackageImporter", "torch.ops.load_library"),
    *("torch.utils.cpp_extension.load_inline", "torch.utils.benchmark.Timer", "torch.fx.Graph"),
    *("torch.multiprocessing.spawn", "torch.distributed.rpc.rpc_sync", "torch.serialization.load"),
    *("torch.utils.tensorboard.SummaryWriter", "torch.utils.data.datapipes.iter.FileOpener"),
    *("torch.utils.data._utils.worker.os.system", "torch._C._jit_init", "torch.export.load"),
    *("torch.os.system", "torch.nn.modules.module.torch.load", "torch.sys.modules.get"),
    *("torch.nn.functional.importlib.import_module", "torch.utils.data.dataloader.os.system"),
    *("torch.nn.Linear.__init__.__globals__.get", "torch.nn.Module.__class__"),
    *("torch.optim.optimizer.functools.partial", "torch.nn.parallel.distributed.dist.new_group"),
    *("patsy.dmatrix", "patsy.eval.EvalFactor", "statsmodels.formula.api.ols"),
    *("statsmodels.datasets.get_rdataset", "pandas.DataFrame.query", "pandas.read_csv"),
    *("pyarrow.OSFile", "pyarrow.fs.LocalFileSystem", "multiprocess.Process"),
    *("datasets.load_dataset", "datasets.Dataset.from_generator", "datasets.DownloadManager"),
    "transformers.dynamic_module_utils.get_class_in_module",
    "transformers.dynamic_module_utils.get_class_from_dynamic_module",
    *("transformers.pipeline", "transformers.Trainer", "transformers.utils.hub.cached_file"),
    *("transformers.KernelConfig", "transformers.utils.kernel_config.KernelConfig"),
    *("transformers.DataCollatorForLanguageModeling", "transformers.TrainingArguments"),
    *("transformers.BertModel.push_to_hub", "transformers.BertModel.forward"),
    "transformers.models.bert.modeling_bert.os.system",
    *("ddptrain.files.replace_text", "ddptrain.cli.main", "ddptrain.launch.agent.start_ranks"),
    *("ddptrain.data.texts.glob.glob", "ddptrain.data.tabular.TabularFile"),
    *("ddptrain.data.library.os.walk", "ddptrain.optim.build.build_optimizer", "ddptrain.Trainer"),
]
OWN = [
    "loose.deep.trap.os.system",
    "trap.os.system",
    "trap.sp.run",
    "trap.thing",
    "trap.Net.__init__.__globals__.get",
]
NO_NAMES = [".os.system", "..os.system", "os..system", "os.system ", "os/system", "os.system()", ""]
ABSENT = ["OS.system", "Os.System", "ｏs.system", "nowhere.Net"]


@pytest.mark.parametrize("target", [*PYTHON, *PACKAGES, *OWN, *NO_NAMES])
def test_what_is_no_part_of_a_model_is_refused(target: str, folder: Path) -> None:
    told = refusal(lambda: check_targets({"model": {"_target_": target}}))
    assert told.startswith("model._target_: ")
    assert target in told
    assert unharmed(folder)


@pytest.mark.parametrize("target", ABSENT)
def test_what_is_not_there_is_refused(target: str, victim: RunDirectory) -> None:
    edit(victim.config, "model", {"_target_": target})
    assert f"{victim.config}: model._target_: no module" in refusal(victim.load)


PLACES = [
    *("model", "task", "optim", "schedule", "data.train", "data.val", "data.test"),
    *("run", "log", "launch", "train", "train.grad_clip", "checkpoint", "data", "eval", "parallel"),
    *("seed", "run.name", "checkpoint.metric", "train.max_steps", "hydra", "hydra.sweeper", "x.y"),
    *("model.deep.deeper", "optim.params", "data.train.transform", "task.model"),
]


WRAPS: dict[str, Callable[[Node], Node]] = {
    "plain": lambda node: node,
    "partial": lambda node: {**node, "_partial_": True, "_recursive_": False, "_convert_": "all"},
    "listed": lambda node: {"_target_": "torch.nn.Sequential", "_args_": [[{"a": [1, node]}]]},
    "beside": lambda node: {"_target_": "trap.Net", "inner": node},
}


@pytest.mark.parametrize(
    ("place", "wrap"), [*((p, "plain") for p in PLACES), *(("model", w) for w in WRAPS)]
)
def test_a_target_is_found_wherever_it_stands(
    place: str, wrap: str, victim: RunDirectory, folder: Path
) -> None:
    edit(victim.config, place, WRAPS[wrap](harm(folder)))
    told = refusal(victim.load)
    assert told.startswith(f"{victim.config}: {place}.")
    assert "'os.system' is no part of a model" in told
    assert "write a function in a module of your own" in told
    assert unharmed(folder)


@pytest.mark.parametrize("target", [None, 3, ["os", "system"], {"_target_": "os.system"}, True])
def test_a_target_that_is_no_text_is_refused(target: Any, victim: RunDirectory) -> None:
    edit(victim.config, "model", {"_target_": target})
    assert "model._target_" in refusal(victim.load)


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}", "torch.${oc.create:nn}.Linear", "${oc.create:{_target_:os.system}}", "${x"],
)
@pytest.mark.parametrize("key", ["model", "model.dropout", "run.name"])
def test_nothing_stored_is_computed_when_it_is_read(
    key: str, value: str, victim: RunDirectory
) -> None:
    edit(victim.config, key, value)
    assert f"{victim.config}: {key}: '{value}' would be another value" in refusal(victim.load)
    assert "dotted name" in refusal(lambda: check_targets({"_target_": value}))


@pytest.mark.parametrize(
    "argument",
    [{"trust_remote_code": True}, {"trust_remote_code": "yes"}, {"allow_pickle": 1},
     {"weights_only": False}, {"weights_only": None}],
)  # fmt: skip
def test_an_argument_that_lets_a_package_run_what_is_in_data_is_refused(argument: Node) -> None:
    (name,) = argument
    told = refusal(lambda: check_targets({"model": {"_target_": "sklearn.svm.SVC", **argument}}))
    assert name in told
    check_targets({"model": {"_target_": "trap.Net", **argument}})


def test_sections_without_end_are_refused(victim: RunDirectory) -> None:
    victim.config.write_text("model: &again {_target_: trap.Net, again: *again}\n")
    assert "sections within sections" in refusal(victim.load)


def test_imports_without_end_are_refused(folder: Path) -> None:
    for number in range(30):
        (folder / f"way{number}.py").write_text(f"from way{number + 1} import thing\n")
    assert "import to import" in refusal(lambda: check_targets({"_target_": "way0.thing"}))


def test_modules_that_import_each_other_are_followed(folder: Path) -> None:
    (folder / "here.py").write_text("from there import *\nfrom there import thing, Net\n")
    (folder / "there.py").write_text("from here import *\nfrom here import Net\nthing = 3\n")
    check_targets({"_target_": "here.thing"})
    with pytest.raises(Refused):
        check_targets({"_target_": "here.Net"})


def test_a_composed_config_is_held_to_the_same_rule() -> None:
    told = refusal(lambda: compose(["experiment=digits", "+model.head={_target_:torch.load,f:x}"]))
    assert "model.head._target_: 'torch.load' is " in told


# --- what a user may name ----------------------------------------------------------------------

NAMED = [
    *("torch.nn.Linear", "torch.nn.modules.linear.Linear", "torch.nn.functional.gelu"),
    *("torch.nn.functional.max_pool2d", "torch.nn.init.xavier_uniform_", "torch.nn.Parameter"),
    *("torch.nn.Sequential", "torch.nn.LSTM", "torch.nn.utils.spectral_norm", "torch.nn.GELU"),
    *("torch.optim.AdamW", "torch.optim.SGD", "torch.optim.RMSprop", "torch.optim.swa_utils.SWALR"),
    *("torch.optim.lr_scheduler.LambdaLR", "torch.utils.data.Subset", "torch.distributions.Normal"),
    *("torch.utils.data.TensorDataset", "torch.utils.data.ConcatDataset", "torch.arange"),
    *("torch.tensor", "torch.randn", "torch.Generator", "torch.device", "torch.Tensor"),
    *("numpy.arange", "numpy.array", "numpy.float32", "numpy.random.default_rng"),
    *("numpy.random.rand", "numpy.linspace", "torchmetrics.Accuracy", "torchmetrics.MeanMetric"),
    *("torchmetrics.classification.BinaryAUROC", "torchmetrics.functional.accuracy"),
    *("sklearn.datasets.load_digits", "sklearn.preprocessing.StandardScaler"),
    *("sklearn.neighbors._kd_tree.KDTree", "sklearn.neighbors.KDTree", "scipy.stats.norm"),
    *("sklearn.model_selection.train_test_split", "builtins.dict", "builtins.tuple"),
    *("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "math.sqrt"),
    *("pathlib.Path", "datetime.timedelta", "decimal.Decimal", "fractions.Fraction"),
    *("random.Random", "ddptrain.Task", "ddptrain.tasks.Classification", "ddptrain.models.GPT"),
    *("ddptrain.data.Table", "ddptrain.data.table.Table", "ddptrain.data.ImageFolder"),
    *("ddptrain.data.TextFiles", "ddptrain.data.TextFolder", "ddptrain.models.TextClassifier"),
    *(
        "ddptrain.data.sets.Digits",
        "ddptrain.data.sets.TensorDataset",
        "ddptrain.data.Interactions",
    ),
    *("ddptrain.data.library.StandardLibraryFunctions", "ddptrain.models.TwoTower"),
    *("ddptrain.optim.schedules.Cosine", "mine.Net", "mine.Relu", "mine.Head", "mine.build.Part"),
    *("mine.build.part", "mine.build.Part.make", "mine.build.ready", "mine.build.Pair"),
    *("mine.build.cached", "mine.build.half"),
]
OF_TRANSFORMERS = [
    *("BertConfig", "BertForSequenceClassification", "BertModel", "GPT2LMHeadModel"),
    *("GPT2Config.from_pretrained", "GPT2LMHeadModel.from_pretrained", "ByT5Tokenizer"),
    *("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "PreTrainedTokenizerFast"),
    *("AutoModelForCausalLM.from_pretrained", "AutoModelForCausalLM.from_config"),
    *("BertTokenizerFast.from_pretrained", "models.bert.modeling_bert.BertForMaskedLM"),
    *("models.bert.configuration_bert.BertConfig", "ViTForImageClassification"),
]
MINE = {
    "mine/__init__.py": "from torch.nn import ReLU as Relu, Linear\nfrom .build import *\n"
    "class Net(Linear): ...\nHead = Linear\n",
    "mine/build.py": "import os, functools, subprocess\nfrom collections import namedtuple\n"
    "class Part:\n    @classmethod\n    def make(cls): ...\n    def __call__(self): ...\n"
    "def part(): ...\nready = Part()\nPair = namedtuple('Pair', 'a b')\n"
    "cached = functools.lru_cache(part)\nhalf = functools.partial(part, 1)\n",
}


@pytest.fixture
def mine(folder: Path) -> None:
    for name, text in MINE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("target", NAMED)
def test_parts_of_a_model_may_be_named(target: str, mine: None) -> None:
    node = {"_target_": target}
    check_targets({"model": node})
    check_objects("model", node)


def test_models_configs_and_tokenizers_of_transformers_may_be_named() -> None:
    """Once imported they are defined elsewhere: in a base class, or under another name."""
    for name in OF_TRANSFORMERS:
        node = {"_target_": f"transformers.{name}"}
        check_targets({"model": node})
        check_objects("model", node)
        told = refusal(lambda node=node: check_targets({**node, "trust_remote_code": True}))
        assert "trust_remote_code=True lets it run code that is in data" in told


def test_what_transformers_is_asked_for_is_judged_once_more_when_imported() -> None:
    """A name that is fit for a model, of what is none."""
    node = {"_target_": "transformers.DataCollatorForTokenClassification"}
    assert "is transformers.data.data_collator.DataCollatorFor" in refusal(
        lambda: check_objects("task", node)
    )


# --- targets, once they are imported -----------------------------------------------------------

HIDDEN = {
    "assigned": ("import os\nthing = os.system", "thing"),
    "partial": ("import os\nfrom functools import partial\nthing = partial(os.system)", "thing"),
    "in a class": ("class Net:\n    import os", "Net.os.system"),
    "in a class, assigned": ("import os\nclass Net:\n    run = os.system", "Net.run"),
    "by name": ("import importlib\ndeep = importlib.import_module('os')", "deep.system"),
    "on demand": ("def __getattr__(name):\n    import os\n    return os", "deep.system"),
    "of a text": ("TEXT = '{}'", "TEXT.format"),
    "of a path": ("from pathlib import Path\nHERE = Path('x')", "HERE.write_text"),
    "of a package": ("import torch\nread = torch.load", "read"),
    "of a tool": ("import hydra.utils\nmake = hydra.utils.instantiate", "make"),
    "of all of a module": ("from os import *", "system"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_what_source_does_not_tell_is_refused_before_it_is_called(case: str, folder: Path) -> None:
    text, name = HIDDEN[case]
    module = "hidden_" + "".join(filter(str.isalpha, case))
    (folder / f"{module}.py").write_text(f"{text}\n")
    node = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": f"{module}.{name}"}]}
    told = refusal(lambda: check_objects("model", node))
    assert told.startswith(f"model._args_[0]._target_: '{module}.{name}' is ")


def test_a_run_that_hides_a_call_does_not_get_to_make_it(
    victim: RunDirectory, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "hiding.py").write_text("import os\nthing = os.system\n")
    edit(victim.config, "data.test", {**harm(folder), "_target_": "hiding.thing"})
    assert main(["evaluate", str(victim.path)]) == EXIT_REFUSED
    assert "data.test._target_: 'hiding.thing' is posix.system" in capsys.readouterr().err
    assert unharmed(folder)


# --- the commands ------------------------------------------------------------------------------


def commands(path: str) -> dict[str, list[str]]:
    return {
        "evaluate": ["evaluate", path],
        "export": ["export", path],
        "sample": ["sample", path],
        "rerun": ["rerun", path],
        "diff": ["diff", path, path],
        "resume": ["train", *TRAINING, *QUICK, f"run.dir={path}"],
        "resume a rank": [*TRAINING, *QUICK, f"run.dir={path}"],
        "worker": ["worker", path],
    }


TAGGED = "model: !!python/object/apply:os.system ['touch {canary}']\n"
EXPLOITS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "a target": (
        lambda folder: yaml.safe_dump({"model": harm(folder)}).encode(),
        "model._target_: 'os.system' is no part of a model",
    ),
    "a tag": (
        lambda folder: TAGGED.format(canary=folder / "canary").encode(),
        "line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object",
    ),
    "a pickle": (lambda folder: pickled(folder), "not YAML"),
    "a pickle of text": (lambda folder: pickled(folder, 0), "not"),
}


class Exploit:
    """Runs a command when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder / 'canary'}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def pickled(folder: Path, protocol: int = 4) -> bytes:
    return pickle.dumps(Exploit(folder), protocol)


def test_the_exploit_works(folder: Path) -> None:
    pickle.loads(pickled(folder))
    assert not unharmed(folder)


@pytest.mark.parametrize("command", commands("run"))
@pytest.mark.parametrize("exploit", EXPLOITS)
def test_no_command_takes_a_config_that_runs_code(
    command: str,
    exploit: str,
    victim: RunDirectory,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content, told = EXPLOITS[exploit]
    file = victim.launched if command == "worker" else victim.config
    file.write_bytes(content(folder))
    assert main(commands(str(victim.path))[command]) == EXIT_REFUSED
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"ddptrain: {file}: ")
    assert told in line
    assert "\n" not in line
    assert unharmed(folder)


# --- checkpoints and records -------------------------------------------------------------------


def saved_by_torch(folder: Path) -> bytes:
    file = folder / "saved.pt"
    torch.save({"weight": Exploit(folder)}, file)
    return file.read_bytes()


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "pickle": pickled,
    "pickle of text": lambda folder: pickled(folder, 0),
    "torch.save": saved_by_torch,
}


def forge(victim: RunDirectory, name: str, content: bytes) -> None:
    """Put ``content`` into the newest checkpoint, whose checksums are made to match."""
    store = Store(Disk(victim.checkpoints))
    step = store.steps()[-1]
    manifest = store.manifest(step)
    checkpoint = Path(store.where(step))
    (checkpoint / name).write_bytes(content)
    manifest["files"][name] = store.medium.digest(checkpoint.name, name)
    (checkpoint / MANIFEST).write_bytes(sealed(manifest))


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_weights_that_are_a_pickle_are_not_loaded(
    command: str,
    kind: str,
    victim: RunDirectory,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forge(victim, MODEL, PICKLES[kind](folder))
    assert main(commands(str(victim.path))[command]) == EXIT_FAILED
    line = capsys.readouterr().err.strip()
    assert f"{MODEL}: no safetensors file; it looks like a pickle. It was not loaded" in line
    assert "\n" not in line
    assert unharmed(folder)


@pytest.mark.parametrize("kind", PICKLES)
def test_a_manifest_that_is_a_pickle_is_passed_over(
    kind: str, victim: RunDirectory, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = max(victim.checkpoints.glob("step-*/manifest.json"))
    newest.write_bytes(PICKLES[kind](folder))
    assert main(["evaluate", str(victim.path)]) == EXIT_COMPLETED
    assert json.loads(capsys.readouterr().out)["step"] == 1
    for manifest in victim.checkpoints.glob("step-*/manifest.json"):
        manifest.write_bytes(PICKLES[kind](folder))
    assert main(["export", str(victim.path)]) == EXIT_FAILED
    assert "none of the 2 checkpoints is whole" in capsys.readouterr().err
    assert unharmed(folder)


@pytest.mark.parametrize("kind", PICKLES)
def test_records_that_are_pickles_are_passed_over(
    kind: str,
    victim: RunDirectory,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for file in (victim.metrics, victim.fingerprints, victim.result, victim.data):
        file.write_bytes(PICKLES[kind](folder))
    assert read_json_lines(victim.metrics) == []
    assert read_json(victim.data) == {}
    assert victim.outcome() == {}
    assert f"{victim.result} is damaged, and passed over" in caplog.text
    assert main(["diff", str(victim.path), str(victim.path)]) == EXIT_REFUSED
    assert "recorded nothing of one step" in capsys.readouterr().err
    assert unharmed(folder)


def resume(victim: RunDirectory) -> Finished:
    """Train on with the same config, from the newest checkpoint."""
    return run([*DDPTRAIN, *TRAINING, *QUICK, f"run.dir={victim.path}"])


def test_training_goes_on_from_no_pickle(victim: RunDirectory, folder: Path) -> None:
    forge(victim, OPTIMIZER, pickled(folder))
    finished = resume(victim)
    assert finished.returncode == EXIT_FAILED
    assert f"{OPTIMIZER}: no safetensors file; it looks like a pickle" in finished.stderr
    assert unharmed(folder)


def test_training_goes_on_over_records_that_are_pickles(victim: RunDirectory, folder: Path) -> None:
    records = ("metrics.jsonl", "attempts.jsonl", "result.json", "data.json", "launched.yaml")
    for name in records:
        (victim.path / name).write_bytes(pickled(folder))
    finished = resume(victim)
    assert finished.returncode == EXIT_COMPLETED, finished.stderr
    assert json.loads(victim.result.read_text())["step"] == 2
    assert unharmed(folder)
