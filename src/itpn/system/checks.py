"""Checks of values against their type annotations."""

import re
from typing import Any

from itpn.errors import UserError


def check_type(value: Any, hint: Any, what: str) -> None:
    """Raise :class:`UserError` if a value is not of the type of its annotation."""
    import typeguard

    try:
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        wanted = hint.__name__ if isinstance(hint, type) else re.sub(r"(\w+\.)+", "", str(hint))
        raise UserError(f"{what} must be {wanted}, not {value!r}") from None
