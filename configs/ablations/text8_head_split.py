"""text8, all-attention large, integration `head_split`: 36 layers, N 4096, 104,399,020 parameters.

The heads that see no context have neither key and value projections nor spans.

Command:   allattn train --config=configs/ablations/text8_head_split.py
           --workdir=runs/text8_head_split
Hardware:  8 accelerators of 32 GB or more (the paper's setting: 8 V100); time not yet measured.
Published: compared in the ablation of arXiv 1907.01470; no exact score is known to us.
"""

from allattn.configs import text8_large


def get_config():
    c = text8_large.get_config()
    c.model.integration = "head_split"
    # In half of the heads: as many numbers in persistent pairs as the other integrations have.
    c.model.persistent = 4096
    return c
