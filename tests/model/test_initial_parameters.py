"""Fresh parameters: every tensor begins with the numbers that it has always begun with.

A run is repeated from its seed, so the order in which the modules draw from the random key is part
of what they promise. A failure here after a change of the model means that runs started before the
change cannot be repeated. To accept such a change on purpose, write the numbers anew:

    python tests/model/test_initial_parameters.py
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_model import KINDS, geometry

from allattn.model import Model

FILE = Path(__file__).parents[1] / "golden" / "initial_parameters.json"
CLUSTERS: dict[str, Any] = {"cutoffs": (20, 50), "division": 2}

# Every kind of layer, and every way to read and write tokens.
NETWORKS: dict[str, dict[str, Any]] = {
    **KINDS,
    "clusters": CLUSTERS,
    "clusters_untied": {**CLUSTERS, "tied": False},
    "clusters_transformer_xl": {**KINDS["transformer_xl"], **CLUSTERS},
}


def corners(name: str) -> dict[str, list[float]]:
    """The first and the last number of every tensor, by the tensor's path."""
    model = Model(geometry(**NETWORKS[name]))
    # These programs take longer to optimise than to run.
    quick = {"xla_backend_optimization_level": 0}
    params = jax.jit(model.init, compiler_options=quick)(jax.random.key(7))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    numbers = {}
    for path, leaf in leaves:
        flat = np.asarray(leaf, np.float64).ravel()
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        numbers[key] = [float(flat[0]), float(flat[-1])]
    return numbers


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_parameters(name: str) -> None:
    """Equal up to the last bits of a normal number, which versions of XLA may round differently."""
    expected = json.loads(FILE.read_text())[name]
    found = corners(name)
    assert found.keys() == expected.keys()
    for path, numbers in found.items():
        np.testing.assert_allclose(numbers, expected[path], rtol=1e-5, atol=1e-7, err_msg=path)


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: corners(name) for name in NETWORKS}, indent=1) + "\n")
