"""Meshes of CPU devices: one per core by default, and the same numbers whatever their shape.

Dimension key: none, only whole calls are compared.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import golden_data as golden
import jax
import numpy as np
import pytest
from command_line import write_texts
from jax.sharding import AbstractMesh, PartitionSpec
from mesh_runs import KINDS
from new_process import fresh
from several_processes import train as run

from allattn import config as configuration
from allattn import data, sharding, train
from allattn.errors import UserError
from allattn.model import Model, ModelConfig
from allattn.train import optim

ROOT = Path(__file__).resolve().parents[2]


CORES = """
import json, os
import jax
from allattn import sharding
from configs import base

cores, batch, data, tensor = {case}
os.sched_getaffinity = lambda _: range(cores)
c = base.get_config()
c.train.batch, c.mesh.data, c.mesh.tensor = batch, data, tensor
sharding.use_cores_for(c)
print(json.dumps(jax.device_count()))
"""


def test_a_device_per_core() -> None:
    # cores, rows of a batch, sizes of the mesh axes data and tensor; the devices that are made
    cases = {
        (2, 8, -1, 1): 2,
        (6, 8, -1, 1): 4,  # the most that divide the rows
        (3, 7, -1, 1): 1,
        (4, 8, -1, 2): 4,
        (4, 8, 1, 2): 2,  # what the mesh names
        (2, 8, 3, 1): 1,  # more than there are: the mesh then says so
    }
    assert {case: fresh(CORES.format(case=case)) for case in cases} == cases


def test_a_chosen_number_of_devices_stays() -> None:
    code = CORES.format(case=(2, 8, -1, 1))
    assert fresh(code, devices=3) == 3
    # JAX reads this variable when it is imported, so the process starts anew.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "5"}
    found = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment)
    assert found == b"5\n"


EVALUATE = """
import json, jax, numpy as np
from tiny_model import geometry, random_params
from allattn.evaluation import scoring
from allattn import sharding
from allattn.model import Model
from configs import base
c = base.get_config(); c.mesh.fsdp = c.mesh.tensor = {parts}; c.train.batch = 8
model, mesh = Model(geometry(persistent=6)), sharding.make_mesh(c)
params = random_params(model)
params = jax.device_put(params, sharding.shardings(mesh, params))
tokens = np.random.default_rng(0).integers(29, size=500)
settings = dict(block=8, rows=3, mesh=mesh)
found = [scoring.evaluate_tokens(model, params, tokens, protocol=protocol, **settings)
         for protocol in ("authors", "full")]
