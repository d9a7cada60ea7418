"""What only some interpreters have."""

from __future__ import annotations

import sys

import pytest

HAS_REFERENCE_COUNTS = sys.implementation.name == "cpython"
needs_reference_counts = pytest.mark.skipif(
    not HAS_REFERENCE_COUNTS, reason="there are no reference counts: what is dropped goes some time later"
)

# PyPy gives a cancellation that arrives in a nested coroutine no ``__context__``.
CANCELLATIONS_HAVE_CONTEXT = sys.implementation.name == "cpython"

# For other processes of this interpreter: without the GIL where this one is.
OPTIONS = ["-Xgil=0"] if getattr(sys.flags, "gil", None) == 0 else []
