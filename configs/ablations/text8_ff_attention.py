"""text8, transformer whose ReLU is a softmax: 24 layers, inner width 3072, 101,351,644 parameters.

Command:   allattn train --config=configs/ablations/text8_ff_attention.py
           --workdir=runs/text8_ff_attention
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: compared in the ablation of arXiv 1907.01470; no exact score is known to us.
"""

from allattn.configs import text8_large


def get_config():
    c = text8_large.get_config()
    c.model.layer = "transformer"
    c.model.integration = "ff_attention"
    c.model.depth = 24
    c.model.persistent = 0
    c.model.feed_forward = 3072
    return c
