# Distributed under the terms of the BSD 3-Clause License.
"""Long campaigns: the tests of test/ that have a larger number to show, with that number. `make soak`."""
