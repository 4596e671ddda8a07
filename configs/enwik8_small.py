"""enwik8, all-attention small: 18 layers, N 1024, 38,501,725 parameters.

Command:   allattn train --config=configs/enwik8_small.py --workdir=runs/enwik8_small
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: 1.03 dev, 1.01 test bpc, protocol `authors` (arXiv 1907.01470, table 2).
"""

from configs import base


def get_config():
    c = base.get_config()
    c.model.dropout = 0.3
    return c
