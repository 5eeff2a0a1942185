"""`python -m loadtest` is what `make load` calls."""

from __future__ import annotations

from loadtest.run import app

if __name__ == "__main__":
    app()
