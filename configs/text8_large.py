"""text8, all-attention large: 36 layers, N 2048, 113,836,348 parameters.

Command:   allattn train --config=configs/text8_large.py --workdir=runs/text8_large
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: 1.02 dev, 1.08 test bpc, protocol `authors` (arXiv 1907.01470, table 3); steps not published.
"""

from configs import enwik8_large


def get_config():
    c = enwik8_large.get_config()
    c.dataset.name = "text8"
    c.model.vocab_size = 28
    return c
