"""Experiments; those in a folder of this name beside another experiment file are found here too, and before ours."""

from pkgutil import extend_path

__path__ = extend_path([], __name__)
