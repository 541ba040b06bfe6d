"""How much each part of an input adds to a score, by captum, sample for sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddptrain.data.fetch import Source
from ddptrain.errors import Refused
from ddptrain.explain.lookup import Lookup
from ddptrain.explain.samples import Example, Kind, inputs_of, labels_of, with_inputs
from ddptrain.generators import key_generators
from ddptrain.keys import derive
from ddptrain.parallel.ranks import Ranks
from ddptrain.tasks.task import Task

INTEGRATED, SALIENCY, PERMUTATION = "integrated-gradients", "saliency", "permutation"
METHODS: dict[Kind, tuple[str, ...]] = {
    "features": (INTEGRATED, PERMUTATION),
    "images": (INTEGRATED, SALIENCY),
    "tokens": (INTEGRATED,),
}


@dataclass
class Attributions:
    """Of N samples, on the CPU: what they are, and what is attributed to their parts.

    ``by_method`` has the shape of the inputs; of images it is (N, H, W), the sum over channels, of
    saliency the largest of them; of tokens (N, T). ``labels`` and ``explained``, int64, (N,), are
    the true class and that which is explained; -1 where there is no class, but an output alone.
    With integrated gradients ``changes``, (N,), is how far the score is from that of the baseline,
    and ``deltas`` how far what is attributed is from that; without, both are 0.
    """

    inputs: Tensor
    labels: Tensor
    explained: Tensor
    changes: Tensor
    deltas: Tensor
    by_method: dict[str, Tensor]

    @classmethod
    def joined(cls, parts: Sequence[Attributions]) -> Attributions:
        """One after the other."""
        plain = [f.name for f in fields(cls) if f.name != "by_method"]
        whole: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in plain}
        by_method = {m: torch.cat([p.by_method[m] for p in parts]) for m in parts[0].by_method}
        return cls(**whole, by_method=by_method)

    def by_class(self) -> dict[int, Tensor]:
        """The samples of each true class; where there is none, of each that is explained."""
        classes = torch.where(self.labels < 0, self.explained, self.labels)
        return {c: (classes == c).nonzero().flatten() for c in sorted(set(classes.tolist()))}

    def title(self, sample: int, class_name: Callable[[int], str]) -> str:
        """The class of a sample, and if that is not what it was taken for, both."""
        label, explained = int(self.labels[sample]), int(self.explained[sample])
        if label < 0 or explained < 0 or label == explained:
            return class_name(max(label, explained))
        return f"{class_name(label)}, taken for {class_name(explained)}"


class Attributor:
    """Attributes the scores of ``task`` to its inputs; it is set to eval mode, its weights fixed.

    Integrated gradients (Sundararajan, Taly and Yan, *Axiomatic Attribution for Deep Networks*,
    ICML 2017), taken at ``steps`` points, add up to the score's distance from that of a baseline;
    saliency (Simonyan, Vedaldi and Zisserman, ICLR workshops 2014) is the size of the gradient. Of
    tokens they are those of their embeddings, summed: captum's LayerIntegratedGradients would do as
    much, but hands the baseline to the model as tokens, too, so that one which masks what is filled
    up is another function there, and the convergence delta means nothing.

    Raises ``Refused`` for a task whose scores cannot be traced back.
    """

    def __init__(
        self, task: Task, example: Example, methods: Sequence[str], steps: int = 200
    ) -> None:
        self.task = task.eval().requires_grad_(False)
        self.kind = example.kind
        self.label = example.source.label
        self.methods = methods
        self.steps = steps
        self.lookup = None
        if example.kind == "tokens":
            self.lookup = Lookup.of(task, example.batch, self._inputs(example.batch))
        with torch.no_grad():
            self.outputs = self._scores(example.batch).shape[1]
        self._refuse_without_gradient(example.batch)

    def over(self, source: Source, batches: Iterable[Any], ranks: Ranks) -> Attributions:
        """Attribute all samples of ``source``; ``batches`` are those of this rank.

        A micro-batch is computed as a whole, wherever that is, and random numbers that a model may
        draw are keyed by it, so the result has the same bits on any number of ranks.
        """
        mine = source.plan.micro_batches(0, ranks.rank, ranks.world_size)
        found = []
        for micro_batch, batch in zip(mine, batches, strict=True):
            labels = labels_of(self.task, batch)
            key = derive(source.plan.seed, f"explain/{source.name}", micro_batch.index)
            key_generators(key, ranks.device)
            attributed = self.attribute(batch)
            if labels is not None:
                attributed.labels = labels.cpu()
            found.append(attributed)
        return Attributions.joined([part for parts in ranks.gather(found) for part in parts])

    def attribute(self, batch: Any) -> Attributions:
        """Attribute the scores of a micro-batch to its inputs; its labels are not looked at."""
        inputs = self._inputs(batch)
        with torch.no_grad():
            explained = self._scores(batch).argmax(1)
            end, start = self._embedded(inputs), self._embedded(self._baseline(inputs))
        changes = deltas = torch.zeros(len(inputs), device=inputs.device)
        found = {}
        if INTEGRATED in self.methods:
            values, deltas = self._integrate(start, end, batch, explained)
            changes = values.flatten(1).sum(1) - deltas
            channels = {"images": 1, "tokens": 2}.get(self.kind)
            found[INTEGRATED] = values if channels is None else values.sum(channels)
        if SALIENCY in self.methods:
            found[SALIENCY] = self._gradient(end, batch, explained).amax(1)
        # NumPy, which draws them, has no bfloat16.
        on_host = {
            method: values.detach().cpu().to(torch.promote_types(values.dtype, torch.float32))
            for method, values in found.items()
        }
        none = torch.full_like(explained, -1)
        classes = explained if self.outputs > 1 else none
        changes, deltas = changes.detach().cpu(), deltas.detach().cpu()
        return Attributions(inputs.cpu(), none.cpu(), classes.cpu(), changes, deltas, on_host)

    def _integrate(
        self, start: Tensor, end: Tensor, batch: Any, explained: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Integrated gradients in the shape of ``end``, and their convergence deltas, (B,)."""
        from captum.attr import IntegratedGradients

        score = partial(self._score, batch=batch, explained=explained)
        values, deltas = IntegratedGradients(score).attribute(
            end,
            start,
            n_steps=self.steps,
            # A forward is no larger than in an evaluation, and of the same samples in their order.
            internal_batch_size=len(end),
            return_convergence_delta=True,
        )
        return values, deltas

    def _gradient(self, end: Tensor, batch: Any, explained: Tensor) -> Tensor:
        from captum.attr import Saliency

        leaf = end.detach().clone().requires_grad_()
        score = partial(self._score, batch=batch, explained=explained)
        sizes: Tensor = Saliency(score).attribute(leaf)
        return sizes

    def _score(self, values: Tensor, batch: Any, explained: Tensor) -> Tensor:
        """The explained output of each sample, (B,), with other inputs, or embeddings of them."""
        if self.lookup is None:
            scores = self._scores(with_inputs(self.task, batch, values))
        else:
            with self.lookup.giving(values):
                scores = self._scores(batch)
        return scores.gather(1, explained[:, None]).squeeze(1)

    def _inputs(self, batch: Any) -> Tensor:
        return inputs_of(self.task, batch, self.label)

    def _scores(self, batch: Any) -> Tensor:
        """What the task explains, (B, outputs). Raises ``Refused`` for another shape."""
        inputs, scores = self._inputs(batch), self.task.explained_of(batch)
        is_score = isinstance(scores, Tensor) and scores.is_floating_point()
        if not is_score or scores.dim() not in (1, 2) or len(scores) != len(inputs):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise self._refusal(
                f"gives {shape} for {len(inputs)} samples; expected are scores in floating point, "
                "(B,) or (B, classes)"
            )
        return scores.reshape(len(inputs), -1)

    def _baseline(self, inputs: Tensor) -> Tensor:
        baseline = self.task.baseline(inputs)
        if baseline.shape != inputs.shape or baseline.dtype != inputs.dtype:
            raise Refused(
                f"task: {type(self.task).__name__}.baseline(inputs) is {baseline.dtype} of shape "
                f"{tuple(baseline.shape)}; the inputs are {inputs.dtype}, {tuple(inputs.shape)}"
            )
        return baseline

    def _embedded(self, inputs: Tensor) -> Tensor:
        if self.lookup is None:
            return inputs
        vectors: Tensor = self.lookup.layer(inputs)
        return vectors

    def _refuse_without_gradient(self, batch: Any) -> None:
        inputs = self._inputs(batch)
        with torch.no_grad():
            leaf = self._embedded(inputs).clone()
            self._baseline(inputs)
        first = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        if not self._score(leaf.requires_grad_(), batch, first).requires_grad:
            raise self._refusal(
                "has no gradient with respect to its inputs (is it computed under no_grad, or from "
                "rounded numbers?)"
            )

    def _refusal(self, what: str) -> Refused:
        own = type(self.task)
        of_batch = own.explained_of is not Task.explained_of
        method = "explained_of(batch)" if of_batch else "explained(inputs)"
        return Refused(f"task: {own.__name__}.{method} {what}")
