"""Why an object breaks the law, as far as looking at it tells, and what its author can do."""

from __future__ import annotations

from ddptrain.verify.attributes import RANK, Attributes

KEYED = {
    "data": "the global generators of Python, numpy or torch, which are keyed before each sample",
    "module": "the global generators of Python, numpy or torch, which are keyed before each "
    "forward",
    "optim": "no random numbers",
}
PURE = {
    "data": "let a sample depend on its index and on the global generators alone",
    "module": "keep it in a buffer (register_buffer), which every step moves once and alike on all "
    "ranks, or do without",
    "optim": "keep it in the optimiser's state or in its param_groups, which checkpoints hold",
}
UNKNOWN = {
    "data": "nothing in its attributes tells; look for a generator of its own, the time, files "
    "that change, or state that one sample leaves to the next",
    "module": "nothing in its attributes tells; look for a generator of its own, the rank, the "
    "time, or state that one forward leaves to the next",
    "optim": "nothing in its attributes tells; look for random numbers, the rank, or state outside "
    "`state` and `param_groups`",
}
NO_RANK = (
    "let nothing depend on the rank: a micro-batch is computed by another rank in the next run"
)


def find_reason(
    kind: str, before: Attributes, after: Attributes, elsewhere: list[Attributes]
) -> tuple[str, str]:
    """Why, and the remedy, for an object of ``kind`` "data", "module" or "optim".

    ``before`` and ``after`` the reference's steps; ``elsewhere`` as built by each rank of the
    trial that differs.
    """
    generators = before.generators | after.generators
    if generators:
        where, what = next(iter(generators.items()))
        return f"its {where} is {what} of its own", f"draw from {KEYED[kind]}"
    for rank, attributes in enumerate(elsewhere):
        for name, value in attributes.values.items():
            first = before.values.get(name, value)
            if value != first:
                why = f"its attribute {name} is {value} on rank {rank}, {first} on a rank alone"
                return why, NO_RANK
    if RANK in before.code:
        return f"its code {RANK}", NO_RANK
    for name, value in after.values.items():
        first = before.values.get(name, "not there")
        if value != first:
            return f"its attribute {name} {_went(first, value)}", PURE[kind]
    if before.code:
        return f"its code {before.code[0]}", PURE[kind].partition(", which")[0]
    return UNKNOWN[kind], PURE[kind].replace("keep it in", "keep such state in")


def _went(first: str, value: str) -> str:
    if value.startswith("a tensor"):
        return "is a tensor that changed, and no buffer"
    return f"went from {first} to {value} while it ran"
