"""WikiText-103, Transformer-XL large.

18 layers of width 1024, memory 384, 285,170,506 parameters. The geometry is that of the paper's
PyTorch script. The published model has 257M parameters: it shares more projections and unties the
biases per layer.

Command:   allattn train --config=configs/wikitext103_xl_large.py
           --workdir=runs/wikitext103_xl_large
Hardware:  64 accelerators of 16 GB or more; not yet run.
Published: 17.7 dev, 18.3 test ppl, protocol `xl` (arXiv 1901.02860, table 1).
"""

from allattn.configs import base


def get_config():
    c = base.get_config()
    c.dataset.name = "wikitext103"
    c.model.layer = "transformer_xl"
    c.model.depth = 18
    c.model.width = 1024
    c.model.heads = 16
    c.model.persistent = 0
    c.model.feed_forward = 4096
    c.model.vocab_size = 267_735
    c.model.dropout = 0.2
    c.model.attention_dropout = 0.2
    c.model.span.limit = 384
    c.model.span.adaptive = False
    c.model.adaptive_io.cutoffs = (20_000, 40_000, 200_000)
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 2.5e-4
    c.optimizer.warmup = 16_000
    c.optimizer.schedule = "cosine"
    c.optimizer.clip = 0.25
    c.train.batch = 128
    c.train.block = 384
    c.train.steps = 4_000_000
    c.train.finetune_steps = 0
    c.evaluate.protocol = "xl"
    c.evaluate.target_length = 128
    c.evaluate.memory_length = 1600
    c.evaluate.clamp_length = 1000
    return c
