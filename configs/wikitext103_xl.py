"""WikiText-103, Transformer-XL standard.

16 layers of width 410, memory 150, 151,107,538 parameters.

Command:   allattn train --config=configs/wikitext103_xl.py --workdir=runs/wikitext103_xl
Hardware:  4 accelerators of 16 GB or more (60 rows must divide by them); not yet run.
Published: 23.1 dev, 24.0 test ppl, protocol `xl` (arXiv 1901.02860, table 1).
"""

from allattn.configs import base


def get_config():
    c = base.get_config()
    c.dataset.name = "wikitext103"
    c.model.layer = "transformer_xl"
    c.model.depth = 16
    c.model.width = 410
    c.model.heads = 10
    c.model.persistent = 0
    c.model.feed_forward = 2100
    c.model.vocab_size = 267_735
    c.model.dropout = 0.1
    c.model.span.limit = 150
    c.model.span.adaptive = False
    c.model.adaptive_io.cutoffs = (20_000, 40_000, 200_000)
    c.model.adaptive_io.division = 1
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 2.5e-4
    c.optimizer.warmup = 0
    c.optimizer.schedule = "cosine"
    c.optimizer.clip = 0.25
    c.train.batch = 60
    c.train.block = 150
    c.train.steps = 200_000
    c.train.finetune_steps = 0
    c.evaluate.protocol = "xl"
    c.evaluate.target_length = 64
    c.evaluate.memory_length = 640
    c.evaluate.clamp_length = 400
    return c
