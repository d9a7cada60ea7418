"""The benchmarks.

``python -m bench`` runs them and writes the report; ``python -m bench --help`` lists the options.
"""
