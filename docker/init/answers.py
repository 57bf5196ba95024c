"""Whether a server is well: ``python answers.py URL [COMPONENT]`` ends without an error if it is.

``COMPONENT`` is one of those whose state the server's answer lists.
"""

from __future__ import annotations

import json
import sys
import urllib.request

with urllib.request.urlopen(sys.argv[1], timeout=10) as answer:  # noqa: S310
    states = json.load(answer) if sys.argv[2:] else {}
for name in sys.argv[2:]:
    if states[name]["status"] != "healthy":
        sys.exit(f"{name} is {states[name]['status']}")
