"""The minimum that runs of a study are measured by: scikit-learn's, in double precision."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from ddptrain.data.sets import Purchase


def minimum(data: dict[str, Any], l2: float) -> float:
    """Mean logistic loss over the training set plus ½ ``l2`` ‖coefficients‖², at its least.

    ``data`` are the arguments of ``Purchase``, as a config has them.
    """
    return _minimum(json.dumps({k: v for k, v in data.items() if k != "_target_"}), l2)


@cache
def _minimum(arguments: str, l2: float) -> float:
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    features, labels = (part.double().numpy() for part in Purchase(**json.loads(arguments)).tensors)
    # Its penalty is ½ ‖coefficients‖² beside C times the sum of losses.
    strength = 1 / (l2 * len(labels)) if l2 else np.inf
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(features, labels)
    loss = log_loss(labels, model.predict_proba(features))
    return float(loss + 0.5 * l2 * np.square(model.coef_).sum())
