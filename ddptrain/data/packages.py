"""Imports datasets and transformers when they are used: offline, without bars, or with a remedy."""

from __future__ import annotations

import importlib
import os
from typing import Any

from ddptrain.errors import Refused

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def import_package(name: str) -> Any:
    """The package ``name``. Raises ``Refused`` if it is not installed.

    What a rank reads is on disk, so nothing is to wait for a network, unless the environment says
    otherwise; and threads of a tokenizer would not survive the fork of a loading worker.
    """
    for variable in OFFLINE:
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Refused(
            f"this is read with {name}, and there is no {error.name}; install it: "
            "pip install 'ddptrain[huggingface]'"
        ) from None
    if name == "datasets":
        package.disable_progress_bars()
    return package
