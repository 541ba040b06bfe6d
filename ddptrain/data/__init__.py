"""Which samples a step trains on, and how they are fetched; data sets of a user's own files."""

from ddptrain.data.huggingface import HuggingFace
from ddptrain.data.images import ImageFolder
from ddptrain.data.interactions import Interactions
from ddptrain.data.series import Series
from ddptrain.data.table import Table
from ddptrain.data.texts import TextFiles, TextFolder

__all__ = [
    "HuggingFace",
    "ImageFolder",
    "Interactions",
    "Series",
    "Table",
    "TextFiles",
    "TextFolder",
]
