"""text8, transformer with adaptive span, large: 24 layers of width 768, inner width 4096, 208,638,172 parameters.

Command:   allattn train --config=configs/text8_span_large.py --workdir=runs/text8_span_large
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: 1.01 dev, 1.07 test bpc, protocol `authors` (arXiv 1905.07799, table 1).
"""

from configs import enwik8_span_large


def get_config():
    c = enwik8_span_large.get_config()
    c.dataset.name = "text8"
    c.model.vocab_size = 28
    c.train.steps = 250_000
    return c
