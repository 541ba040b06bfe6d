"""What a forecast has to be better than: ARIMA at the same origins, with what was known then."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from ddptrain.data.walk_forward import WalkForward
from ddptrain.errors import Refused


def arima_forecasts(
    samples: WalkForward,
    order: tuple[int, int, int] = (1, 1, 0),
    trend: str | None = None,
    refit_every: int | None = None,
) -> Tensor:
    """The change that ARIMA (Box and Jenkins 1970) forecasts at each origin, float64, (samples,).

    In the unit of the samples' targets, of which the naive forecast is 0. It is fitted to the rows
    before the split's, of training to all of its own; with ``refit_every`` anew at each so many-th
    origin, to all rows up to that. In between it takes note of each row as it comes, with the same
    coefficients. ``trend`` is statsmodels' ("c", "t", …). Raises ``Refused`` without statsmodels.
    """
    try:
        from statsmodels.tsa.arima.model import ARIMA
    except ModuleNotFoundError:
        raise Refused(
            "ARIMA is that of statsmodels, which is missing: pip install 'ddptrain[forecast]'"
        ) from None
    known, forecasts = samples.known, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the coefficients that the search for them starts from
        fitted = ARIMA(samples.series[:known], order=order, trend=trend).fit()
        for number, origin in enumerate(samples.origins):
            past = samples.series[: origin + 1]
            anew = refit_every is not None and number % refit_every == 0
            fitted = fitted.apply(past, refit=anew)
            forecasts.append(fitted.forecast(samples.horizon)[-1] - past[-1])
    return torch.from_numpy(np.array(forecasts) / samples.scale)
