"""A data set of the library datasets, as the arguments of a model of the library transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddptrain.data.labels import read_labels
from ddptrain.data.local_files import Part, read_parts
from ddptrain.data.splits import FRACTIONS, check_split
from ddptrain.data.tabular import check_lists
from ddptrain.data.tokens import Tokens, tokens_of
from ddptrain.errors import Refused

IGNORED = -100
AT_ONCE = 1000
"""Rows that are tokenised together."""
Batch = dict[str, Tensor]


class HuggingFace(Dataset[Batch]):
    """Rows of local files, or of a folder that ``save_to_disk`` has written, as named tensors.

    A row's ``text`` becomes ``input_ids`` and ``attention_mask``, int64, shape (length,): cut, or
    filled up. With ``pack`` the texts of a split are joined, with the tokenizer's end between them,
    or the token ``end``, and a sample is a window of ``length`` tokens, ``input_ids`` alone;
    windows overlap by one, so a language model predicts each token once. ``columns`` are handed on
    under their names: numbers, or lists of them; lists of different lengths are cut, or filled up,
    to ``length``.

    ``label`` is the column of ``labels``: texts, whole numbers and a ``ClassLabel`` are classes,
    int64, in the order of ``class_names``, others numbers, float32; whole ones too if the model has
    one of ``outputs``. ``conf/data/huggingface.yaml`` has a comment for each option. Raises
    ``Refused``.
    """

    def __init__(
        self,
        split: str,
        path: str | Mapping[str, str],
        text: str | None = None,
        label: str | None = None,
        columns: Sequence[str] = (),
        length: int | None = None,
        tokenizer: Any = "bytes",
        pack: bool = False,
        end: str | None = None,
        splits: Mapping[str, str] | None = None,
        fractions: Sequence[float] = FRACTIONS,
        options: Mapping[str, Any] | None = None,
        outputs: int | None = None,
        vocabulary: int | None = None,
        positions: int | None = None,
    ) -> None:
        check_split(split)
        _check_wishes(text, label, columns, length, pack, positions)
        if end is not None and not pack:
            raise Refused(f"end: {end!r} goes between texts that pack joins; set pack=true")
        training, mine = read_parts(path, split, splits or {}, fractions, options or {})
        for part in (training, mine):
            for key, name in (("text", text), ("label", label), *(("columns", n) for n in columns)):
                if name is not None:
                    part.check_column(key, name)
        self.rows = mine.rows
        self.length = length
        self.text, self.columns = text, list(columns)
        self.data = mine.data.select_columns([*([text] if text else []), *columns])
        for name in columns:
            _check_numbers(mine, name, length)
        self.class_names: list[str] = []
        self.labels: Tensor | None = None
        if label is not None:
            self.labels, self.class_names = read_labels(training, mine, label, outputs)
        self.windows: Tensor | None = None
        if text is not None and length is not None:
            self.tokens = _tokens_for(mine, text, tokenizer, end, vocabulary)
            self.windows = _packed(mine, text, self.tokens, length) if pack else None

    @property
    def token_names(self) -> list[str] | None:
        """What tokens are called, if a text is made tokens here; made when they are asked for."""
        return None if self.text is None else self.tokens.names()

    def __len__(self) -> int:
        return len(self.rows) if self.windows is None else len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A micro-batch, each tensor of shape (len(indices), …)."""
        if self.windows is not None:
            return {"input_ids": self.windows[torch.as_tensor(indices)].long()}
        rows = self.data[self.rows[list(indices)].tolist()]
        batch: Batch = {}
        if self.text is not None:
            rows["input_ids"] = self.tokens.encode(rows[self.text], self.length)
            batch["input_ids"] = _filled(rows["input_ids"], self.length, self.tokens.padding)
        for name in self.columns:
            batch[name] = _filled(rows[name], self.length, IGNORED if name == "labels" else 0)
        if "input_ids" in batch and "attention_mask" not in batch:
            mask = [[1] * len(row) for row in rows["input_ids"]]
            batch["attention_mask"] = _filled(mask, self.length, 0)
        if self.labels is not None:
            batch["labels"] = self.labels[torch.as_tensor(indices)]
        return batch


