"""Which rows of a weight tell how a choice for all of them will turn out.

Rows (output channels) are rounded independently of each other where each has scales of its own. So
a choice that all rows share, such as AWQ's factors of an input or GPTQ's damping, is as good as
made on some of them.
"""

from __future__ import annotations

_SHARE = 8
_MOST = 256


def judged_rows(num_rows: int, least: int) -> slice:
    """Evenly spaced rows: about an eighth, up to 256, but no fewer than asked for.

    Their distance is odd: an even one would take the same channels of every attention head.

    Args:
        num_rows: Of the weight.
        least: Fewest rows, where there are as many.
    """
    distance = max(1, num_rows // max(min(num_rows // _SHARE, _MOST), least))
    return slice(None, None, distance - (distance + 1) % 2)
