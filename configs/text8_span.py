"""text8, transformer with adaptive span: 12 layers, inner width 2048, 38,357,116 parameters.

Command:   allattn train --config=configs/text8_span.py --workdir=runs/text8_span
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: 1.05 dev, 1.11 test bpc, protocol `authors` (arXiv 1905.07799, table 1).
"""

from configs import enwik8_span


def get_config():
    c = enwik8_span.get_config()
    c.dataset.name = "text8"
    c.model.vocab_size = 28
    c.train.steps = 900_000
    return c
