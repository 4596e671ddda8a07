"""enwik8, Transformer-XL: 12 layers, memory 512, 41,055,949 parameters.

Command:   allattn train --config=configs/enwik8_xl.py --workdir=runs/enwik8_xl
Hardware:  2 accelerators of 32 GB or more (22 rows must divide by them); not yet run.
Published: 1.06 test bpc, protocol `xl`, over a symbol stream without newlines (arXiv
           1901.02860, table 2), so not quite comparable with ours.
"""

from allattn.configs import base


def get_config():
    c = base.get_config()
    c.dataset.name = "enwik8"
    c.model.layer = "transformer_xl"
    c.model.depth = 12
    c.model.width = 512
    c.model.heads = 8
    c.model.persistent = 0
    c.model.feed_forward = 2048
    c.model.vocab_size = 205
    c.model.dropout = 0.1
    c.model.span.limit = 512
    c.model.span.adaptive = False
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 2.5e-4
    c.optimizer.warmup = 0
    c.optimizer.schedule = "cosine"
    c.optimizer.clip = 0.25
    c.train.batch = 22
    c.train.block = 512
    c.train.steps = 400_000
    c.train.finetune_steps = 0
    c.evaluate.protocol = "xl"
    return c
