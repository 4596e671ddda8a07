"""enwik8, all-attention small: 18 layers, N 1024, 38,501,725 parameters.

Command:   allattn train --config=configs/enwik8_small.py --workdir=runs/enwik8_small
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: 1.03 dev, 1.01 test bpc, protocol `authors` (arXiv 1907.01470, table 2).
"""

from allattn.configs import base


def get_config():
    c = base.get_config()
    c.dataset.name = "enwik8"
    c.model.layer = "all_attention"
    c.model.depth = 18
    c.model.width = 512
    c.model.heads = 8
    c.model.persistent = 1024
    c.model.vocab_size = 205
    c.model.dropout = 0.3
    c.model.span.limit = 8192
    c.optimizer.name = "adagrad"
    c.optimizer.learning_rate = 0.07
    c.optimizer.warmup = 32_000
    c.train.batch = 64
    c.train.block = 512
    c.train.steps = 450_000
    c.train.finetune_steps = 30_000
    return c
