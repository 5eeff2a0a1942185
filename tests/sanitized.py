"""A pytest plugin: test the kernel that `make sanitize` built, in place of the installed one."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

BUILT = Path(__file__).resolve().parents[1] / "build" / "sanitize"

_found = sorted(BUILT.glob("_native*.so"))
if not _found:
    raise FileNotFoundError(f"{BUILT} holds no _native*.so: run `make sanitize`")
_spec = spec_from_file_location("kernel._native", _found[0])
assert _spec is not None
assert _spec.loader is not None
_module = module_from_spec(_spec)
sys.modules["kernel._native"] = _module
_spec.loader.exec_module(_module)
