"""Numpy array types for annotations with shapes.

jaxtyping needs a class. `numpy.typing.NDArray` is a `type` alias since numpy 2.5 on Python 3.12 and newer.
`NDArray` here subscripts `numpy.ndarray` itself, as numpy 2.0 and newer allow.
"""

from typing import Any, TypeVar

import numpy as np

Scalar = TypeVar("Scalar", bound=np.generic)

NDArray = np.ndarray[tuple[Any, ...], np.dtype[Scalar]]
"""Array of any shape with elements of one scalar type, as in ``Int64[NDArray[np.int64], " count"]``."""
