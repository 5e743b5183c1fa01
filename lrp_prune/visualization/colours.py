"""One scale of colours for relevance: blue speaks against, white is none, red speaks for."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

_AGAINST, _NONE, _FOR = (33, 102, 172), (255, 255, 255), (178, 24, 43)
_DARK = 0.55
"""From this share of the scale on, text on the colour is white."""


def colour_of(share: float) -> tuple[int, int, int]:
    """The colour of a share of the largest relevance, from -1 to 1: red, green and blue from 0 to 255.

    Example:
        >>> colour_of(0.0), colour_of(1.0), colour_of(-2.0)
        ((255, 255, 255), (178, 24, 43), (33, 102, 172))
    """
    share = 0.0 if math.isnan(share) else max(-1.0, min(1.0, share))
    end = _FOR if share > 0 else _AGAINST
    red, green, blue = (round(start + abs(share) * (stop - start)) for start, stop in zip(_NONE, end, strict=True))
    return red, green, blue


def hexadecimal(share: float) -> str:
    """:func:`colour_of` as pages write it.

    Example:
        >>> hexadecimal(0.0)
        '#ffffff'
    """
    return "#{:02x}{:02x}{:02x}".format(*colour_of(share))


def ink_on(share: float) -> str:
    """The colour of text that is read on such a colour."""
    return "#ffffff" if abs(share) > _DARK else "#1f2933"


def colour_map() -> "Colormap":
    """The scale for figures, from -1 to 1."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("relevance", [hexadecimal(share) for share in (-1.0, 0.0, 1.0)])
