"""Imports datasets and transformers as a rank needs them: offline, or with a remedy."""

from __future__ import annotations

import importlib
import os
from typing import Any

from ddptrain.errors import Refused

HUB = "HF_HUB_OFFLINE"
OTHERS = ("HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def stay_offline() -> None:
    """Have what the libraries of Hugging Face need come from disk, unless the environment asks.

    Each library reads the variables once, when it is imported; so this is called before anything is
    that a config names. What a rank reads is on disk, and nothing is to wait for a network; and
    threads of a tokenizer would not survive the fork of a loading worker.
    """
    told = os.environ.setdefault(HUB, "1")
    for variable in OTHERS:
        os.environ.setdefault(variable, told)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def import_package(name: str) -> Any:
    """The package ``name``, offline. Raises ``Refused`` if it is not installed."""
    stay_offline()
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
