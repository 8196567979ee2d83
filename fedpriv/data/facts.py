"""What a data set knows of itself: facts that its builder made true, and statements print.

Only what the code has checked is a fact. `unknown` is the answer of a data set that checked
nothing, and a statement then says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_type_hints

from fedpriv.errors import InputError

#: Who a user is. person: one whom the data set names. share: it has a part of what one named person
#: gave, and others have the rest. dealt: it has examples of whoever they are. made_up: nobody.
#: node: it is all that a node of somebody's own Flower app holds.
Users = Literal["person", "share", "dealt", "made_up", "node", "unknown"]

#: What one example is. joined: several recordings of one speaker, each of which may be in more
#: than one example. row: one of a table. block: so many tokens of one user's texts.
Example = Literal["image", "recording", "joined", "row", "block", "unknown"]

#: Whose the held-out examples are. others: people none of whom is a user, by the data set's names.
#: same: people who are users too. unnamed: no user holds them, and nothing says whose they are.
HeldOut = Literal["others", "same", "unnamed", "made_up", "unknown"]

#: Whose the public part is, on which a seed model is pre-trained; none: there is no such part.
Public = Literal["others", "made_up", "none", "unknown"]


@dataclass(frozen=True)
class DataFacts:
    """What is true of a data set as it was built; the default says that nothing was checked.

    Attributes:
        users: who a user is.
        example: what one example is.
        held_out: whose the held-out examples are.
        public: whose the public part is.
    """

    users: Users = "unknown"
    example: Example = "unknown"
    held_out: HeldOut = "unknown"
    public: Public = "unknown"

    def document(self) -> dict[str, str]:
        """Return the facts for a file."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any], where: str) -> DataFacts:
        """Return the facts that were written to a file; `where` it is stands in the error.

        Raises:
            InputError: a fact that is not known here: another version of fedpriv wrote it.
        """
        known = {name: get_args(kind) for name, kind in get_type_hints(cls).items()}
        for name, value in document.items():
            if value not in known.get(name, ()):
                raise InputError(f"{where}: {name}: {value} is not a fact that fedpriv knows")
        return cls(**document)


#: Of a data set that checked nothing.
UNCHECKED = DataFacts()
