"""text8, all-attention small: 18 layers, N 1024, 38,320,300 parameters.

Command:   allattn train --config=configs/text8_small.py --workdir=runs/text8_small
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: 1.05 dev, 1.11 test bpc, protocol `authors` (arXiv 1907.01470, table 3); steps not published.
"""

from configs import enwik8_small


def get_config():
    c = enwik8_small.get_config()
    c.dataset.name = "text8"
    c.model.vocab_size = 28
    return c
