"""Meshes of CPU devices: one per core by default, and the same numbers whatever their shape.

Dimension key: none, only whole calls are compared.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from tiny_model import geometry

from allattn import config, sharding
from allattn.errors import UserError
from allattn.model import Model, ModelConfig

ROOT = Path(__file__).resolve().parents[1]


def fresh(code: str, devices: int | None = None, **environment: str) -> Any:
    """The JSON that code prints last in a new process."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT}/tests", **environment}
    environment.pop("XLA_FLAGS", None)
    if devices:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


CORES = """
import json, os
os.sched_getaffinity = lambda _: range({cores})
import jax
from allattn import sharding
from configs import base
c = base.get_config()
c.train.batch, c.mesh.data, c.mesh.tensor = {batch}, {data}, {tensor}
sharding.use_cores_for(c)
print(json.dumps(jax.device_count()))
"""


@pytest.mark.parametrize(
    ("cores", "batch", "data", "tensor", "devices"),
    [
        (2, 8, -1, 1, 2),
        (6, 8, -1, 1, 4),  # the most that divide the rows
        (3, 7, -1, 1, 1),
        (4, 8, -1, 2, 4),
        (4, 8, 1, 2, 2),  # what the mesh names
        (2, 8, 3, 1, 1),  # more than there are: the mesh then says so
    ],
)
def test_a_device_per_core(cores: int, batch: int, data: int, tensor: int, devices: int) -> None:
    assert fresh(CORES.format(cores=cores, batch=batch, data=data, tensor=tensor)) == devices


def test_a_chosen_number_of_devices_stays() -> None:
    code = CORES.format(cores=2, batch=8, data=-1, tensor=1)
    assert fresh(code, devices=3) == 3 and fresh(code, JAX_NUM_CPU_DEVICES="5") == 5


EVALUATE = """
import json, jax, numpy as np
from tiny_model import geometry, random_params
from allattn import evaluate, sharding
from allattn.model import Model
from configs import base
c = base.get_config(); c.mesh.fsdp = c.mesh.tensor = {parts}; c.train.batch = 8
model, mesh = Model(geometry(persistent=6)), sharding.make_mesh(c)
params = random_params(model)
params = jax.device_put(params, sharding.shardings(mesh, params))
tokens = np.random.default_rng(0).integers(29, size=500)
found = [evaluate.evaluate_tokens(model, params, tokens, protocol=protocol, block=8, rows=3, mesh=mesh)
         for protocol in ("authors", "full")]
print(json.dumps([jax.device_count(), found]))
"""


def test_evaluation_on_a_mesh() -> None:
    """8 rows, and 3 rows with an idle one, on 2 x 2 x 2 devices: the scores of one device."""
    (one, expected), (eight, found) = fresh(EVALUATE.format(parts=1), 1), fresh(EVALUATE.format(parts=2), 8)
    assert (one, eight) == (1, 8)
    assert found == [pytest.approx(scores, rel=1e-6) for scores in expected]


# --- the table ---------------------------------------------------------------------------------------------------

WIKITEXT = ModelConfig.from_config(config.load(str(ROOT / "configs" / "wikitext103.py")))
CASES = {"adaptive": WIKITEXT, "untied": geometry(cutoffs=(20, 50), division=2, tied=False), "plain": geometry()}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_one_rule(name: str) -> None:
    params = jax.eval_shape(Model(CASES[name]).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    matches = {path: [pattern for pattern, _ in sharding.RULES if re.search(pattern, path)] for path in paths}
    assert {path: found for path, found in matches.items() if len(found) != 1} == {}


def test_tables_too_narrow_to_split() -> None:
    """WikiText-103's last cluster, 67,735 rows of 8, is whole on each of 16 devices; the others are split by width."""
    params = jax.eval_shape(Model(WIKITEXT).init, jax.random.key(0))
    places = sharding.shardings(AbstractMesh((1, 16, 1), sharding.AXES), params)
    specs = [place.spec for place in places["io"]["embedding"].values()]
    assert specs == [PartitionSpec(None, "fsdp")] * 3 + [PartitionSpec()]
    with pytest.raises(UserError, match=r"layers/\w+: expected a dimension divisible by mesh axis fsdp = 3, found 512"):
        sharding.shardings(AbstractMesh((1, 3, 1), sharding.AXES), {"layers": params["layers"]})
