"""The first thing to run: a small all-attention network, 607,496 parameters.

It learns the text of Python's standard library.

Command:   make demo    (or: allattn train --config=demo --workdir=runs/demo)
Hardware:  2 CPU cores; about three minutes.
"""

from allattn.configs import base


def get_config():
    c = base.get_config()
    c.dataset.name = "stdlib"
    c.model.layer = "all_attention"
    c.model.depth = 4
    c.model.width = 128
    c.model.heads = 2
    c.model.persistent = 256
    c.model.vocab_size = 0
    c.model.dropout = 0.0
    c.model.dtype = "float32"
    c.model.span.limit = 256
    c.model.span.loss = 0.0
    c.model.span.check_every = 10
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup = 50
    c.optimizer.schedule = "cosine"
    c.optimizer.clip = 1.0
    c.train.batch = 32
    c.train.block = 64
    c.train.steps = 850
    c.train.finetune_steps = 0
    c.train.log_every = 10
    c.checkpoint.every = 425
    c.evaluate.every = 425
    return c
