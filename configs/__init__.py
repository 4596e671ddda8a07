"""Experiments; those in a folder of this name beside another experiment file are found here too."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
