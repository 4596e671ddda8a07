"""enwik8, all-attention large: 36 layers, N 2048, 114,017,773 parameters.

Command:   allattn train --config=configs/enwik8_large.py --workdir=runs/enwik8_large
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: 1.00 dev, 0.98 test bpc, protocol `authors` (arXiv 1907.01470, table 2).
"""

from configs import base


def get_config():
    c = base.get_config()
    c.model.depth = 36
    c.model.persistent = 2048
    c.model.dropout = 0.4
    c.train.steps = 200_000
    c.train.finetune_steps = 10_000
    return c
