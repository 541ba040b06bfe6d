"""Judges trials by the reference: whether the number of ranks, a resume, a worker shows."""

from __future__ import annotations

from ddptrain.verify.culprit import find
from ddptrain.verify.report import Check, Finding, short
from ddptrain.verify.result import Result
from ddptrain.verify.trial import Outcome

NORMALISATION = (
    "it is a SyncBatchNorm, which normalises over what the ranks hold at once",
    "use BatchNorm, which normalises over a micro-batch, or GroupNorm or LayerNorm",
)


def check_normalisation(reference: Outcome) -> list[Check]:
    """Fails if a module is known to depend on the ranks; the CPU would refuse to run it on two."""
    findings = tuple(
        Finding(reference.labels[key], "its output depends on the ranks", *NORMALISATION)
        for key in reference.synchronised
    )
    return [Check("modules", "depend on the ranks", False, findings)] if findings else []


def check_ranks(results: list[Result], exact: bool) -> list[Check]:
    """Samples and gradients of the trials on several ranks."""
    if not results:
        return [Check("1 rank", "a step has one micro-batch, so more have no work", None)]
    what = _list([1, *(result.trial.world_size for result in results)]) + " ranks"
    reference = results[0].reference
    same = all(result.has_same_samples for result in results)
    count = sum(moment.split == "train" for moment in reference.trace)
    parted = [result for result in results if result.parting is not None]
    bits = "gradients, weights and optimiser state, to the bit"
    far = short(max(result.gradient_distance for result in results))
    figure = f"same {bits}" if exact else f"same gradients (largest relative difference {far})"
    if parted:
        figure = f"other gradients or weights, on {_list([r.trial.world_size for r in parted])}"
        figure += "" if exact else f" (largest relative difference {far})"
    contents = "" if same else " with other contents"
    samples = f"same samples{contents} in {count} micro-batches"
    return [
        Check(what, samples, same),
        Check(what, figure, not parted, tuple(map(find, parted))),
    ]


def check_alike(what: str, result: Result) -> Check:
    """A trial on one rank, which must repeat the reference's bits."""
    if result.parting is None:
        return Check(what, "same weights, optimiser state and buffers, to the bit", True)
    return Check(what, "other weights, optimiser state or buffers", False, (find(result),))


def check_evaluation(results: list[Result]) -> list[Check]:
    """The metrics of each trial, with the reference's last weights."""
    if not results[0].reference.metrics:
        return []
    splits = ", ".join(results[0].reference.metrics)
    parted = [result for result in results if result.parting_of_evaluation is not None]
    largest = max(result.metric_distance[0] for result in results)
    word = "other outputs or" if parted else "same"
    figure = f"{word} metrics of {splits} (largest relative difference {short(largest)})"
    findings = tuple(find(result, in_evaluation=True) for result in parted)
    return [Check("evaluation", figure, not parted, findings)]


def _list(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last
