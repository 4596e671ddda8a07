"""WikiText-103, Transformer-XL standard: 16 layers of width 410, memory 150, 151,107,538 parameters.

Command:   allattn train --config=configs/wikitext103_xl.py --workdir=runs/wikitext103_xl
Hardware:  4 accelerators of 16 GB or more (60 rows must divide by them); not yet run.
Published: 23.1 dev, 24.0 test ppl, protocol `xl` (arXiv 1901.02860, table 1).
"""

from configs import enwik8_xl


def get_config():
    c = enwik8_xl.get_config()
    c.dataset.name = "wikitext103"
    c.model.depth = 16
    c.model.width = 410
    c.model.heads = 10
    c.model.feed_forward = 2100
    c.model.vocab_size = 267_735
    c.model.span.limit = 150
    c.model.adaptive_io.cutoffs = (20_000, 40_000, 200_000)
    c.model.adaptive_io.division = 1
    c.train.batch = 60
    c.train.block = 150
    c.train.steps = 200_000
    c.evaluate.target_length = 64
    c.evaluate.memory_length = 640
    c.evaluate.clamp_length = 400
    return c
