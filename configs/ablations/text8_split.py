"""text8, all-attention large, integration `split`: 36 layers, N 2048, 113,836,348 parameters.

Command:   allattn train --config=configs/ablations/text8_split.py --workdir=runs/text8_split
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: compared in the ablation of arXiv 1907.01470; no exact score is known to us.
"""

from allattn.configs import text8_large


def get_config():
    c = text8_large.get_config()
    c.model.integration = "split"
    return c
