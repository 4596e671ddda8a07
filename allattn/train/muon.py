"""Muon for what is a matrix, AdamW for the rest: which parameter is which, in one table.

Muon replaces a matrix's mean gradient by the nearest matrix whose singular values are all about 1.
What that means depends on which dimensions of an array are one matrix: a projection of all heads
together, or the pairs of every head by themselves. The equations stand in docs/method.md,
"Optimizers".

Dimension key: X layer, H head, N persistent pair, K head width, D model width, F inner unit.
"""

import re

import jax
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers, muon

from allattn.errors import UserError
from allattn.model.parameters import parameter_name

# From the name of a parameter to the dimensions that go into its matrices and those that come out
# of them; the others, such as layers, count matrices. None: AdamW. The first pattern that matches
# decides. What none matches is AdamW's as well if it is a number or a vector of each layer, and is
# refused if it may be a matrix.
MATRICES: tuple[tuple[str, MuonDimensionNumbers | None], ...] = (
    # All heads together.
    (r"^layers/(.+/)?(query|key|value|relative)$", MuonDimensionNumbers((1,), (2, 3))),  # XDHK
    (r"^layers/(.+/)?output$", MuonDimensionNumbers((1, 2), (3,))),  # XHKD
    # Each head by itself: a query of K goes into the keys and N logits come out; N weights go into
    # the values and K come out.
    (r"^layers/(.+/)?persistent_key$", MuonDimensionNumbers((3,), (2,))),  # XHNK
    (r"^layers/(.+/)?persistent_value$", MuonDimensionNumbers((2,), (3,))),  # XHNK
    (r"^layers/(.+/)?(inner|outer)$", MuonDimensionNumbers((1,), (2,))),  # XDF, XFD
    # A number of every pair, and one of every head: no maps to speak of.
    (r"^layers/(.+/)?((persistent|sink)_bias|gate)$", None),  # XHN, XDH
    # Rows that are looked up or scored, with their projections and biases.
    (r"^(io|position)/", None),
)


def matrices_by_muon(
    rate: optax.Schedule,
    adam_rate: optax.Schedule,
    weight_decay: float,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Muon on the parameters that `MATRICES` calls so, AdamW on all others.

    Args:
      rate: of matrices.
      adam_rate: of the others.
      weight_decay: of both, times the rate of each.
      mesh: devices that the parameters are spread over; None: one.
    """
    matrices = muon(
        rate, weight_decay=weight_decay, muon_weight_dimension_numbers=dimension_numbers
    )
    rules = {
        "muon": _on_whole_arrays(matrices, mesh),
        # Optax's muon has an AdamW inside, but with Nesterov's momentum.
        "adamw": optax.adamw(adam_rate, weight_decay=weight_decay),
    }

    # Optax keeps the state of each rule for its own parameters alone.
    def labels(params: optax.Params) -> optax.Params:
        def label(path: tuple, x: jax.Array) -> str:
            return "muon" if dimensions(path, x) else "adamw"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition(rules, labels)


def _on_whole_arrays(
    rule: optax.GradientTransformation, mesh: Mesh | None
) -> optax.GradientTransformation:
    """A rule whose arrays are whole on every device while it computes.

    Its fifteen products with a matrix would otherwise each gather or sum parts of it. Gathered
    first, mean and gradient are sent once, and every device computes the same.
    """
    if mesh is None or mesh.size == 1:
        return rule
    update = jax.shard_map(rule.update, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return optax.GradientTransformation(rule.init, update)


def dimension_numbers(params: optax.Params) -> optax.Params:
    """How Muon reads every parameter.

    Args:
      params: parameters, or anything of their shapes.

    Returns:
      The same tree of MuonDimensionNumbers; None where AdamW does it.

    Raises:
      UserError: a parameter that may be a matrix, and that `MATRICES` does not have.
    """
    return jax.tree_util.tree_map_with_path(dimensions, params)


def dimensions(path: tuple, x: jax.Array) -> MuonDimensionNumbers | None:
    """The row of `MATRICES` for a parameter."""
    name = parameter_name(path)
    for pattern, numbers in MATRICES:
        if re.search(pattern, name):
            return numbers
    # The first dimension of what lies under "layers" counts them.
    stacked = name.startswith("layers/")
    if x.ndim - stacked > 1:
        raise UserError(
            f"optimizer.name: expected a rule that can group every parameter, found muon, which "
            f"does not know {name} of shape {x.shape}; train/muon.py has the table"
        )
    return None
