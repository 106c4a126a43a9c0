"""What the rows of a table of groups stand for, where that is not plain from them."""

import re
from collections.abc import Mapping

from fastscore.graph import scored_units

_STATE = re.compile(r"(.+\.)?weight_[ih]h(_l\d+(_reverse)?)?")  # a layer of a recurrent module
_DIMENSIONS = ("head dimensions: channels of an attention's row are pairs of a query's and a key's dimension, then "
               "dimensions of the values; what rotary tables turn goes by twos, the same of all heads")
_BRANCHES = ("a row of one channel is a residual branch: its costs are of all that goes with it, and count in the rows "
             "of the channels inside it, too")
_WHOLE = "whole heads: what goes with a head goes from the row of its dimensions, too, and the other way round"


def row_notes(units: str, widths: Mapping[str, int]) -> tuple[str, ...]:
    """A sentence for each kind of row that needs one. widths: group -> its channels."""
    notes, kinds = [], scored_units.among(units)
    if states := [name for name in widths if _STATE.fullmatch(name)]:
        more = f" and {len(states) - 1} more" if states[1:] else ""
        notes.append(f"{states[0]}{more}: a unit of the state is a channel in every gate (4 of an LSTM, 3 of a GRU), "
                     "each time with its one score")
    if kinds & {"head_dims", "heads_and_dims"}:
        notes.append(_DIMENSIONS)
    if "heads_and_dims" in kinds:
        notes.append(_WHOLE)
    if "blocks" in kinds and 1 in widths.values():
        notes.append(_BRANCHES)
    return tuple(notes)
