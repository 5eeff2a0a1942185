"""Exit 0 when the URL given answers 200: the health check of images that have Python and neither curl nor wget."""

from __future__ import annotations

import sys
import urllib.request


def healthy(url: str) -> bool:
    """Whether a GET is answered with 200 within two seconds."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(not healthy(sys.argv[1]))
