"""Learning rates, rates of some parameters' own, and Muon against its definition.

Dimension key: X layer, H head, N persistent pair, K head width, D model width, V any vector.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command_line import settings, write_texts
from tiny_model import KINDS, geometry

from allattn import config as configuration
from allattn import train
from allattn.errors import UserError
from allattn.model import Model
from allattn.model.parameters import parameter_name
from allattn.train import muon, optim
from allattn.train.jsonl import read_jsonl
from configs import base

# It takes longer to optimise than to run.
QUICK = {"xla_backend_optimization_level": 0}
# Fields of `optimizer` for each rule; rates that are powers of two, so that products are exact.
RULES: dict[str, dict[str, Any]] = {
    "adagrad": {"learning_rate": 0.0625, "clip": 0.03},
    "adam": {"learning_rate": 0.0625, "clip": 1.0},
    "adamw": {"learning_rate": 0.0625, "clip": 1.0, "weight_decay": 0.5},
    "muon": {"learning_rate": 0.0625, "clip": 1.0, "adam_rate": 0.5, "weight_decay": 0.5},
}


def rule(name: str, **changes: Any) -> optax.GradientTransformation:
    """The transformation of some fields of `optimizer`, at a constant rate."""
    c = base.get_config()
    c.optimizer.update({"name": name, "warmup": 1, **RULES[name], **changes})
    return optim.optimizer(c)


# One array of every kind, of two layers.
SHAPES = {
    "io": {"embedding": (9, 6)},
    "position": {"table": (7, 4)},
    "layers": {
        "query": (2, 6, 2, 4),
        "output": (2, 2, 4, 6),
        "persistent_key": (2, 2, 5, 4),
        "persistent_value": (2, 2, 5, 4),
        "pairs": {"persistent_key": (2, 2, 5, 4)},
        "span": (2, 2),
        "norm_scale": (2, 6),
    },
}


@functools.cache
def arrays(seed: int) -> Any:
    """Normal numbers of these shapes."""
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: rng.normal(size=shape), SHAPES, is_leaf=is_shape)


def updates(of: optax.GradientTransformation, dtype: str = "float32") -> list[dict[str, Any]]:
    """What three updates add to the parameters, by name."""
    params, *gradients = [
        jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays(n)) for n in range(4)
    ]
    state = of.init(params)
    update = jax.jit(of.update, compiler_options=QUICK)
    found = []
    for gradient in gradients:
        change, state = update(gradient, state, params)
        params = optax.apply_updates(params, change)
        flat = jax.tree_util.tree_flatten_with_path(change)[0]
        found.append({parameter_name(path): np.asarray(x) for path, x in flat})
    return found


# --- the rate -------------------------------------------------------------------------------------


def test_cooldown() -> None:
    """After the warm-up it is constant, falls linearly to 0 at the end, and is then a tenth."""
    c = base.get_config()
    c.optimizer.update({"learning_rate": 0.5, "warmup": 4, "cooldown": 0.4})
    c.train.steps = 20
    found = [float(optim.schedule(c)(count)) for count in range(22)]
    warm = [0.125, 0.25, 0.375, 0.5]
    cool = [0.5 * (20 - count) / 8 for count in range(12, 20)]
    np.testing.assert_allclose(found, [*warm, *[0.5] * 8, *cool, 0.05, 0.05], rtol=1e-6)

    # A cooldown that is longer than what the warm-up leaves.
    c.optimizer.update({"warmup": 10, "cooldown": 1.0})
    found = [float(optim.schedule(c)(count)) for count in range(20)]
    expected = [0.5 * min(1, (n + 1) / 10) * (20 - n) / 20 for n in range(20)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_stored_run_without_the_fields() -> None:
    """A workdir of before them was made with what their defaults mean."""
    c = base.get_config()
    stored = c.to_dict()
    for field in ("adam_rate", "pairs_rate", "span_rate", "cooldown"):
        del stored["optimizer"][field]
    again = configuration.from_json(json.dumps(stored))
    assert configuration.changed_fields(again, c) == []
    c.optimizer.cooldown = 0.5
    found = configuration.changed_fields(again, c)
    assert found == ["optimizer.cooldown: 0.0 in the workdir, 0.5 now"]


# --- rates of their own ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adagrad", "muon"])
def test_rates_of_their_own(name: str) -> None:
    """The first update of pairs' keys, also in a sublayer of their own, and of spans is so much
    larger or smaller, and no other.
    """
    plain = updates(rule(name))[0]
    scaled = updates(rule(name, pairs_rate=4.0, span_rate=0.25))[0]
    factors = {"persistent_key": 4, "span": 0.25}
    for parameter, change in plain.items():
        expected = change * np.float32(factors.get(parameter.rpartition("/")[2], 1))
        np.testing.assert_array_equal(scaled[parameter], expected)


def test_no_factors_no_state() -> None:
    """Without rates of their own the state is that of older checkpoints."""
    assert isinstance(rule("adagrad").init(arrays(0)), optim.AdagradState)


# --- Muon -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_grouped(kind: str) -> None:
    """Projections, pairs and feed-forward maps are matrices; nothing else is."""
    params = jax.eval_shape(Model(geometry(**KINDS[kind])).init, jax.random.key(0))
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    groups = {parameter_name(path): muon.dimensions(path, x) for path, x in flat}
    matrices = {name for name, numbers in groups.items() if numbers}
    maps = ("query", "key", "value", "relative", "output", "inner", "outer")
    last = {name: name.rpartition("/")[2].removeprefix("persistent_") for name in groups}
    assert matrices == {n for n in groups if n.startswith("layers/") and last[n] in maps}


def test_a_matrix_that_it_cannot_group() -> None:
    """One line names it; a vector of each layer is none."""
    params = {"layers": {"gain": jnp.zeros((2, 16)), "query": jnp.zeros((2, 4, 2, 2))}}
    assert rule("muon").init(params)
    params["layers"]["mixer"] = jnp.zeros((2, 16, 4))
    message = r"^optimizer.name: expected .* muon, .* layers/mixer of shape \(2, 16, 4\)"
    with pytest.raises(UserError, match=message):
        rule("muon").init(params)


def newton_schulz(matrix_XX: np.ndarray) -> np.ndarray:
    """Five steps of the quintic iteration from the matrix over its norm, in float64."""
    x_XX = matrix_XX / (np.linalg.norm(matrix_XX) + 1e-8)
    for _ in range(5):
        square_XX = x_XX @ x_XX.T
        x_XX = 3.4445 * x_XX - 4.7750 * square_XX @ x_XX + 2.0315 * square_XX @ square_XX @ x_XX
    return x_XX


def muon_by_hand(gradients: list[np.ndarray], param_XX: np.ndarray) -> list[np.ndarray]:
    """Updates of one matrix, (in, out), as docs/method.md has them."""
    rate = RULES["muon"]["learning_rate"]
    decay = RULES["muon"]["weight_decay"]
    size_in, size_out = param_XX.shape
    mean_XX = np.zeros_like(param_XX)
    found = []
    for number, gradient_XX in enumerate(gradients, start=1):
        mean_XX = 0.95 * mean_XX + 0.05 * gradient_XX
        ahead_XX = 0.95 * mean_XX / (1 - 0.95 ** (number + 1))
        ahead_XX = ahead_XX + 0.05 * gradient_XX / (1 - 0.95**number)
        scale = max(1, size_out / size_in) ** 0.5
        change_XX = -rate * (scale * newton_schulz(ahead_XX) + decay * param_XX)
        param_XX = param_XX + change_XX
        found.append(change_XX)
    return found


# A matrix of the second layer, (in, out): pairs of its last head, and all heads together.
MATRICES: dict[str, Callable[[Any], Any]] = {
    "persistent_key": lambda x_XHNK: x_XHNK[1, 1].T,
    "persistent_value": lambda x_XHNK: x_XHNK[1, 1],
    "query": lambda x_XDHK: x_XDHK[1].reshape(6, 8),
    "output": lambda x_XHKD: x_XHKD[1].reshape(8, 6),
}


def test_muon_by_its_definition() -> None:
    """Three updates of one head's pairs, and of a layer's query and output, in float64."""
    with jax.enable_x64(True):
        found = updates(rule("muon", clip=0.0), "float64")
    for name, matrix in MATRICES.items():
        start, *gradients = [matrix(arrays(seed)["layers"][name]) for seed in range(4)]
        expected = muon_by_hand(gradients, start)
        for change, by_hand in zip(found, expected, strict=True):
            error = matrix(change[f"layers/{name}"]) - by_hand
            assert np.abs(error).max() <= 1e-12


def test_what_is_no_matrix_has_adamw() -> None:
    """At the rate of its own, to the bit."""
    by_muon = updates(rule("muon"))
    by_adamw = updates(rule("adamw", learning_rate=0.5))
    for name in ("io/embedding", "position/table", "layers/span", "layers/norm_scale"):
        np.testing.assert_array_equal(by_muon[-1][name], by_adamw[-1][name])


# --- runs -----------------------------------------------------------------------------------------

# The tiny run with everything that this page is about.
RUN = {
    "optimizer.name": "muon",
    "optimizer.learning_rate": 0.03125,
    "optimizer.adam_rate": 0.01,
    "optimizer.pairs_rate": 2.0,
    "optimizer.span_rate": 0.5,
    "optimizer.cooldown": 0.5,
    "train.steps": 12,
    "train.finetune_steps": 0,
    "checkpoint.every": 6,
    "evaluate.every": 12,
}


@pytest.mark.slow
def test_muon_learns_and_resumes(
    tmp_path: Path, own_data_dir: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss falls; from the checkpoint in the middle it falls in the same way, to the bit."""
    scores = {"nll": 1.0, "bpc": 1.4, "tokens": 9}
    monkeypatch.setattr(train.Trainer, "evaluate", lambda *_: scores)
    c = base.get_config()
    c.update_from_flattened_dict(settings(write_texts(tmp_path), **RUN))
    workdir = tmp_path / "run"

    def losses() -> list[float]:
        train.train_and_evaluate(c, str(workdir))
        return [row["nll"] for row in read_jsonl(str(workdir)) if "nll" in row]

    once = losses()
    assert len(once) == 12 and np.mean(once[-3:]) < once[0] - 0.05
    shutil.rmtree(workdir / "checkpoints" / "12")
    (workdir / "metrics.jsonl").unlink()
    assert losses() == once[6:]
