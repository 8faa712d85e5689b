"""The rows of real tokens among those that modules are called with.

Shape letters: B samples, S positions, T rows, I in features.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from autoquant_ray.errors import changed_input
from autoquant_ray.models.quantizable import is_of_tower


class TokenMask:
    """Which tokens of a batch are real."""

    def __init__(self) -> None:
        self._real_T: torch.Tensor | None = None
        self._rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._rows_R: torch.Tensor | None = None

    def set(self, mask_BS: torch.Tensor | None) -> None:
        """Say which tokens of the next batch are real (1); None means all.

        Which rows these are is asked of a mask once: the host waits for the answer.
        """
        self._real_T = self._rows_R = None
        if mask_BS is None:
            return
        self._real_T = mask_BS.reshape(-1).bool()
        if mask_BS not in self._rows:
            self._rows[mask_BS] = self._real_T.nonzero()[:, 0]
        self._rows_R = self._rows[mask_BS]

    def matching(self, states_TI: torch.Tensor) -> torch.Tensor | None:
        """The mask on the device of some rows; None where all count: they are no tokens, or real.

        Args:
            states_TI: The rows.
        """
        if self._real_T is None or len(self._real_T) != len(states_TI):
            return None
        return self._real_T.to(states_TI.device)

    def places(self, states_TI: torch.Tensor) -> torch.Tensor | None:
        """Which rows count, int64, on their device; None where all do; see :meth:`matching`.

        Args:
            states_TI: The rows.
        """
        if self._rows_R is None or self.matching(states_TI) is None:
            return None
        return self._rows_R.to(states_TI.device)

    def rows_of(self, states_TI: torch.Tensor) -> torch.Tensor:
        """The rows that count.

        Args:
            states_TI: All rows.
        """
        places_R = self.places(states_TI)
        return states_TI if places_R is None else states_TI.index_select(0, places_R)


class InputRows:
    """Rows of the inputs of linears.

    Projections that share an input (q, k and v) are called with the very same tensor, whose rows
    are taken once.

    Attributes:
        mask: Of the next batch.
    """

    def __init__(self) -> None:
        self.mask = TokenMask()
        self._last: tuple[torch.Tensor, int, str, torch.Tensor] | None = None

    def of(self, name: str, states: torch.Tensor) -> tuple[str, torch.Tensor]:
        """The first of the modules called in a row with a tensor, and the tensor's rows ``(T, I)``.

        Args:
            name: The module that is called with it now; what a tower sees are no tokens.
            states: ``(..., I)``.

        Raises:
            ModelError: The tensor was changed in place between two modules.
        """
        if self._last is None or self._last[0] is not states:
            states_TI = states.detach().reshape(-1, states.shape[-1])
            rows_TI = states_TI if is_of_tower(name) else self.mask.rows_of(states_TI)
            self._last = (states, states._version, name, rows_TI)
        elif self._last[1] != states._version:
            raise changed_input(name)
        return self._last[2], self._last[3]

    def release(self) -> None:
        """Release the last input."""
        self._last = None
