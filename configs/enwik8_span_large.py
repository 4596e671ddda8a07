"""enwik8, transformer with adaptive span, large.

24 layers of width 768, inner width 4096, 208,910,221 parameters.

Command:   allattn train --config=configs/enwik8_span_large.py --workdir=runs/enwik8_span_large
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: 1.00 dev, 0.98 test bpc, protocol `authors` (arXiv 1905.07799, table 2).
"""

from allattn.configs import base


def get_config():
    c = base.get_config()
    c.dataset.name = "enwik8"
    c.model.layer = "transformer"
    c.model.depth = 24
    c.model.width = 768
    c.model.heads = 8
    c.model.persistent = 0
    c.model.feed_forward = 4096
    c.model.vocab_size = 205
    c.model.dropout = 0.4
    c.model.span.limit = 8192
    c.model.span.loss = 5e-7
    c.optimizer.name = "adagrad"
    c.optimizer.learning_rate = 0.07
    c.optimizer.warmup = 32_000
    c.train.batch = 64
    c.train.block = 512
    c.train.steps = 150_000
    c.train.finetune_steps = 20_000
    return c
