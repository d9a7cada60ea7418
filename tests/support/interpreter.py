"""Features that only some interpreters have."""

from __future__ import annotations

import sys

import pytest

HAS_REFERENCE_COUNTS = sys.implementation.name == "cpython"
needs_reference_counts = pytest.mark.skipif(
    not HAS_REFERENCE_COUNTS, reason="without reference counts, an unreferenced object is deleted some time later"
)

# PyPy does not set ``__context__`` of a cancellation that arrives in a nested coroutine.
CANCELLATIONS_HAVE_CONTEXT = sys.implementation.name == "cpython"

# Options for subprocesses: they run without the GIL if this process does.
OPTIONS = ["-Xgil=0"] if getattr(sys.flags, "gil", None) == 0 else []
