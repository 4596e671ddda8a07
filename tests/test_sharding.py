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
import numpy as np
import pytest
from command_line import flags, write_texts
from jax.sharding import AbstractMesh, PartitionSpec

from allattn import config as configuration
from allattn import optim, sharding, train
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

WIKITEXT = ModelConfig.from_config(configuration.load(str(ROOT / "configs" / "wikitext103.py")))


def test_tables_too_narrow_to_split() -> None:
    """WikiText-103's last cluster, 67,735 rows of 8, is whole on each of 16 devices; the others are split by width."""
    params = jax.eval_shape(Model(WIKITEXT).init, jax.random.key(0))
    places = sharding.shardings(AbstractMesh((1, 16, 1), sharding.AXES), params)
    specs = [place.spec for place in places["io"]["embedding"].values()]
    assert specs == [PartitionSpec(None, "fsdp")] * 3 + [PartitionSpec()]
    with pytest.raises(UserError, match=r"layers/\w+: expected a dimension divisible by mesh axis fsdp = 3, found 512"):
        sharding.shardings(AbstractMesh((1, 3, 1), sharding.AXES), {"layers": params["layers"]})


def test_a_dimension_that_the_mesh_does_not_divide(tmp_path: Path) -> None:
    """Refused before there is a workdir."""
    words = ["train", f"--workdir={tmp_path}/run", *flags(write_texts(tmp_path), mesh__fsdp=4, model__width=18)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLATTN_DATA_DIR": str(tmp_path / "prepared")}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "allattn", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    expected = r"allattn: .*: expected a dimension divisible by mesh axis fsdp = 4, found 18"
    assert done.returncode == 2 and re.fullmatch(expected, done.stderr.splitlines()[-1])
    assert not (tmp_path / "run").exists()


def paths(config: Any) -> set[str]:
    """Names of all arrays of a run."""
    config.model.vocab_size = config.model.vocab_size or 96
    model, optimizer = Model(ModelConfig.from_config(config)), optim.optimizer(config)

    def state(key: jax.Array) -> tuple:
        params = model.init(key)
        cache_XBSD = model.empty_cache(1, 1)
        state = train.TrainState(np.int32(0), params, optimizer.init(params), cache_XBSD, jax.random.key_data(key))
        return state, model.empty_key_value(1, 1)

    flat = [jax.tree_util.tree_flatten_with_path(t)[0] for t in jax.eval_shape(state, jax.random.key(0))]
    return {jax.tree_util.keystr(path, simple=True, separator="/") for part in flat for path, _ in part}


def test_every_array_has_one_rule_and_every_rule_an_array() -> None:
    files = [p for p in (ROOT / "configs").rglob("*.py") if p.stem not in ("__init__", "base")]
    names = set().union(*(paths(configuration.load(str(file)).unlock()) for file in files))
    matches = {name: [pattern for pattern, _ in sharding.RULES if re.search(pattern, name)] for name in names}
    assert {name: found for name, found in matches.items() if len(found) != 1} == {}
    assert {pattern for pattern, _ in sharding.RULES} == {found[0] for found in matches.values()}


TRAIN = """
import json, jax, jax.numpy as jnp, numpy as np, optax
from tiny_model import KINDS, geometry, random_params
from allattn import data, sharding, train
from allattn.model import Model
from configs import base
found = {{}}
for name in {kinds}:
    changes = {{"embedding_dropout": 0.2, "attention_dropout": 0.2, "dropout": 0.2, **KINDS[name], "heads": 4}}
    model = Model(geometry(**{{"persistent": 6, **changes, "limit": 20}}))
    c = base.get_config(); c.mesh.fsdp = c.mesh.tensor = {parts}; c.train.batch, c.train.accumulation = 8, 2
    c.model.span.limit, c.model.span.adaptive = 20, model.config.adaptive
    mesh, params, optimizer = sharding.make_mesh(c), random_params(model), optax.sgd(1.0)
    key = jax.random.key_data(jax.random.key(0))
    state = train.TrainState(jnp.int32(5), params, optimizer.init(params), model.empty_cache(8, 20) + 1, key)
    places = sharding.shardings(mesh, state)
    step = train.make_train_step(model, optimizer, c, 20, sharding.attention_over(mesh, 8), mesh)
    tokens = np.random.default_rng(0).integers(29, size=(8, 9)).astype(np.int32)
    rows = (sharding.Rows(mesh, 8).place(x) for x in (tokens[:, :-1], tokens[:, 1:]))
    quick = {{"xla_backend_optimization_level": 0}}  # this program takes longer to optimise than to run
    step, batch = jax.jit(step, out_shardings=(places, None), compiler_options=quick), data.Batch(*rows, np.int32(13))
    new, values = step(jax.device_put(state, places), batch)
    new, old = jax.device_get((new.params, params))
    changed = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), new, old)
    weights = np.random.default_rng(1).normal(size=100_000)
    found[name] = [float(x.ravel() @ weights[: x.size]) for x in jax.tree.leaves(changed)]
    found[name].append(float(values.compute()["nll"]))
print(json.dumps([jax.device_count(), found]))
"""


def test_training_on_a_mesh() -> None:
    """A step of every kind of layer in two accumulated parts, with dropout everywhere, on 2 x 2 x 2 devices: the
    gradients of one device."""
    kinds = ["single_head", "transformer", "transformer_xl"]
    runs = [fresh(TRAIN.format(kinds=kinds, parts=parts), parts**3) for parts in (1, 2)]
    (one, expected), (eight, found) = runs
    assert (one, eight) == (1, 8)
    for name in kinds:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
