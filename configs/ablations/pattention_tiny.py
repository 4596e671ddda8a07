"""Reduced all-attention with TokenFormer's Pattention (arXiv 2410.23168): 1,196,572 parameters.

Command:   allattn train --config=configs/ablations/pattention_tiny.py
           --workdir=runs/pattention_tiny --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py, but every head sees 256 tokens.
"""

from allattn.configs.ablations import sublayer_tiny


def get_config():
    c = sublayer_tiny.get_config()
    c.model.integration = "pattention"
    c.model.span.adaptive = False
    return c
