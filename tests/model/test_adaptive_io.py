"""Adaptive input and softmax: the papers' numbers, rounds, memory, meshes, and a run on words.

Dimension key: B batch, T position, D model width, V vocabulary, n columns of a cluster, d its
width.
"""

import json
import math
from pathlib import Path
from typing import Any

import golden_data as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import call
from comparison import is_normal, is_uniform
from flax import nnx
from golden_data import GRADIENT, OUTPUT
from new_process import fresh
from tiny_model import geometry

from allattn.model import adaptive_softmax, forward_flops
from allattn.model.adaptive_softmax import AdaptiveIO

CUTOFFS = (20, 50, 90)
V = 200
D = 32


def made(params: Any = None, **changes: Any) -> AdaptiveIO:
    """A small one with the given parameters, or with random ones so large that every logit
    counts.
    """
    options = {
        "vocab_size": V,
        "width": D,
        "cutoffs": CUTOFFS,
        "division": 2,
        "tied": True,
        **changes,
    }
    io = AdaptiveIO(rngs=nnx.Rngs(0), **options)
    if params is not None:
        state = nnx.state(io, nnx.Param)
        assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(params)
        nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
        nnx.update(io, state)
    return io


def pure(io: AdaptiveIO) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(io, nnx.Param))


# --- the papers' numbers --------------------------------------------------------------------------

# Where the network around it is not here, its states are: the golden caches hold the embeddings
# and, of Transformer-XL, the final hidden states of the last block.


def check_output(
    io: AdaptiveIO, h_BTD, targets_BT, g: dict, theirs: dict, output: float, gradient: float
) -> None:
    """Log-probabilities and NLL of the last block, and the gradients of what only the output
    has.
    """

    @jax.jit
    def run(io: AdaptiveIO, h_BTD):
        nll_BT, back = jax.vjp(lambda io: io.nll(h_BTD, targets_BT), io)
        return nll_BT, io.logits(h_BTD), back(jnp.full_like(nll_BT, 1 / nll_BT.size))[0]

    nll_BT, logp_BTV, gradients = run(io, h_BTD)
    assert golden.error(nll_BT, g["nll"]) <= output
    assert golden.error(logp_BTV, g["logp"]) <= output
    gradients = pure(gradients)
    names = ("bias", "tail_kernel", "tail_bias", "output_projection")
    ours = {name: gradients[name] for name in names if name in gradients}
    theirs = {name: theirs[name] for name in names if name in theirs}
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert golden.error(found, expected) <= gradient


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["adaptive", "adaptive_div2", "plain", "plain_samelen_clamp"])
def test_transformer_xl(name: str, dtype: str) -> None:
    """Its embeddings and losses; one table without cutoffs, one cut in three, and three narrower
    ones.
    """
    g = golden.load(f"txl_lm_{name}", "golden64" if dtype == "float64" else "golden")
    with jax.enable_x64(dtype == "float64"):
        cutoffs = tuple(g["cutoffs"].tolist())
        M = int(g["block"])
        depth = int(g["n_layers"])
        parts = (
            {k[2:]: v.astype(dtype) for k, v in g.items() if k.startswith(prefix)}
            for prefix in ("p.", "g.")
        )
        params, gradients = (golden.xl_io(part, cutoffs) for part in parts)
        options = {"division": int(g["div_val"]), "cutoffs": cutoffs, "xl": True}
        io = made(
            params, vocab_size=int(g["vocab"]), width=g["mems_after_last.0"].shape[-1], **options
        )
        # Theirs are time-major.
        tokens_BT = g["tokens"].T
        last = slice(-M, None)
        embedded_BTD = g["mems_after_last.0"][last].transpose(1, 0, 2).astype(dtype)
        h_BTD = g[f"mems_after_last.{depth}"][last].transpose(1, 0, 2).astype(dtype)
        output, gradient = (1e-12, 1e-12) if dtype == "float64" else (OUTPUT, GRADIENT)
        assert (
            golden.error(io.embed(tokens_BT[:, -M - 1 : -1], h_BTD.dtype), embedded_BTD) <= output
        )
        found = {"nll": g["nll"][3].T, "logp": g["logp_last"].transpose(1, 0, 2)}
        check_output(io, h_BTD, tokens_BT[:, last], found, gradients, output, gradient)


