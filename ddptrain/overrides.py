"""Overrides as Hydra reads them: parsed, and written so that it reads what was meant."""

from __future__ import annotations

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from ddptrain.errors import Refused


def parse(overrides: list[str]) -> list[Override]:
    """Parse Hydra overrides. Raises ``Refused`` on what is not one."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if not key.strip("+~ "):
            raise Refused(f"not an override (key=value): {override!r}")
        try:
            parsed += parser.parse_overrides([override])
        except HydraException as error:
            hint = f"; quote a value with signs in it: '{key}=\"{value}\"'" if value else ""
            told = next((line for line in str(error).splitlines() if line.strip()), "no value")
            raise Refused(f"not an override (key=value): {override}: {told}{hint}") from None
    return parsed


def override(key: str, value: object) -> str:
    """An override that Hydra reads as this text, quoted if it has signs that mean something."""
    text = str(value)
    if not re.fullmatch(r"[\w/.:+<> -]+", text, re.ASCII) or text != text.strip():
        text = re.sub(r'(\\*)"', r'\1\1\\"', text)
        text = '"' + re.sub(r"(\\+)$", r"\1\1", text) + '"'
    return f"{key}={text}"
