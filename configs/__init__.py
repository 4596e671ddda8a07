"""Experiments, one file each.

A folder `configs` around an experiment file elsewhere is part of this package too, and comes first
(allattn/config.py puts it on the path).
"""

from pkgutil import extend_path

__path__ = extend_path([], __name__)
