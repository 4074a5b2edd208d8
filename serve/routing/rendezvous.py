"""Which replica answers: the one that has the adapter, while it is not overloaded (rendezvous hashing, bounded load).

Every adapter has an order of replicas of its own, which no other replica's coming or going changes. Its requests go to
the first in this order whose load is within the bound, so that a cold adapter is loaded once, a hot one spreads over as
many replicas as its load needs, always the same ones, and a replica that joins or leaves moves few adapters.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping

_EXCESS = 1.25
"""Load of a replica over the mean of all from which its adapters' requests go to others."""


def order(key: str, replicas: Iterable[str]) -> list[str]:
    """The replicas in the order in which `key` prefers them."""
    return sorted(replicas, key=lambda replica: hashlib.sha256(f"{key}\0{replica}".encode()).digest())


def rank(key: str | None, loads: Mapping[str, int], comfortable: int) -> list[str]:
    """The replicas in the order in which a request should try them.

    Args:
        key: names the adapter; None for the bare base model, which all have.
        loads: requests at each replica.
        comfortable: as many a replica takes without thought for the others' load.

    Returns:
        Those within the bound, in the key's order (without key: the least loaded first), and then all others likewise.
    """
    preferred = order(key, loads) if key is not None else sorted(loads, key=loads.__getitem__)
    bound = max(comfortable, math.ceil(_EXCESS * (sum(loads.values()) + 1) / max(1, len(loads))))
    return sorted(preferred, key=lambda replica: loads[replica] >= bound)
