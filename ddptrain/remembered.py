"""The config of a launch, kept for the attempts after the first, which start the faster for it."""

from __future__ import annotations

import json
import os
from base64 import b85decode, b85encode
from contextlib import suppress
from pathlib import Path
from typing import cast
from zlib import compress, decompress

from omegaconf import OmegaConf

from ddptrain.compose import compose
from ddptrain.config import Config, to_plain
from ddptrain.files import replace_text
from ddptrain.place import Place

LAUNCHED = "DDPTRAIN_CONFIG"
"""The variable that has it, where one launch starts the ranks of several nodes."""


def compose_once(overrides: list[str], place: Place) -> Config:
    """Compose and check the config in a launch's first attempt; the others go by that.

    So that a file edited meanwhile does not part the attempts, or the ranks. A launch of several
    nodes has composed it for all. Raises ``Refused``.
    """
    if LAUNCHED in os.environ:
        return unpacked(os.environ[LAUNCHED])
    file = _file(place)
    if file is not None and place.restarts > 0 and file.exists():
        return _launched(file.read_text())
    config = compose(overrides)
    if file is not None:
        with suppress(OSError):  # it is composed again then
            replace_text(file, json.dumps(to_plain(config)))
    return config


def packed(config: Config) -> str:
    """A config for ``LAUNCHED``: a variable takes 128 KiB, and a config may list many files."""
    return b85encode(compress(json.dumps(to_plain(config)).encode())).decode()


def unpacked(text: str) -> Config:
    """The config that was ``packed``."""
    return _launched(decompress(b85decode(text)).decode())


def _launched(text: str) -> Config:
    """The config that was composed and checked before."""
    typed = OmegaConf.merge(OmegaConf.structured(Config), json.loads(text))
    return cast("Config", OmegaConf.to_object(typed))


def _file(place: Place) -> Path | None:
    """In the folder that torchrun's agent has made, for this launch alone, on this node."""
    errors = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if errors is None:
        return None
    return Path(errors).parents[2] / f"config-{place.local_rank}.json"
