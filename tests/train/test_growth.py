"""A network with more pairs than it has learned with is the same function.

Dimension key: X layer, B batch, T position in the block, H head, N persistent pair, D model width.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_line import trained, trainer, write_texts

from allattn import train
from allattn.errors import UserError
from allattn.model import Params
from allattn.storage.checkpoint import Checkpointer
from allattn.train import growth, start

XLA = {"model__implementation": "xla", "model__depth": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Workdirs of a network with 16 pairs after two updates, and of the same with offsets."""
    folder = tmp_path_factory.mktemp("growth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(folder / "prepared"))
        texts = write_texts(folder)
        state, context_length, _ = trained(trainer(texts, **XLA, model__persistent=16), 2)
        bias_XHN = np.random.default_rng(0).normal(size=(2, 2, 16)).astype(np.float32)
        with_bias = {**state.params["layers"], "persistent_bias": bias_XHN}
        for bias, params in (
            (False, state.params),
            (True, {**state.params, "layers": with_bias}),
        ):
            by = trainer(texts, **XLA, model__persistent=16, model__persistent_bias=bias)
            with Checkpointer(str(folder / str(bias))) as checkpoints:
                checkpoints.save_params(2, params, by.meta(state, context_length))
        yield folder


def grown(place: Path, source: bool, **changes: Any) -> tuple[train.Trainer, Params]:
    """A run that starts from one of the networks, and its first parameters."""
    settings = {**XLA, "model__persistent_bias": True, "train__init_from": str(place / str(source))}
    by = trainer(place / "texts", **{**settings, **changes})
    params = start.warm_start(by, by.dataset)
    assert params is not None
    return by, params


def hidden(by: train.Trainer, params: Params) -> np.ndarray:
    """Final states of one block on a cache of other states."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(by.model.config.vocab_size, size=(3, 16))
    cache_XBSD = rng.normal(size=(2, 3, 32, 16)).astype(np.float32)
    run = jax.jit(lambda p: by.model.bind(p).train_forward(tokens_BT, cache_XBSD).hidden_BTD)
    return np.asarray(run(params))


@pytest.mark.parametrize(
    ("source", "pairs", "tolerance"), [(True, 64, 0), (False, 64, 0), (True, 24, 3e-6)]
)
def test_the_same_function(place: Path, source: bool, pairs: int, tolerance: float) -> None:
    """To the bit where sqrt of the ratio of pairs is a power of two, else to rounding."""
    by, params = grown(place, source, model__persistent=pairs)
    with Checkpointer(str(place / str(source)), create=False) as checkpoints:
        before = trainer(
            place / "texts", **XLA, model__persistent=16, model__persistent_bias=source
        )
        old = checkpoints.restore_params(before.abstract_state(1).params)
    expected_BTD = hidden(before, old)
    found_BTD = hidden(by, params)
    np.testing.assert_allclose(found_BTD, expected_BTD, rtol=0, atol=tolerance)
    assert np.ptp(expected_BTD) > 1


def test_opened_pairs(place: Path) -> None:
    """They get the share of the pairs' weight that is asked for, where logits are alike; closed
    ones stay closed through an update with decay, and the others learn.
    """
    _, params = grown(place, True, model__persistent=64, train__grown_share=0.05)
    layers = params["layers"]
    weight_XHN = jax.nn.softmax(layers["persistent_bias"], axis=2)
    np.testing.assert_allclose(weight_XHN[:, :, 16:].sum(2), 0.05, rtol=1e-5)
    assert not layers["persistent_value"][:, :, 16:].any()
    assert layers["persistent_key"][:, :, 16:].any()

    # Closed pairs that are opened later are the same.
    changes = {"optimizer__name": "adamw", "optimizer__weight_decay": 0.1}
    changes |= {"model__persistent": 64, "model__implementation": "reference"}
    by, closed = grown(place, True, **changes)
    again = growth.grow_pairs(closed, closed, 0.05)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    state, context_length = by.fresh_state(closed)
    bias_XHN = np.asarray(closed["layers"]["persistent_bias"])
    state, _ = by.step(state, context_length, by.batch(0))
    new_XHN = np.asarray(state.params["layers"]["persistent_bias"])
    assert np.isneginf(new_XHN[:, :, 16:]).all() and np.isneginf(bias_XHN[:, :, 16:]).all()
    assert (new_XHN[:, :, :16] != bias_XHN[:, :, :16]).all()
    assert all(
        np.isfinite(x).all() for name, x in state.params["layers"].items() if "bias" not in name
    )


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (True, {"model__persistent": 8}, "model.persistent 8, found 16"),
        (
            False,
            {"model__persistent": 64, "model__persistent_bias": False},
            "model.persistent_bias True in this configuration, .* found False",
        ),
        (
            True,
            {"model__persistent": 16, "model__persistent_bias": False},
            "found persistent_bias: True there, False here",
        ),
        (True, {"model__persistent": 64, "model__depth": 1}, "found depth: 2 there, 1 here"),
    ],
)
def test_refusals(place: Path, source: bool, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^train.init_from: .*: expected .*{message}"):
        grown(place, source, **changes)
