"""What a config may name as a part of a model: one rule, by where a thing is defined.

- What modules of the user's own define may be named.
- Of Python, torch, numpy and ddptrain, which can do anything, only what ``ONLY`` lists.
- Of transformers, which also fetches, trains and runs what a folder brings along, only the classes
  that ``TRANSFORMERS`` describes.
- Of other installed packages, all but those in ``TOOLS``, whose business is to load, run or fetch,
  and what is called by one of ``VERBS`` or with one of ``WORDS`` in its name.

Third-party packages are too many to know: the last point keeps out what is known to run code, and
is no proof of what is left.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PYTHON = {
    "builtins": _words(
        "bool bytes complex dict float frozenset int list range set slice str tuple"
    ),
    "collections": _words("Counter OrderedDict defaultdict deque"),
    "datetime": _words("date datetime timedelta"),
    "decimal": _words("Decimal"),
    "fractions": _words("Fraction"),
    "math": _words("acos asin atan cos exp fsum hypot log log10 log2 pow prod sin sqrt tan"),
    "pathlib": _words("Path PurePath"),
    "random": _words("Random"),
}
ONLY = {
    **PYTHON,
    "ddptrain": _words(
        "Loss Task data.HuggingFace data.ImageFolder data.Interactions data.Series data.Table "
        "data.TextFiles data.TextFolder data.huggingface.HuggingFace data.images.ImageFolder "
        "data.interactions.Interactions data.library.StandardLibraryFunctions "
        "data.library_imports.StandardLibraryImports data.series.Series data.sets "
        "data.table.Table data.texts.TextFiles data.texts.TextFolder "
        "models optim.muon optim.patience optim.schedules tasks"
    ),
    "numpy": _words(
        "arange array asarray bool_ dtype empty eye float16 float32 float64 full identity int8 "
        "int16 int32 int64 linspace logspace ones random uint8 zeros"
    ),
    "torch": _words(
        "Generator Size Tensor device distributions nn optim utils.data "
        "arange as_tensor empty eye full linspace logspace ones rand randint randn randperm tensor "
        "zeros abs clamp cos erf exp log relu selu sigmoid sin softmax sqrt square tanh"
    ),
}
"""What may be named of these; of a module or a class, also what is in it (not so of Python)."""
NOT = ("torch.utils.data.datapipes", "torch.utils.data.graph")
TOOLS = _words(
    """
    Cython IPython absl aiohttp antlr4 boto3 cffi click cloudpickle comet_ml cupy dask datasets
    dill distributed docker execnet fabric fire flask fsspec functorch future gdown git grpc
    httpx huggingface_hub hydra invoke ipykernel jinja2 joblib jsonpickle jupyter_client
    lightning_utilities llvmlite mako markdown mlflow mpmath multiprocess mypy mypyc ninja
    notebook numba numexpr omegaconf pandas paramiko patsy pexpect pip pkg_resources plumbum
    psutil pyarrow pydevd pytest pyximport ray requests ruamel s3fs setuptools sh six
    statsmodels sympy tensorboard torchgen tornado triton typer urllib3 uvicorn wandb werkzeug
    wheel xdist yaml
    """
)
"""Also what takes a text as code: formulas of patsy, and so of statsmodels, queries of pandas."""
TRANSFORMERS = re.compile(
    r"((models|configuration_utils|modeling_utils|tokenization_\w+)\.([a-z]\w*\.)*)?"
    r"(?=[A-Z])\w*(Config|Model|For[A-Z]\w*|Tokenizer(Fast|Base)?|TokenizersBackend)"
    r"(\.from_(pretrained|config))?"
)
"""What may be named of transformers: models, their configs, tokenizers, and these on disk."""
VERBS = _words("call compile dump dumps load loads main open run save system test")
"""What an installed package calls so is refused, and what has one of ``WORDS`` in its name."""
WORDS = _words(
    "checkpoint download eval exec extract fetch import pickle popen shell spawn subprocess "
    "unpickle write"
)
UNSAFE = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False}
"""Arguments by which packages are told to run code that is in data."""


def objection(name: str, node: dict[Any, Any]) -> str | None:
    """Why a config may not name what is defined as ``name``; None if it may.

    ``node`` holds the arguments that it is to be called with.
    """
    root, _, below = name.partition(".")
    last = name.rpartition(".")[2]
    home = home_of(root)
    if name.startswith("__") or ".__" in name:
        return "it reaches into Python's own attributes"
    if root in ONLY:
        if not below:
            return None  # a module, for which there is another message
        if not _is_listed(root, below):
            return f"{root} can do anything, and this is none of what may be named of it"
    elif home == "python":
        return "Python's standard library can do anything, and little of it may be named"
    elif home != "installed":
        return None
    elif root in TOOLS:
        return f"{root} loads, runs or fetches other things"
    elif root == "transformers" and below and not TRANSFORMERS.fullmatch(below):
        return "of transformers only models, their configs and tokenizers may be named"
    if last in VERBS or (last.islower() and WORDS & set(last.split("_"))):
        return "its name says that it loads, runs, fetches or writes something"
    for argument, value in UNSAFE.items():
        if argument in node and bool(node[argument]) is value:
            return f"{argument}={value} lets it run code that is in data"
    return None


def _is_listed(root: str, below: str) -> bool:
    """Whether ``ONLY`` has it; of Python exactly that, of others also what is in it."""
    if root in PYTHON:
        return below in ONLY[root]
    is_below = any(below == only or below.startswith(f"{only}.") for only in ONLY[root])
    return is_below and not is_private(f".{below}") and not f"{root}.{below}".startswith(NOT)


def is_private(name: str) -> bool:
    """Whether a part of a dotted name below the package is marked as the package's own."""
    return "._" in name


def is_tool(root: str) -> bool:
    """Whether nothing below this top-level module may be named."""
    return root not in ONLY and (root in TOOLS or home_of(root) == "python")


@cache
def home_of(root: str) -> str:
    """Whose a top-level module is: "python", "installed", the user's "own", or "absent"."""
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None:
        return "python" if root in sys.stdlib_module_names else "absent"
    places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
    if not places or places[0] is None:
        return "python"  # built in, or frozen
    place = Path(places[0])
    if {"site-packages", "dist-packages"} & set(place.parts):
        return "installed"
    return "python" if place.is_relative_to(sysconfig.get_paths()["stdlib"]) else "own"
