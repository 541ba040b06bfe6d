"""Models of the library transformers: a batch is the arguments of their forward, and `labels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddptrain.errors import Refused, TrainingError
from ddptrain.tasks import classification
from ddptrain.tasks.metrics import choose, make
from ddptrain.tasks.task import Key, Loss, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Predicted = Literal["class", "number", "next_token", "token"]
OfTokens = Literal["perplexity", "bits_per_token", "accuracy"]
Name = Literal[
    "perplexity", "bits_per_token", "mae", "rmse", "r2", "relative_mae",
    "accuracy", "precision", "recall", "f1", "auroc", "average_precision", "calibration_error",
    "confusion_matrix", "roc", "pr", "reliability",
]  # fmt: skip
KNOWN: dict[str, tuple[str, ...]] = {
    "class": get_args(classification.Name),
    "number": ("mae", "rmse", "r2", "relative_mae"),
    "next_token": get_args(OfTokens),
    "token": get_args(OfTokens),
}
USUAL = {
    "class": ("accuracy", "f1"),
    "number": ("mae", "rmse", "r2"),
    "next_token": ("perplexity", "bits_per_token"),
    "token": ("perplexity", "accuracy"),
}
HEADS = {
    "ForSequenceClassification": "class",
    "ForImageClassification": "class",
    "ForAudioClassification": "class",
    "ForCausalLM": "next_token",
    "LMHeadModel": "next_token",
    "ForMaskedLM": "token",
    "ForTokenClassification": "token",
}
"""How the names of classes end that transformers makes for these."""
IGNORED = -100
"""A label that is none, as transformers has it."""
SHOWN = 8


class Transformers(Task):
    """What a model of transformers predicts: its loss by its logits, as a sum and a count.

    A batch is a mapping of tensors: arguments of the model's forward, and ``labels``. ``predicts``
    is what the labels are; None goes by the name of the model's class:

    - ``class``: int64, (B,), for logits (B, classes); each sample counts once;
    - ``number``: float, (B,), for logits (B, 1): squared errors;
    - ``next_token``: int64, (B, T), for logits (B, T, vocabulary) of the tokens one place before
      each; without ``labels`` they are ``input_ids`` where ``attention_mask`` is 1;
    - ``token``: int64, (B, T), for logits (B, T, classes) at the same place.

    Labels of −100 do not count. The model's own ``loss`` is not used: it is a mean over a
    micro-batch, whose weight depends on how many tokens that happens to have.

    ``metrics`` are names, or mappings of names to other torchmetrics; these are updated with
    probabilities and labels of classes, with outputs and targets, float64, (B,), of numbers, and
    with logits, (N, vocabulary), and labels, (N,), of the N tokens that count. Raises ``Refused``
    for a name that there is not, and for a model whose class does not tell what it predicts.
    """

    def __init__(
        self,
        model: nn.Module,
        predicts: Predicted | None = None,
        metrics: Sequence[Name | Mapping[str, Metric]] | None = None,
    ) -> None:
        super().__init__()
        config = getattr(model, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]  # only generating reads it
        self.model = model
        self.classes = int(getattr(config, "num_labels", 2))
        self.predicts = predicts or _predicted_by(model, self.classes)
        if self.predicts not in KNOWN:
            raise Refused(f"predicts: expected one of {', '.join(KNOWN)}, got {predicts!r}")
        chosen = USUAL[self.predicts] if metrics is None else metrics
        self.chosen = choose(chosen, KNOWN[self.predicts])

    def check_data(self, dataset: object) -> None:
        """Hold the data's ``class_names`` and ``labels``, if any, against the model's outputs."""
        names: Sequence[str] = getattr(dataset, "class_names", ())
        labels = getattr(dataset, "labels", None)
        is_real = isinstance(labels, Tensor) and labels.is_floating_point()
        if is_real and self.predicts == "class":
            raise Refused(
                f"label: they are numbers, but the model has {self.classes} outputs; set "
                "model.config.num_labels=1, or write classes as text or whole numbers"
            )
        if not names or self.predicts not in ("class", "number"):
            return
        if self.predicts == "number":
            raise Refused(
                f"label: there are {len(names)} classes, but the model predicts a number; set "
                "data.train.outputs=1 if the labels are whole numbers, or give the model "
                f"{len(names)} outputs"
            )
        if len(names) != self.classes:
            shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
            raise Refused(
                f"label: there are {len(names)} classes ({shown}), but the model has "
                f"{self.classes} outputs; set model.config.num_labels={len(names)}"
            )

    def forward(self, batch: Mapping[str, Tensor]) -> Loss:
        return self._loss(*self._outputs(batch))

    def _outputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and labels that belong together, (N, classes) and (N,), or (B,) and (B,)."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        labels = batch["labels"] if "labels" in batch else self._of_inputs(inputs)
        logits = self._logits(inputs)
        if self.predicts == "number":
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).squeeze(-1)
        elif self.predicts == "next_token":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        elif self.predicts == "token":
            logits, labels = logits.flatten(0, 1), labels.flatten()
        if logits.shape[: labels.dim()] != labels.shape:
            raise TrainingError(
                f"task: logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)} for "
                f"task.predicts={self.predicts}; choose another, or give other labels"
            )
        return logits, labels

    def _logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        logits = getattr(self.model(**inputs), "logits", None)
        if not isinstance(logits, Tensor):
            raise TrainingError(
                f"task: {type(self.model).__name__} gives no logits; take a class with a head, "
                "such as transformers.BertForSequenceClassification"
            )
        return logits

    def _of_inputs(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Of a language model the text itself, but for what fills it up."""
        if self.predicts != "next_token" or "input_ids" not in inputs:
            raise TrainingError(
                f"task: the batch has {', '.join(inputs)} and no labels, which "
                f"task.predicts={self.predicts} needs; see that the data set gives some"
            )
        tokens = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        return tokens if mask is None else tokens.masked_fill(mask == 0, IGNORED)

    def _loss(self, logits: Tensor, labels: Tensor) -> Loss:
        if self.predicts == "number":
            total = functional.mse_loss(logits, labels.to(logits.dtype), reduction="sum")
            return Loss(total, len(labels))
        total = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        if self.predicts == "class":
            return Loss(total, len(labels))
        return Loss(total, (labels != IGNORED).sum())

    def metrics(self) -> dict[str, Metric]:
        return super().metrics() | make(self.chosen, self._make_metric)

    def _make_metric(self, name: str) -> Metric:
        from ddptrain.tasks.mean import BitsPerByte, Mean, Perplexity

        if self.predicts == "class":
            from ddptrain.tasks.classification_metrics import multiclass

            return multiclass(name, self.classes)
        if self.predicts == "number":
            from ddptrain.tasks.regression_metrics import regression

            return regression(name)
        kinds = {"perplexity": Perplexity, "bits_per_token": BitsPerByte, "accuracy": Mean}
        return kinds[name]()

    def update(self, metrics: dict[str, Metric], batch: Mapping[str, Tensor]) -> None:
        logits, labels = self._outputs(batch)
        loss = self._loss(logits, labels)
        self.update_loss(metrics, loss)
        of_tokens = self.predicts in ("next_token", "token")
        given: tuple[Tensor, Tensor] | None = None
        for name, own in self.chosen.items():
            if own is not None or not of_tokens:
                given = given or self._given(logits, labels)  # logits of all tokens are large
                metrics[name].update(*given)
            elif name == "accuracy":
                metrics[name].update((logits.argmax(-1) == labels).sum(), loss.count)
            else:
                metrics[name].update(loss.sum, loss.count)

    def _given(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What metrics are updated with that need more than the loss."""
        if self.predicts == "class":
            return logits.double().softmax(-1), labels
        if self.predicts == "number":
            return logits.double(), labels.double()
        counts = labels != IGNORED
        return logits[counts], labels[counts]

    def explained_at(self, batch: Mapping[str, Tensor]) -> tuple[Key, Key | None]:
        """Return the model's main input, such as ``input_ids`` or ``pixel_values``, and labels.

        Of a model that names none it is what the batch has alone beside them. Raises ``Refused``
        where there is a score for each token, or where a decoder reads the tokens as well.
        """
        if self.predicts not in ("class", "number"):
            raise Refused(
                f"task: with predicts={self.predicts} there are scores of each token; explained is "
                "a class or a number that is predicted of a whole sample"
            )
        name = type(self.model).__name__
        main = getattr(self.model, "main_input_name", None)
        inputs = [key for key in batch if key != "labels"]
        if main not in inputs:
            main = inputs[0] if len(inputs) == 1 else None
        if main is None:
            raise Refused(
                f"task: which of {', '.join(inputs)} is to be explained, {name} does not tell; "
                "name that one in its main_input_name"
            )
        has_decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if has_decoder and not batch[main].is_floating_point():
            raise Refused(
                f"task: of {name} both the encoder and the decoder read the tokens; explained are "
                "models that look them up once"
            )
        return main, "labels" if self.predicts == "class" else None

    def explained_of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits, (B, classes) or (B, 1); of a subclass with its own, ``explained``."""
        if type(self).explained is not Task.explained:
            return super().explained_of(batch)
        return self._logits({name: tensor for name, tensor in batch.items() if name != "labels"})

    def baseline(self, inputs: Tensor) -> Tensor:
        """Return the token that fills up, if the model's config names one; zeros otherwise."""
        padding = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        if inputs.is_floating_point() or padding is None or padding < 0:
            return super().baseline(inputs)
        return torch.full_like(inputs, padding)


def _predicted_by(model: nn.Module, classes: int) -> str:
    name = type(model).__name__
    found = next((kind for ending, kind in HEADS.items() if name.endswith(ending)), None)
    if found is None:
        raise Refused(
            f"predicts: the name of {name} does not tell what it predicts; set task.predicts to "
            f"one of {', '.join(KNOWN)}, or take a class whose name ends in one of "
            f"{', '.join(HEADS)}"
        )
    return "number" if found == "class" and classes == 1 else found
