"""Users as they are trained on, kept between rounds within a memory limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from fedpriv.data.federated import Batch


class UserCache:
    """The most recently used users, as many as fit into `limit` bytes.

    What a user costs to prepare (reading, resampling, spectrograms) is then paid once, where the
    users of a node fit, and memory does not grow with the population where they do not.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._users: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._users)

    def get(self, user: Hashable) -> Any | None:
        """Return the user's examples where they are kept."""
        if user in self._users:
            self._users.move_to_end(user)
        return self._users.get(user)

    def put(self, user: Hashable, examples: Any) -> Any:
        """Keep a user's examples, at the cost of those not used for longest; return them.

        They take the place of what was kept of this user; what is larger than the limit is not
        kept.
        """
        if user in self._users:
            self.bytes -= _bytes(self._users.pop(user))
        size = _bytes(examples)
        if size <= self.limit:
            self._users[user] = examples
            self.bytes += size
            while self.bytes > self.limit:
                self.bytes -= _bytes(self._users.popitem(last=False)[1])
        return examples


def _bytes(examples: Batch) -> int:
    return sum(value.nbytes for value in vars(examples).values() if isinstance(value, Tensor))
