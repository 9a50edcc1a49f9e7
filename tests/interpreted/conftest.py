"""What the interpreter does by the machine, done one way on all."""

from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter


@pytest.fixture(scope="session", autouse=True)
def exact_dots() -> None:
    """Sums of dot products in float64, rounded once.

    NumPy's float32 product is its BLAS library's: the order of a row's sum changes with the
    processor, and on some (OpenBLAS for AVX2) with the number of rows, which tensor cores' does
    not: bits that must be equal are not.
    """

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        product = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
