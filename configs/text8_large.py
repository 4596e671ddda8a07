"""text8, all-attention large: 36 layers, N 2048, 113,836,348 parameters.

Command:   allattn train --config=configs/text8_large.py --workdir=runs/text8_large
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: 1.02 dev, 1.08 test bpc, protocol `authors` (arXiv 1907.01470, table 3); steps
           not published.
"""

from allattn.configs import base


def get_config():
    c = base.get_config()
    c.dataset.name = "text8"
    c.model.layer = "all_attention"
    c.model.depth = 36
    c.model.width = 512
    c.model.heads = 8
    c.model.persistent = 2048
    c.model.vocab_size = 28
    c.model.dropout = 0.4
    c.model.span.limit = 8192
    c.optimizer.name = "adagrad"
    c.optimizer.learning_rate = 0.07
    c.optimizer.warmup = 32_000
    c.train.batch = 64
    c.train.block = 512
    c.train.steps = 200_000
    c.train.finetune_steps = 10_000
    return c
