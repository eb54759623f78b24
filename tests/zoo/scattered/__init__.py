"""Programs whose samples lie elsewhere than along one axis of the batch, by kind.

    for program in SCATTERED:                  # and MIXED, where samples are mixed in truth
        made = program.instance()
        made.loss(), made.samples              # the loss as a user writes it, and what the user says as `samples=`
        made.terms()                           # for the oracle: the loss of each sample, [N]

To add a program: a decorated builder in the file of its kind. It then meets every quantity and the support page.
"""

from __future__ import annotations

from .chosen import CHOSEN
from .constants import CONSTANTS
from .experts import EXPERTS
from .mixed import MIXED
from .one_by_one import ONE_BY_ONE
from .other_rows import OTHER_ROWS
from .pieces import PIECES
from .program import Refusal, Scattered, ScatteredInstance
from .several import SEVERAL
from .uneven import UNEVEN

__all__ = ["KINDS", "MIXED", "SCATTERED", "Refusal", "Scattered", "ScatteredInstance"]

KINDS = {
    1: "A tensor without samples comes first",
    2: "The batch is taken apart",
    3: "Rows are chosen before the loss or the head",
    4: "Samples of uneven length in one tensor",
    5: "Routed experts",
    6: "A sample is several rows",
    7: "Sample by sample",
    8: "Other rows first: a grid, edges, masked rows",
    0: "Samples are mixed in truth",
}

SCATTERED = [*CONSTANTS, *PIECES, *CHOSEN, *UNEVEN, *EXPERTS, *SEVERAL, *ONE_BY_ONE, *OTHER_ROWS]
assert len({program.name for program in SCATTERED + MIXED}) == len(SCATTERED + MIXED), "two programs share a name"
