"""Small reference models, for the built-in experiments and to copy from."""

from ddptrain.models.convnet import ConvNet
from ddptrain.models.gpt import GPT
from ddptrain.models.mlp import MLP
from ddptrain.models.recommenders import MatrixFactorisation, TwoTower
from ddptrain.models.text_classifier import TextClassifier

__all__ = ["GPT", "MLP", "ConvNet", "MatrixFactorisation", "TextClassifier", "TwoTower"]