def _check_wishes(
    text: str | None,
    label: str | None,
    columns: Sequence[str],
    length: int | None,
    pack: bool,
    positions: int | None,
) -> None:
    """Refuse what does not go together, before anything is read. Raises ``Refused``."""
    check_lists({"columns": columns})
    if text is None and not columns:
        raise Refused("text: name the column of texts, or under columns those of numbers")
    if text is not None and length is None:
        raise Refused("length: a text needs it; say how many tokens a sample has")
    if length is not None and length < 2:
        raise Refused(f"length: expected a number of tokens above 1, got {length}")
    if length is not None and positions is not None and length > positions:
        raise Refused(
            f"length: {length} tokens, but the model has {positions} positions; make it shorter, "
            "or give the model more (model.config)"
        )
    if text is not None and {"input_ids", "attention_mask"} & set(columns):
        raise Refused("columns: input_ids and attention_mask come of text; leave one of both out")
    if label is not None and "labels" in columns:
        raise Refused("columns: labels come of label; leave one of both out")
    if pack and (text is None or label is not None or columns):
        raise Refused(
            "pack: it joins texts for a language model; it goes without label and columns"
        )


def _check_numbers(part: Part, name: str, length: int | None) -> None:
    """Refuse a column that is no tensor for each row. Raises ``Refused``."""
    import pyarrow
    from pyarrow import compute

    column = part.data.data.column(name)
    inner, depth = column.type, 0
    while hasattr(inner, "value_type"):
        inner, depth = inner.value_type, depth + 1
    types = pyarrow.types
    if not any(kind(inner) for kind in (types.is_integer, types.is_floating, types.is_boolean)):
        raise Refused(
            f"columns: {name!r} of {part.where} is of type {column.type}; expected numbers, or "
            "lists of them (text: names a column of texts)"
        )
    if depth == 1 and length is None:
        lengths = compute.unique(compute.list_value_length(column)).to_pylist()
        if len(lengths) > 1:
            raise Refused(
                f"columns: the lists of {name!r} of {part.where} have {min(lengths)} to "
                f"{max(lengths)} numbers; set length, to which they are cut or filled up"
            )


def _tokens_for(
    part: Part, text: str, tokenizer: object, end: str | None, vocabulary: int | None
) -> Tokens:
    dtype = str(getattr(part.data.features[text], "dtype", ""))
    if dtype not in ("string", "large_string"):
        raise Refused(f"text: column {text!r} of {part.where} is of {dtype or 'lists'}, not text")
    tokens = tokens_of(tokenizer, end)
    if vocabulary is not None and vocabulary < tokens.size:
        raise Refused(
            f"tokenizer: it has {tokens.size} tokens, but model.config.vocab_size={vocabulary}; "
            f"set model.config.vocab_size={tokens.size}"
        )
    return tokens


def _packed(part: Part, text: str, tokens: Tokens, length: int) -> Tensor:
    """The texts of a split, joined, as windows, int32, (windows, length). Raises ``Refused``."""
    if tokens.end is None:
        raise Refused(
            "pack: the tokenizer says of no token that it ends a text, and without one texts would "
            "run into each other; set end to one of its tokens, such as end: '<|endoftext|>'"
        )
    pieces = []
    column = part.data.select_columns([text])
    for first in range(0, len(part.rows), AT_ONCE):
        texts = column[part.rows[first : first + AT_ONCE].tolist()][text]
        encoded = tokens.encode(texts, None)
        pieces.append(np.array([n for one in encoded for n in (*one, tokens.end)], dtype=np.int32))
    joined = torch.from_numpy(np.concatenate(pieces))
    if len(joined) < length:
        raise Refused(
            f"{part.where}: {len(joined)} tokens in {len(part.rows)} texts of split {part.split} "
            f"fill no window of length={length}; take more text, or a shorter length"
        )
    return joined.unfold(0, length, length - 1)


def _filled(values: Sequence[Any], length: int | None, padding: int) -> Tensor:
    """Numbers, or lists of them, as one tensor; lists cut, or filled up with ``padding``."""
    first = values[0]
    if (
        length is not None
        and isinstance(first, list)
        and not (first and isinstance(first[0], list))
    ):
        values = [[*row[:length], *[padding] * (length - len(row))] for row in values]
    array = np.asarray(values)
    is_real = np.issubdtype(array.dtype, np.floating)
    return torch.from_numpy(array.astype(np.float32 if is_real else np.int64))
