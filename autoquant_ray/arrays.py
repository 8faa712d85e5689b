"""Types of NumPy arrays that several packages share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Indices = npt.NDArray[np.intp]