print(json.dumps([jax.device_count(), found]))
"""


def test_evaluation_on_a_mesh() -> None:
    """8 rows, and 3 rows with an idle one, on 2 x 2 x 2 devices: the scores of one device."""
    one, expected = fresh(EVALUATE.format(parts=1), 1)
    eight, found = fresh(EVALUATE.format(parts=2), 8)
    assert (one, eight) == (1, 8)
    assert found == [pytest.approx(scores, rel=1e-6) for scores in expected]


# --- the table ------------------------------------------------------------------------------------

WIKITEXT = ModelConfig.from_config(configuration.load(str(ROOT / "configs" / "wikitext103.py")))


def test_tables_too_narrow_to_split() -> None:
    """WikiText-103's last cluster, 67,735 rows of 8, is whole on each of 16 devices; the others are
    split by width.
    """
    params = jax.eval_shape(Model(WIKITEXT).init, jax.random.key(0))
    places = sharding.shardings(AbstractMesh((1, 16, 1), sharding.AXES), params)
    specs = [place.spec for place in places["io"]["embedding"].values()]
    assert specs == [PartitionSpec(None, "fsdp")] * 3 + [PartitionSpec()]
    with pytest.raises(
        UserError,
        match=r"layers/\w+: expected a dimension divisible by mesh axis fsdp = 3, found 512",
    ):
        sharding.shardings(AbstractMesh((1, 3, 1), sharding.AXES), {"layers": params["layers"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh.fsdp": "-1"},
            "mesh: expected positive sizes and at most one -1, found {'data': -1, 'fsdp': -1, 't",
        ),
        (
            {"train.batch": "24"},
            "train.batch: expected a multiple of data x fsdp x accumulation = 16, found 24",
        ),
        ({"mesh.tensor": "16"}, "mesh.tensor: expected a divisor of 8 heads, found 16"),
        (
            {"mesh.tensor": "2", "model.integration": "head_split"},
            "mesh.tensor: expected 1, as head_split has heads of two kinds, found 2",
        ),
        (
            {
                "mesh.tensor": "2",
                "model.integration": "split",
                "model.persistent_heads": "1",
            },
            "mesh.tensor: expected 1, as split has heads of two kinds, found 2",
        ),
        (
            {"mesh.tensor": "2", "model.integration": "sublayer"},
            "mesh.tensor: expected 1, as sublayer has heads of two kinds, found 2",
        ),
    ],
)
def test_mistakes(changes: dict[str, str], message: str) -> None:
    c = configuration.load(str(ROOT / "configs" / "enwik8_small.py"), changes)
    with pytest.raises(UserError) as met:
        sharding.make_mesh(c, [None] * 16)
    assert str(met.value).startswith(message)


def test_a_dimension_that_no_axis_divides(tmp_path: Path, own_data_dir: None) -> None:
    """A dimension that the mesh does not divide is refused before there is a workdir."""
    with run(write_texts(tmp_path), tmp_path / "run", 1, 4, mesh__fsdp=4, model__width=18) as one:
        (result,) = one.results()
    expected = r"allattn: .*: expected a dimension divisible by mesh axis fsdp = 4, found 18"
    assert result.code == 2 and re.fullmatch(expected, result.err.splitlines()[-1])
    assert not (tmp_path / "run").exists()


def paths(config: Any) -> set[str]:
    """Names of all arrays of a run."""
    config.model.vocab_size = config.model.vocab_size or 96
    model = Model(ModelConfig.from_config(config))
    optimizer = optim.optimizer(config)

    def state(key: jax.Array) -> tuple:
        params = model.init(key)
        cache_XBSD = model.empty_cache(1, 1)
        state = train.TrainState(
            np.int32(0), params, optimizer.init(params), cache_XBSD, jax.random.key_data(key)
        )
        return state, model.empty_key_value(1, 1)

    flat = [
        jax.tree_util.tree_flatten_with_path(t)[0] for t in jax.eval_shape(state, jax.random.key(0))
    ]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") for part in flat for path, _ in part
    }


def test_one_rule_per_array() -> None:
    """Every array has exactly one rule, and every rule an array."""
    files = [p for p in (ROOT / "configs").rglob("*.py") if p.stem not in ("__init__", "base")]
    names = set().union(*(paths(configuration.load(str(file)).unlock()) for file in files))
    matches = {
        name: [pattern for pattern, _ in sharding.RULES if re.search(pattern, name)]
        for name in names
    }
    assert {name: found for name, found in matches.items() if len(found) != 1} == {}
    assert {pattern for pattern, _ in sharding.RULES} == {found[0] for found in matches.values()}


TRAIN = """
import os
# It takes longer to optimise than to run.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
import jax, numpy as np
from command_line import trained, trainer
from mesh_runs import KINDS, SHARED
found = {{}}
for kind, changes in KINDS.items():
    mesh = {{"mesh__fsdp": {parts}, "mesh__tensor": {parts}}}
    state, _, losses = trained(trainer("{texts}", **SHARED | mesh | changes), 4)
    tree = {{"losses": losses, "params": state.params, "optimizer": state.optimizer}}
    tree["cache"] = state.cache
    for path, x in jax.tree_util.tree_flatten_with_path({{kind: tree}})[0]:
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = np.asarray(x)
np.savez("{file}", **found)
print(jax.device_count())
"""


def test_training_on_a_mesh(tmp_path: Path, own_data_dir: None) -> None:
    """Four steps of every kind of layer, most in two accumulated parts, with dropout everywhere, on
    8 devices: the losses, parameters, optimizer state and cache of one device.

    Float32 rounds to 6e-8 and each device sums a part, which moves a gradient by some 1e-6 of its
    largest entry (as accumulation 4 instead of 2 does on one device). Parameters may move farther:
    both optimizers divide a gradient by its own size, and so make a whole step of what is left of
    one that cancels.
    """
    texts = write_texts(tmp_path)
    data.prepare("files", texts, numbering="appearance")

    def run(parts: int) -> dict[str, np.ndarray]:
        file = tmp_path / f"{parts}.npz"
        assert fresh(TRAIN.format(texts=texts, parts=parts, file=file), parts**3) == parts**3
        return dict(np.load(file))

    with ThreadPoolExecutor() as both:
        one, eight = both.map(run, (1, 2))
    assert list(one) == list(eight) and len(one) > 20 * len(KINDS)
    errors = {name: golden.error(eight[name], one[name]) for name in one}
    # So may a scalar's moments: its gradient is a sum over all features, which cancels.
    may_be_farther = re.compile("/params/|(residual|branch|embedding)_scale$")
    assert {
        name: e
        for name, e in errors.items()
        if not e <= (5e-5 if may_be_farther.search(name) else 5e-6)
    } == {}
