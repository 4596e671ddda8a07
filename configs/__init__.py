"""Experiments, one file each; installed as `allattn.configs`.

In a checkout they have the name `configs` too. A folder `configs` around an experiment file
elsewhere is then part of this package, and comes first (allattn/config.py puts it on the path).
"""

from pkgutil import extend_path

if __name__ == "configs":
    __path__ = extend_path([], __name__)
