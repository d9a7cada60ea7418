"""Tests of the examples, of the code in the documentation, and of the pytest plugin."""
