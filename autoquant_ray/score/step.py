"""What a model runs on at once: token ids, their mask, and images.

Shape letters: B samples, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

NO_INPUTS: Mapping[str, torch.Tensor] = MappingProxyType({})


class Step(NamedTuple):
    """What the model runs on at once.

    Attributes:
        ids_BS: Token ids, int64.
        mask_BS: 1 for real tokens, 0 for padding on the right; None if all are real.
        inputs: What the model takes beside them: pixels and their places, by argument.
    """

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor | None = None
    inputs: Mapping[str, torch.Tensor] = NO_INPUTS
