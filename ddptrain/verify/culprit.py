"""Says of a difference whose it is, how it shows, why, and what to do."""

from __future__ import annotations

from ddptrain.verify.attributes import Attributes
from ddptrain.verify.reasons import find_reason
from ddptrain.verify.report import Finding
from ddptrain.verify.result import Result
from ddptrain.verify.trace import Difference


def find(result: Result, in_evaluation: bool = False) -> Finding:
    """The culprit of a difference, and why."""
    difference = result.parting_of_evaluation if in_evaluation else result.parting
    assert difference is not None
    key = _key(difference)
    reference = result.reference
    nothing = Attributes()
    why, remedy = find_reason(
        key.partition("/")[0],
        reference.before.get(key, nothing),
        reference.after.get(key, nothing),
        [outcome.before.get(key, nothing) for outcome in result.outcomes],
    )
    return Finding(reference.labels.get(key, key), _where(result, difference), why, remedy)


def _key(difference: Difference) -> str:
    """What the outcomes know the culprit by."""
    kind, name = difference.kind, difference.name
    if kind == "batch":
        return f"data/{name}"
    if kind == "metric":
        return "module/"
    if kind == "state":
        of, _, rest = name.partition("/")
        return f"module/{rest.rpartition('.')[0]}" if of == "buffer" else "optim/"
    return f"module/{name.rpartition('.')[0] if kind == 'sum' else name}"


def _where(result: Result, difference: Difference) -> str:
    moment, kind, name = difference
    what = {
        "batch": "the same samples, with other contents",
        "input": "it hands on other values, though its own input is the same",
        "output": "its output is another one, though its input is the same",
        "calls": "it calls other modules",
        "loss": "another loss, though what its modules return is the same",
        "gradient": "another gradient, though the forward is the same",
        "sum": f"another sum of the gradients of {name}, though each of them is the same",
        "state": f"another {name.replace('/', ' ', 1)}, though the gradients are the same",
        "metric": f"another {moment.split}, though what its modules return is the same",
    }[kind]
    place = f"on {result.trial}"
    if kind == "metric":
        return f"{place}: {what}"
    if kind in ("sum", "state"):
        return f"{place}, step {moment.step}: {what}"
    rank = f" on rank {result.rank_of(moment)}" if result.trial.world_size > 1 else ""
    step = f"step {moment.step}, " if moment.split == "train" else f"{moment.split}, "
    return f"{place}: {step}micro-batch {moment.index}{rank}: {what}"
