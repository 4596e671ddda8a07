"""WikiText-103, all-attention with adaptive input and softmax.

36 layers, N 2048, 132,493,746 parameters.

Command:   allattn train --config=configs/wikitext103.py --workdir=runs/wikitext103
Hardware:  8 accelerators of 32 GB or more; time not yet measured.
Published: 19.7 dev, 20.6 test ppl over words; 18.8 and 19.7 where the end of a line counts as
           a token; protocol `authors` (arXiv 1907.01470).
"""

from allattn.configs import base


def get_config():
    c = base.get_config()
    c.dataset.name = "wikitext103"
    c.model.layer = "all_attention"
    c.model.depth = 36
    c.model.width = 512
    c.model.heads = 8
    c.model.persistent = 2048
    c.model.vocab_size = 267_735
    c.model.dropout = 0.3
    c.model.embedding_dropout = 0.1
    c.model.span.limit = 2048
    c.model.span.loss = 5e-7
    c.model.adaptive_io.cutoffs = (20_000, 40_000, 200_000)
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 2.5e-4
    c.optimizer.warmup = 8_000
    c.optimizer.clip = 1.0
    c.train.batch = 64
    c.train.block = 256
    c.train.steps = 800_000
    c.train.finetune_steps = 50_000
    return c
