"""Texts as numbers of tokens: bytes, or what a tokenizer of transformers on disk makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from ddptrain.data.named import byte_name, shown
from ddptrain.data.packages import import_package
from ddptrain.errors import Refused
from ddptrain.nearest import suggest


class Tokens(Protocol):
    """``padding`` fills up, ``end`` is between texts, and all numbers are below ``size``."""

    padding: int
    end: int | None
    size: int

    def encode(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        """Numbers for each text, at most ``length`` of them; None takes all, and adds none."""

    def names(self) -> list[str]:
        """What the ``size`` tokens are called, in the order of their numbers."""


class Bytes:
    """The bytes of UTF-8, from 2 on; 0 fills up, 1 ends a text. It needs no file."""

    padding = 0
    end: int | None = 1
    size = 258

    def encode(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        return [[byte + 2 for byte in text.encode()[:length]] for text in texts]

    def names(self) -> list[str]:
        return ["[PAD]", "[END]", *map(byte_name, range(256))]


class OfTransformers:
    """A tokenizer of transformers; with a ``length`` it adds what it puts round a text."""

    def __init__(self, tokenizer: Any, end: str | None) -> None:
        self.tokenizer = tokenizer
        self.padding = tokenizer.pad_token_id or 0  # masked, so that it means nothing
        self.end: int | None = tokenizer.eos_token_id
        if self.end is None:
            self.end = tokenizer.sep_token_id
        if end is not None:
            known = tokenizer.get_vocab()
            if end not in known:
                near = suggest(end, list(known))
                hint = near if "did you mean" in near else ""
                raise Refused(f"end: the tokenizer has no token {end!r}{hint}")
            self.end = int(known[end])
        self.size = len(tokenizer)

    def encode(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=length is not None,
            truncation=length is not None,
            max_length=length,
            return_attention_mask=False,
            verbose=False,
        )
        return cast("list[list[int]]", encoded["input_ids"])

    def names(self) -> list[str]:
        known = {number: token for token, number in self.tokenizer.get_vocab().items()}
        return [shown(known.get(number, str(number))) for number in range(self.size)]


def tokens_of(tokenizer: object, end: str | None = None) -> Tokens:
    """What a config's ``tokenizer`` stands for: ``bytes``, a tokenizer.json, or a tokenizer.

    ``end`` is the token to put between texts; None takes what the tokenizer has for that, if it
    has. Raises ``Refused``.
    """
    if tokenizer == "bytes":
        if end is not None:
            raise Refused(f"end: bytes have an end of their own; leave {end!r} out")
        return Bytes()
    if isinstance(tokenizer, str):
        file = Path(tokenizer).expanduser()
        if not file.is_file():
            raise Refused(
                f"tokenizer: {tokenizer}: no such file (looked for from {Path.cwd()}); expected "
                "bytes, a tokenizer.json, or a tokenizer of transformers by its _target_"
            )
        transformers = import_package("transformers")
        try:
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
        except Exception as error:  # the library raises Exception itself
            raise Refused(f"tokenizer: {file} is no tokenizer.json: {error}") from None
    if not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id")):
        raise Refused(
            f"tokenizer: {type(tokenizer).__name__} is none; expected bytes, a tokenizer.json, or "
            "a tokenizer of transformers by its _target_"
        )
    return OfTransformers(tokenizer, end)
