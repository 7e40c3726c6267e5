"""Numbers and JSON on the standard output."""

import json
import math
import sys
from typing import Any


def print_json(found: Any) -> None:
    """Print plain types as JSON. NaN and infinity become null."""
    json.dump(_finite(found), sys.stdout, indent=2)
    sys.stdout.write("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
