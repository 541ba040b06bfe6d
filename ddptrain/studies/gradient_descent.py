"""The study of gradient descent: what a textbook draws of it, as runs of `experiment=purchase`."""

from __future__ import annotations

from ddptrain.studies.plan import Comparison, Plan, Planned

EACH_STEP = "log.every_steps=1"
"""Where a step takes all samples, its line has the objective that it began with."""
PLAIN = ("optim.momentum=0", "optim.nesterov=false")
RIDGE = "train.penalty.l2=0.25"
NOISE = ("data.train.noise_features=10", "model.inputs=13")


def _rate(rate: str, steps: int, *penalty: str, name: str = "", label: str = "") -> Planned:
    settings = (*PLAIN, f"optim.lr={rate}", f"train.max_steps={steps}", *penalty, EACH_STEP)
    return Planned(f"rate-{rate}{name}", f"{rate}{label}", settings)


def _batch(size: str, micro: int, epochs: int, every: int) -> Planned:
    overrides = (
        *PLAIN,
        "optim.lr=0.1",
        f"train.global_batch_size={size}",
        f"train.micro_batch_size={micro}",
        f"train.max_epochs={epochs}",
        f"eval.every_steps={every}" if every else EACH_STEP,
    )
    label = {"all": "batch (all 700)", "1": "stochastic (1)"}.get(size, f"mini-batch ({size})")
    return Planned(f"batch-{size}", label, overrides)


def _optimiser(name: str, *overrides: str) -> Planned:
    settings = ("train.max_steps=200", EACH_STEP, *overrides)
    return Planned(f"optimiser-{name}", name, settings)


def _penalty(name: str, *overrides: str) -> Planned:
    settings = (*NOISE, "optim.lr=0.1", "train.max_steps=400", *overrides)
    return Planned(f"penalty-{name}", name, settings)


RATES = Comparison(
    "rates",
    "Learning rates",
    "Plain gradient descent, all samples in each step, from the same weights. The objective is the "
    "mean loss with a ridge penalty (train.penalty.l2=0.25), which makes it strongly convex: its "
    "curvature is nowhere below 0.25 along a coefficient, so that a rate of 10 takes more than "
    "twice the way to the minimum and ends farther away than it began, each time. Without the "
    "penalty the same rate does not diverge, for the gradient of the logistic loss is bounded: the "
    "last row jumps about and does not settle. Rates that are quick were given 200 iterations, the "
    "others 1,000.",
    (
        _rate("0.001", 1000, RIDGE),
        _rate("0.01", 1000, RIDGE),
        _rate("0.1", 200, RIDGE),
        _rate("1", 200, RIDGE),
        _rate("10", 200, RIDGE),
        _rate("10", 200, name="-unpenalised", label=", no penalty"),
    ),
    ("rate", "iterations to 0.001", "gap", "steps", "seconds", "ended"),
    "rates",
)
BATCHES = Comparison(
    "batches",
    "Batch, mini-batch and stochastic gradient descent",
    "Ten passes over the 700 samples at a rate of 0.1: the same samples are seen, in 10, 220 or "
    "7,000 steps. One sample a step is work for one rank alone, and its noise, at a constant rate, "
    "keeps the loss above the minimum. Times have the evaluations in them that the curves need.",
    (_batch("all", 175, 10, 0), _batch("32", 8, 10, 2), _batch("1", 1, 10, 20)),
    ("batch", "steps", "samples", "samples to 0.01", "gap", "test loss", "ranks", "seconds"),
    "batches",
)
OPTIMISERS = Comparison(
    "optimisers",
    "Optimisers",
    "All samples in each step, 200 steps, one rate for all (0.1), so that what differs is what "
    "each makes of it; only L-BFGS looks for its own, and may evaluate the loss several times in a "
    "step. RMSprop's steps do not become shorter as the gradient does, so at a constant rate it "
    "does not settle; AdamW's weight decay (0.01, decoupled from the loss) moves its end a little.",
    (
        _optimiser("sgd", *PLAIN, "optim.lr=0.1"),
        _optimiser("momentum", "optim.nesterov=false", "optim.lr=0.1"),
        _optimiser("nesterov", "optim.lr=0.1"),
        _optimiser("adagrad", "optim=adagrad", "optim.lr=0.1"),
        _optimiser("rmsprop", "optim=rmsprop", "optim.lr=0.1"),
        _optimiser("adam", "optim=adam", "optim.lr=0.1"),
        _optimiser("adamw", "optim=adamw", "optim.lr=0.1"),
        _optimiser("lbfgs", "optim=lbfgs", "optim.lr=1", "optim.max_iter=1"),
    ),
    ("optimiser", "iterations to 0.001", "gap after 50", "gap", "test loss", "seconds"),
    "optimisers",
)
PENALTIES = Comparison(
    "penalties",
    "L1, L2, both and none",
    "Ten features of noise beside the three that matter. L2 makes all coefficients smaller, L1 "
    "makes some exactly zero, those of noise first. The training loss is without the penalty.",
    (
        _penalty("none"),
        _penalty("l2", "train.penalty.l2=0.03"),
        _penalty("l1", "train.penalty.l1=0.03"),
        _penalty("both", "train.penalty.l1=0.03", "train.penalty.l2=0.03"),
    ),
    ("penalty", "age", "income", "education", "largest of noise", "zeros", "training loss",
     "test loss"),
    "weights",
)  # fmt: skip
GRADIENT_DESCENT = Plan(
    "gradient-descent",
    "Gradient descent",
    "Logistic regression of 1,000 people who buy something or do not (experiment=purchase), of "
    "whom 700 are trained on. A gap is the objective over the training set minus its minimum, "
    "which scikit-learn's L-BFGS finds; to come within 0.001 of it counts as convergence. Sums are "
    "exact (parallel.reduction=exact), so the weights are the same bits on any number of ranks.",
    (
        "experiment=purchase",
        "parallel.reduction=exact",
        "train.global_batch_size=all",
        "train.micro_batch_size=175",
        "train.max_epochs=null",
        "data.val.split=train",
        "eval.every_steps=null",
        "task.metrics=[accuracy]",
    ),
    ("log.tensorboard=false", "checkpoint.memory_every_steps=null"),
    (RATES, BATCHES, OPTIMISERS, PENALTIES),
)
