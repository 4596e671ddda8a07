"""text8, all-attention large with N 0, that is attention alone: 36 layers, 38,338,876 parameters.

Command:   allattn train --config=configs/ablations/text8_n0.py --workdir=runs/text8_n0
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: compared in the ablation of arXiv 1907.01470; no exact score is known to us.
"""

from allattn.configs import text8_large


def get_config():
    c = text8_large.get_config()
    c.model.persistent = 0
    return c
