"""text8, Transformer-XL large: 24 layers of width 1024, memory 768, 277,051,420 parameters.

Command:   allattn train --config=configs/text8_xl_large.py --workdir=runs/text8_xl_large
Hardware:  16 accelerators of 32 GB or more; not yet run.
Published: 1.08 test bpc, protocol `xl` (arXiv 1901.02860, table 3).
"""

from allattn.configs import base


def get_config():
    c = base.get_config()
    c.dataset.name = "text8"
    c.model.layer = "transformer_xl"
    c.model.depth = 24
    c.model.width = 1024
    c.model.heads = 8
    c.model.persistent = 0
    c.model.feed_forward = 3072
    c.model.vocab_size = 28
    c.model.dropout = 0.15
    c.model.attention_dropout = 0.15
    c.model.span.limit = 768
    c.model.span.adaptive = False
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 2.5e-4
    c.optimizer.warmup = 4_000
    c.optimizer.schedule = "cosine"
    c.optimizer.clip = 0.25
    c.train.batch = 64
    c.train.block = 768
    c.train.steps = 400_000
    c.train.finetune_steps = 0
    c.evaluate.protocol = "xl"
    c.evaluate.target_length = 128
    c.evaluate.memory_length = 3800
    c.evaluate.clamp_length = 1000
    return c
