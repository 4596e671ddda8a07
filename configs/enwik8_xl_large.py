"""enwik8, Transformer-XL large: 24 layers of width 1024, memory 768, 277,232,845 parameters.

Command:   allattn train --config=configs/enwik8_xl_large.py --workdir=runs/enwik8_xl_large
Hardware:  16 accelerators of 32 GB or more; not yet run.
Published: 0.99 test bpc, protocol `xl`, over a symbol stream without newlines (arXiv 1901.02860, table 2), so not
           quite comparable with ours.
"""

from configs import enwik8_xl


def get_config():
    c = enwik8_xl.get_config()
    c.model.depth = 24
    c.model.width = 1024
    c.model.feed_forward = 3072
    c.model.dropout = 0.15
    c.model.attention_dropout = 0.15
    c.model.span.limit = 768
    c.optimizer.warmup = 4_000
    c.train.batch = 64
    c.train.block = 768
    c.evaluate.target_length = 128
    c.evaluate.memory_length = 3800
    c.evaluate.clamp_length = 1000
    return c
