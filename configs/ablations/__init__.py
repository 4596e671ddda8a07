"""Ways to integrate persistent vectors, and how many.

`joint` with N 2048 is configs/text8_large.py.
"""
