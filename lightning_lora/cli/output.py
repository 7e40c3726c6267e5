"""JSON on the standard output."""

import json
from typing import Any


def print_json(found: Any) -> None:
    """Print plain types as JSON. NaN and infinity, which JSON does not have, become null."""
    finite = json.loads(json.dumps(found), parse_constant=lambda _: None)
    print(json.dumps(finite, indent=2))
