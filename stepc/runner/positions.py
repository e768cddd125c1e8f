"""Where the data stood, as a checkpoint keeps it: of one process, or of each. It knows no files."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import jax

from stepc.errors import CheckpointError


def encoded(position: Any, number: int) -> Any:  # Any: where the data stands
    """What JSON can hold. Errors: CheckpointError if it cannot."""
    if isinstance(position, bytes):
        return {"bytes": base64.b64encode(position).decode()}
    try:
        json.dumps(position, allow_nan=False)
    except (TypeError, ValueError) as error:
        what = "The position of the data, `get_state()`, is neither bytes nor what JSON can hold."
        raise CheckpointError(what, step=number, facts=(("position", repr(position)),)) from error
    return {"json": position}


def decoded(stored: Mapping[str, Any], *, is_same: bool) -> Any:  # Any: where the data stands
    """The position of this process; None if each had its own, and there are not as many now."""
    if "each" in stored:
        return decoded(stored["each"][jax.process_index()], is_same=True) if is_same else None
    return base64.b64decode(stored["bytes"]) if "bytes" in stored else stored["json"]