# --- rounds ---------------------------------------------------------------------------------------


def states(shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(*shape, D)), dtype)


def loss_and_gradients(
    io: AdaptiveIO, h_BTD: jax.Array, targets_BT: np.ndarray, dense: bool
) -> list[jax.Array]:
    """nll_BT and the gradients of a weighted sum of it; `dense`: by all log-probabilities."""

    @jax.jit  # anew at every call, so that the sizes of rounds are read again
    def run(io: AdaptiveIO, h_BTD: jax.Array) -> Any:
        def nll(io: AdaptiveIO, h_BTD: jax.Array) -> jax.Array:
            if dense:
                return -jnp.take_along_axis(io.logits(h_BTD), targets_BT[..., None], axis=-1)[
                    ..., 0
                ]
            return io.nll(h_BTD, targets_BT)

        nll_BT, back = jax.vjp(nll, io, h_BTD)
        weight_BT = jnp.arange(nll_BT.size, dtype=nll_BT.dtype).reshape(nll_BT.shape) - 5
        return nll_BT, *back(weight_BT)

    nll_BT, io_bar, h_bar_BTD = run(io, h_BTD)
    return [nll_BT, h_bar_BTD, *jax.tree.leaves(io_bar)]


TARGETS = {
    "spread": np.random.default_rng(1).integers(V, size=(3, 41)),
    "head": np.random.default_rng(1).integers(20, size=(3, 41)),
    "last-tail": np.random.default_rng(1).integers(90, V, size=(3, 41)),
    "bounds": np.array([[0, 19, 20, 49, 50, 89, 90, 199]]),
    "one": np.array([[55]]),
}


CASES = [({}, name) for name in TARGETS]
CASES += [
    (options, "spread")
    for options in ({"tied": False}, {"division": 1}, {"xl": True}, {"cutoffs": ()})
]


