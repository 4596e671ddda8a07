"""Reduced all-attention with what keeps deep networks stable: 1,196,966 parameters.

Normalised inputs of sublayers, queries and keys, learned scalars on both sides of every residual,
small initial output projections, and of every head a gate on its output and a sink.

Command:   allattn train --config=configs/ablations/stable_tiny.py --workdir=runs/stable_tiny
           --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py.
"""

from allattn.configs.ablations import joint_tiny


def get_config():
    c = joint_tiny.get_config()
    # Two pairs fewer, which is what the gates cost.
    c.model.persistent = 510
    c.model.sinks = 1
    c.model.pre_norm = True
    c.model.qk_norm = True
    c.model.residual_scalars = True
    c.model.output_scale = 0.1
    c.model.output_gate = True
    return c
