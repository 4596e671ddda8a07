"""text8, Transformer-XL large: 24 layers of width 1024, memory 768, 277,051,420 parameters.

Command:   allattn train --config=configs/text8_xl_large.py --workdir=runs/text8_xl_large
Hardware:  16 accelerators of 32 GB or more; not yet run.
Published: 1.08 test bpc, protocol `xl` (arXiv 1901.02860, table 3).
"""

from configs import enwik8_xl_large


def get_config():
    c = enwik8_xl_large.get_config()
    c.dataset.name = "text8"
    c.model.vocab_size = 28
    return c
