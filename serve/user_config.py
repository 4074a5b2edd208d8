"""What may change while a deployment runs: Serve calls its `reconfigure` with the `user_config` of the YAML."""

import logging
from typing import Any, TypeVar

from d2l.config import from_dict
from d2l.errors import UserError

T = TypeVar("T")

logger = logging.getLogger("ray.serve")


def settings(cls: type[T], values: dict[str, Any], before: T | None) -> T:
    """The settings of class `cls` in a `user_config`.

    Those that cannot be used are logged, and the ones before stay: else Serve would end the replica.

    Raises:
        UserError: they cannot be used, and are the first ones.
    """
    try:
        return from_dict(cls, values, "user_config")
    except UserError as error:
        if before is None:
            raise
        logger.error("%s; what was set before stays", error)
        return before
