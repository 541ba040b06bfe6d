"""What is trained: the loss of a batch and the metrics of an evaluation."""

from ddptrain.tasks.classification import BinaryClassification, Classification
from ddptrain.tasks.language_model import LanguageModel
from ddptrain.tasks.objective import Objective
from ddptrain.tasks.recommendation import Recommendation
from ddptrain.tasks.regression import Regression
from ddptrain.tasks.task import Batch, Loss, Task
from ddptrain.tasks.transformer_models import Transformers

__all__ = [
    "Batch",
    "BinaryClassification",
    "Classification",
    "LanguageModel",
    "Loss",
    "Objective",
    "Recommendation",
    "Regression",
    "Task",
    "Transformers",
]
