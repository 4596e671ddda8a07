"""Reduced all-attention: 6 layers of width 128, N 512, 1,196,596 parameters.

The base of the other reduced ablations, which have as many parameters to 0.1%, except those of
another N (n*_tiny.py).

Command:   allattn train --config=configs/ablations/joint_tiny.py --workdir=runs/joint_tiny
           --config.dataset.data_dir=FOLDER, with train.txt, valid.txt and test.txt of text8's 27
           characters
Hardware:  2 CPU cores.
Published: nothing of this size; the scores compare the variants with each other.
"""

from allattn.configs import base


def get_config():
    c = base.get_config()
    c.dataset.name = "files"
    c.model.depth = 6
    c.model.width = 128
    c.model.heads = 4
    c.model.persistent = 512
    c.model.vocab_size = 28
    c.model.dtype = "float32"
    c.model.span.limit = 256
    c.model.span.check_every = 10
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup = 100
    c.optimizer.clip = 1.0
    c.train.batch = 16
    c.train.block = 64
    c.train.steps = 1_800
    c.train.finetune_steps = 200
    c.train.log_every = 10
    c.checkpoint.every = 500
    c.evaluate.every = 1_000
    return c