@pytest.mark.parametrize(("options", "name"), CASES, ids=str)
@pytest.mark.parametrize("logits", [1 << 25, 1], ids=["few-rounds", "many-rounds"])
def test_rounds_change_nothing(
    options: dict, name: str, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever tokens a tail has, more than one round holds as well, loss and gradients are those
    of all logits.
    """
    monkeypatch.setattr(adaptive_softmax, "LOGITS", logits)
    io = made(**options)
    targets_BT = TARGETS[name]
    h_BTD = states(targets_BT.shape)
    ours = loss_and_gradients(io, h_BTD, targets_BT, False)
    dense = loss_and_gradients(io, h_BTD, targets_BT, True)
    assert len(ours) == len(dense) == 2 + len(jax.tree.leaves(pure(io)))
    for found, expected in zip(ours, dense, strict=True):
        scale = max(np.abs(expected).max(), 1e-6)
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5, rtol=0)


def test_rounds_follow_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round takes a share of the block, a tail makes as many as its tokens need, and none where
    it has none.
    """
    found = []
    nll = adaptive_softmax._nll

    def spy(size: int, *rest: Any) -> jax.Array:
        found.append((size, int(rest[-1])))
        return nll(size, *rest)

    monkeypatch.setattr(adaptive_softmax, "_nll", spy)
    targets_BT = np.zeros((4, 256), np.int32)
    # 33 tokens in tail 2 and 1 in tail 3, of 1024.
    targets_BT[0, :33] = 50
    targets_BT[1, 0] = 199
    made().nll(states(targets_BT.shape), targets_BT)
    assert found == [(1024, 1), (32, 0), (32, 2), (32, 1)]


def test_probabilities_sum_to_one() -> None:
    logp_BTV = made().logits(states((2, 3)))
    assert logp_BTV.shape == (2, 3, V)
    np.testing.assert_allclose(np.exp(logp_BTV).sum(-1), 1, atol=1e-5)


def test_bfloat16() -> None:
    """Products in bfloat16, sums and losses in float32: near the float32 loss, gradients in the
    parameters' dtype.
    """
    io = made()
    targets_BT = TARGETS["spread"]
    inputs = (states(targets_BT.shape, dtype) for dtype in ("bfloat16", "float32"))
    half, whole = (loss_and_gradients(io, h_BTD, targets_BT, False) for h_BTD in inputs)
    assert half[0].dtype == jnp.float32 and half[1].dtype == jnp.bfloat16
    assert {x.dtype for x in half[2:]} == {jnp.dtype("float32")}
    for found, expected in zip(half, whole, strict=True):
        assert 0 < golden.error(found, expected) < 0.03


def test_memory() -> None:
    """Loss and gradients need three times `LOGITS` at most, where all logits of the block would be
    16 times that.
    """
    config = {"vocab_size": 600_000, "cutoffs": (60_000, 300_000), "width": 64, "division": 4}
    io = nnx.eval_shape(lambda: AdaptiveIO(rngs=nnx.Rngs(0), tied=True, **config))
    h_BTD = jax.ShapeDtypeStruct((4, 256, 64), "float32")
    targets_BT = jax.ShapeDtypeStruct((4, 256), "int32")
    step = jax.jit(
        jax.value_and_grad(
            lambda io, h_BTD, targets_BT: io.nll(h_BTD, targets_BT).mean(), argnums=(0, 1)
        )
    )
    memory = step.lower(io, h_BTD, targets_BT).compile().memory_analysis()
    assert 16 * 4 * adaptive_softmax.LOGITS < 4 * 1024 * 600_000
    assert memory.temp_size_in_bytes < 3 * 4 * adaptive_softmax.LOGITS


def test_lowers_for_a_tpu() -> None:
    """Rounds are loops over static shapes, which a TPU's compiler takes."""
    io = made()
    h_BTD = jax.ShapeDtypeStruct((4, 256, D), jnp.bfloat16)
    step = jax.jit(jax.grad(lambda io, h_BTD, targets_BT: io.nll(h_BTD, targets_BT).mean()))
    exported = jax.export.export(step, platforms=["tpu"])(
        io, h_BTD, jax.ShapeDtypeStruct((4, 256), jnp.int32)
    )
    assert exported.mlir_module().count("stablehlo.while") >= 2 * (1 + len(CUTOFFS))


# --- initialisation, cost, devices ----------------------------------------------------------------


def test_initialisation() -> None:
    """docs/method.md, "Initialisation"; projections as the golden parameters are."""
    sizes = {"vocab_size": 2000, "cutoffs": (500, 1000), "width": 256}
    params = pure(made(tied=False, **sizes))
    for i, d in enumerate((256, 128, 64)):
        is_normal(params["embedding"][i], 1)
        for name in ("projection", "output_projection", "kernel", "bias"):
            is_uniform(params[name][i], 1 / math.sqrt(d))
        assert params["projection"][i].shape == (256, d)
    is_uniform(params["tail_kernel"], 1 / 16)
    params = pure(made(xl=True, **sizes))
    assert set(params["output_projection"]) == {0} and "kernel" not in params
    is_normal(params["output_projection"][0], 0.01)
    for i in range(3):
        is_normal(params["embedding"][i], 0.02)
        is_normal(params["projection"][i], 0.01)
        np.testing.assert_array_equal(params["bias"][i], 0)


def test_flops() -> None:
    """The head and its two projections; plain: the whole vocabulary."""
    rest = forward_flops(geometry(vocab_size=0), 50.0, 8)
    config = geometry(vocab_size=1000, cutoffs=(100, 500), division=2)
    assert forward_flops(config, 50.0, 8) - rest == pytest.approx(2 * 16 * 102 + 4 * 16 * 16)
    assert forward_flops(geometry(vocab_size=1000), 50.0, 8) - rest == pytest.approx(2 * 16 * 1000)


ON_A_MESH = """
import json, jax, numpy as np
from tiny_model import geometry, random_params
from allattn import sharding
from allattn.model import Model
from configs import base
c = base.get_config(); c.mesh.fsdp = c.mesh.tensor = {parts}; c.train.batch = 8
mesh = sharding.make_mesh(c)
rng = np.random.default_rng(0)
few, many = (rng.integers(symbols, size=(8, 33)) for symbols in (20, 97))
tokens = np.where(np.arange(8)[:, None] < 5, few, many)
attention = sharding.attention_over(mesh, 8)

def value_and_gradients(tied):
    config = geometry(vocab_size=97, cutoffs=(20, 50), division=4, tied=tied, persistent=6)
    model = Model(config)
    params = random_params(model)
    params = jax.device_put(params, sharding.shardings(mesh, params))

    def loss(params, tokens):
        network, cache = model.bind(params), model.empty_cache(8, 160)
        forward = network.train_forward(tokens[:, :-1], cache, attention=attention)
        return sharding.nll_over(mesh)(network.io, forward.hidden_BTD, tokens[:, 1:]).mean()

    found = jax.jit(jax.value_and_grad(loss))(params, sharding.Rows(mesh, 8).place(tokens))
    return [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(found)]

print(json.dumps([jax.device_count(), [value_and_gradients(tied) for tied in (True, False)]]))
"""


def test_mesh() -> None:
    """Loss and gradients on 2 x 2 x 2 devices, some of which have no token in any tail, are those
    of one device, with tied and with untied tables.
    """
    one, expected = fresh(ON_A_MESH.format(parts=1), 1)
    eight, found = fresh(ON_A_MESH.format(parts=2), 8)
    assert (one, eight) == (1, 8)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) > 10
        for our_array, their_array in zip(ours, theirs, strict=True):
            assert golden.error(our_array, their_array) <= 1e-5


