"""What "accurate" means in these tests: float64 is the truth, plain PyTorch the yardstick.

A result may be off by a few times what the reference loses in the same type. The only tolerances
of the numerical tests are here; any other error that a result may have, such as the mass that a
certificate allows it to drop, is passed as `promised`, with its derivation at the call.
"""

import torch
from torch import Tensor

SLACK = {torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}


def assert_as_accurate(
    name: str,
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    terms: Tensor | None = None,
    promised: Tensor | float = 0.0,
) -> None:
    """Fail unless `actual` is about as close to `exact` as `eager` is.

    Args:
        name: of the quantity, for the message.
        actual, eager: the result under test and the reference's, both computed in `dtype`.
        exact: the reference's result in float64 from the same, rounded, inputs.
        dtype: the type of the computation; sums over pixels may be returned in a wider one.
        terms: for sums that cancel: the sum of their terms' absolute values. The rounding of
            terms that large is unavoidable, however small the result is.
        promised: bound on an error other than rounding, stated by the operation itself.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    error = (actual.double() - exact).abs()
    magnitude = exact.abs().max() if terms is None else terms.max()
    rounding = torch.finfo(dtype).eps / 2 * magnitude
    budget = SLACK[dtype] * ((eager.double() - exact).abs().max() + rounding)
    assert budget.isfinite(), f"{name}: the reference itself gives {eager.abs().max()}"
    worst = (error - promised).max()
    assert worst <= budget, f"{name}: error {error.max():.2e} exceeds {budget:.2e} + {promised}"
