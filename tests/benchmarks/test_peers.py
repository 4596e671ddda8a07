"""What ours is measured beside does the same job: the PyTorch peers compute what the operation and
the network do.

Dimension key: X layer, B batch, T position in the block, S context key, L distance, N persistent
pair, H head, K head width, D model width.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import geometry, random_params

from allattn.model import Model

torch = pytest.importorskip("torch", reason="the peers need PyTorch: pip install -e '.[torch]'")
from benchmarks import flex, peers, peers_torch  # noqa: E402

# every key has a distance, and no span ends on a whole number, where the two logarithms differ
CASE = attention_cases.Case(T=21, S=51, L=30, H=3, spans=(0.5, 9.25, 30.0))


def heads_first(inputs: dict[str, Any]) -> list[Any]:
    """The arrays of a case as tensors in the order and layout of the peers."""
    arrays = {name: np.array(x) for name, x in inputs.items()}
    moved = [arrays[name].swapaxes(1, 2) for name in ("query", "key", "value")]
    rest = [
        arrays["position_HLK"][0],
        arrays["persistent_key_HNK"],
        arrays["persistent_value_HNK"],
        arrays["span_H"],
    ]
    return [torch.tensor(x) for x in (*moved, *rest)]


def test_the_operation_with_its_gradients() -> None:
    inputs = attention_cases.arrays(CASE)
    expected = attention_cases.results(CASE, inputs, "reference")
    del expected["mass"]
    tensors = [x.requires_grad_() for x in heads_first(inputs)]
    out_BHTK = peers_torch.all_attention(*tensors, CASE.ramp)
    cotangent_BTHK = np.random.default_rng(1).normal(size=expected["out"].shape).astype(np.float32)
    gradients = torch.autograd.grad(
        (out_BHTK.transpose(1, 2) * torch.tensor(cotangent_BTHK)).sum(), tensors
    )
    names = ("position_HLK", "persistent_key_HNK", "persistent_value_HNK", "span_H")
    found = {"out": out_BHTK.detach().transpose(1, 2)}
    found |= {
        name: x.transpose(1, 2)
        for name, x in zip(("query", "key", "value"), gradients, strict=False)
    }
    found |= dict(zip(names, gradients[3:], strict=True)) | {"position_HLK": gradients[3][None]}
    assert attention_cases.error(found, expected) < 1e-5


def by_name(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parameters of ours, or their gradients, by the names of the peer's."""
    found = {**tree["io"], "position": tree["position"]["table"]}
    for name, stacked in tree["layers"].items():
        found |= {f"layers.{layer}.{name}": x for layer, x in enumerate(stacked)}
    return {name: np.array(x) for name, x in found.items()}


def test_the_network_with_its_gradients() -> None:
    """The same logits, caches and gradients from the same parameters, which have the same names."""
    model = Model(geometry(limit=41))  # so that no span ends on a whole number
    config = model.config
    params = random_params(model)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(config.vocab_size, size=(2, 12))
    cache_XBLD = rng.normal(size=(config.depth, 2, config.limit, config.width)).astype(np.float32)

    def loss(params: Any) -> tuple:
        network = model.bind(params)
        forward = network.train_forward(jnp.asarray(tokens_BT), jnp.asarray(cache_XBLD))
        logits_BTV = network.io.logits(forward.hidden_BTD)
        return (logits_BTV**2).mean(), (logits_BTV, forward.new)

    expected, (logits_BTV, new_XBTD) = jax.grad(loss, has_aux=True)(params)
    job = peers_torch.Job(
        **{
            name: getattr(config, name)
            for name in ("depth", "width", "heads", "limit", "persistent", "vocab_size")
        },
        **dict(block=12, rows=2, ramp=config.ramp, threads=1),
    )
    peer = peers_torch.Network(job)
    peer.load_state_dict({name: torch.tensor(x) for name, x in by_name(params).items()})
    logits, memory = peer(torch.tensor(tokens_BT), list(torch.tensor(cache_XBLD)))
    (logits**2).mean().backward()
    found = {name: p.grad for name, p in peer.named_parameters()}
    assert attention_cases.error(found, by_name(expected)) < 1e-5
    assert attention_cases.error({"logits": logits.detach()}, {"logits": logits_BTV}) < 1e-5
    whole_XBLD = np.concatenate([cache_XBLD, new_XBTD], 2)[:, :, 12:]
    np.testing.assert_allclose(np.stack([x.numpy() for x in memory]), whole_XBLD, rtol=0, atol=1e-5)


def test_flex_attention() -> None:
    """Its score modification and block mask; the gradients are PyTorch's, which has them on a GPU
    only.
    """
    inputs = attention_cases.arrays(CASE)
    tensors = heads_first(inputs)
    mask = flex.block_mask(tensors[-1], CASE.ramp, CASE.T, CASE.L, CASE.N)
    out_BHTK = flex.all_attention(
        *tensors, ramp=CASE.ramp, mask=mask, attention=flex.flex_attention
    )
    expected = attention_cases.call(inputs, ramp=CASE.ramp, implementation="reference")
    assert attention_cases.error({"out": out_BHTK.transpose(1, 2)}, {"out": expected}) < 1e-5


def test_the_table(tmp_path: Path) -> None:
    """All contenders run in turn, and the file holds what the table says."""
    pytest.importorskip(
        "x_transformers", reason="make bench-peers installs x-transformers into .venv-peers"
    )
    command = [
        sys.executable,
        "-m",
        "benchmarks.peers",
        "--geometry=tiny",
        "--rows=2",
        "--rounds=1",
    ]
    command += [f"--python={sys.executable}", f"--results={tmp_path}"]
    done = subprocess.run(
        command, cwd=peers.ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    (path,) = tmp_path.iterdir()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["name"] for row in found] == list(peers.PEERS) and all(
        0 < row["share"] < 1 for row in found
    )
    assert (
        all(f"{row['tokens_per_s']:>10}" in done.stdout for row in found)
        and str(path) in done.stdout
    )
    assert {"jax", "torch", "x-transformers", "machine", "date", "commit"} <= set(found[0])
