"""Types of numpy arrays, for annotations with shapes.

numpy's own `NDArray` is not a class: since numpy 2.5 it is the alias of a `type` statement on Python 3.12 and
newer, which jaxtyping cannot take. `NDArray` here subscripts the class itself, as numpy 2.0 and newer allow.
"""

from typing import Any, TypeVar

import numpy as np

Scalar = TypeVar("Scalar", bound=np.generic)

NDArray = np.ndarray[tuple[Any, ...], np.dtype[Scalar]]
"""Array of any shape with elements of one scalar type, as in ``Int64[NDArray[np.int64], " count"]``."""
