# Distributed under the terms of the BSD 3-Clause License.
"""The tests, for `python -m unittest`; `support.py` holds what they share."""