# --- words ----------------------------------------------------------------------------------------


def test_words_from_start_to_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, go on, evaluate and generate, on a few kilobytes of words."""
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "prepared"))
    rng = np.random.default_rng(0)
    texts = tmp_path / "texts"
    texts.mkdir()
    words = np.array([f"word{i}" for i in range(60)])
    for split, lines in (("train", 120), ("valid", 40), ("test", 40)):
        drawn = [" ".join(words[np.minimum(rng.geometric(0.1, 7), 60) - 1]) for _ in range(lines)]
        (texts / f"{split}.txt").write_text(
            f"{' '.join(words)} \n" * (split == "train") + "\n".join(drawn) + "\n"
        )
    settings = {
        "dataset.name": "files",
        "dataset.data_dir": texts,
        "dataset.unit": "word",
        "model.vocab_size": 0,
    }
    settings |= {
        "model.depth": 1,
        "model.width": 16,
        "model.heads": 2,
        "model.persistent": 8,
        "model.dtype": "float32",
    }
    settings |= {"model.adaptive_io.cutoffs": "10,30", "model.span.limit": 32, "model.span.ramp": 4}
    settings |= {
        "model.span.check_every": 4,
        "optimizer.name": "adam",
        "optimizer.learning_rate": 1e-2,
    }
    settings |= {"train.batch": 4, "train.block": 16, "train.steps": 6, "train.finetune_steps": 2}
    settings |= {
        "checkpoint.every": 4,
        "evaluate.every": 4,
        "optimizer.warmup": 2,
        "optimizer.clip": 1.0,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    train = ["train", "--config=configs/base.py", f"--workdir={tmp_path}/run", *flags]
    trained = call(*train)
    assert trained.code == 0, trained.err
    again = call(*train)
    assert "is complete" in again.out and again.last() == trained.last()
    longer = call(*train, "--config.train.finetune_steps=4")
    assert longer.code == 0 and longer.last()["step"] == 10
    scores = call("evaluate", f"--workdir={tmp_path}/run", "--protocol=full").last()
    assert scores["tokens"] == 40 * 8 - 1 and scores["ppl"] != scores["ppl_words"] > 1
    rows = [
        json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if "dev_ppl_words" in row] == [4, 8, 10]
    generated = call(
        "generate", f"--workdir={tmp_path}/run", "--prompt=word1 word2", "--length=12", "--seed=1"
    )
    assert generated.code == 0 and generated.out.startswith("word1 word2")
    assert set(generated.out.split()) <= set(words) and len(generated.out.split()) > 5
