"""The PyTorch side of benchmarks/peers.py, in an environment of its own.

Command:  python -m benchmarks.peers_torch JOB

It has networks, their training step, and its time. JOB is a JSON object with the fields of `Job`.
The first line printed is JSON with the versions; then each line read, JSON [peer, steps], is
answered with the seconds that these steps took.

Dimension key: B row, T position in the block, S context position, C context position or persistent
pair, L distance, N persistent pair, H head, K head width, E all heads side by side, D model width,
V vocabulary.
"""

import functools
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLIP = 0.03  # of the step of one tensor, as in configs/base.py


class Job(NamedTuple):
    """What is trained: geometry, batch and threads."""

    depth: int
    width: int
    heads: int
    limit: int
    block: int
    persistent: int
    rows: int
    vocab_size: int
    ramp: int
    threads: int


def log_mask(span_H: Tensor, ramp: int, distance_L: Tensor) -> Tensor:
    """log m(d), as (H, L) (arXiv 1905.07799, eq. 4).

    It is -inf, without a gradient, from where the ramp has ended.
    """
    position_HL = (ramp - distance_L + 1 + span_H[:, None]) / ramp
    return torch.where(position_HL > 0, position_HL.clamp(1e-30, 1).log(), -math.inf)


def skew(by_distance_BHTL: Tensor) -> Tensor:
    """Values by distance, farthest first, moved to the keys that they belong to.

    Keys that have no distance from a query get -inf.
    """
    B, H, T, L = by_distance_BHTL.shape
    # With one column more than there are keys, each row is shifted by one when rows are cut anew.
    shifted_BHTS = F.pad(by_distance_BHTL, (0, T + 1), value=-math.inf)
    return shifted_BHTS.flatten(2)[..., : T * (T + L)].reshape(B, H, T, T + L)


def all_attention(
    query_BHTK,
    key_BHSK,
    value_BHSK,
    position_LK,
    persistent_key_HNK,
    persistent_value_HNK,
    span_H,
    ramp,
):
    """The operation through PyTorch's fused attention.

    Positions and spans are a bias, persistent pairs more keys.

    Args:
      query_BHTK, key_BHSK, value_BHSK: S = T + L.
      position_LK: position keys, nearest first.
      persistent_key_HNK, persistent_value_HNK: used as they are.
      span_H: spans in tokens.
      ramp: length of their soft end.

    Returns:
      out_BHTK.
    """
    B, _, _, K = query_BHTK.shape
    L = position_LK.shape[0]
    N = persistent_key_HNK.shape[1]
    # What depends on the distance alone; persistent pairs have none.
    distance_L = torch.arange(L, 0, -1)
    by_distance_BHTL = (query_BHTK * K**-0.5) @ position_LK.flip(0).T
    bias_BHTL = by_distance_BHTL + log_mask(span_H, ramp, distance_L)[:, None]
    bias_BHTC = F.pad(skew(bias_BHTL), (0, N))
    key_BHCK = torch.cat([key_BHSK, persistent_key_HNK.expand(B, -1, -1, -1)], 2)
    value_BHCK = torch.cat([value_BHSK, persistent_value_HNK.expand(B, -1, -1, -1)], 2)
    return F.scaled_dot_product_attention(query_BHTK, key_BHCK, value_BHCK, attn_mask=bias_BHTC)


class Layer(nn.Module):
    """Our `AllAttention`, with parameters of the same names and shapes."""

    def __init__(self, job: Job):
        super().__init__()
        D = job.width
        H = job.heads
        N = job.persistent
        K = D // H

        def linear(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-(D**-0.5), D**-0.5))

        self.query = linear(D, H, K)
        self.key = linear(D, H, K)
        self.value = linear(D, H, K)
        self.output = linear(H, K, D)
        self.persistent_key = nn.Parameter(torch.randn(H, N, K) / math.sqrt(K))
        self.persistent_value = nn.Parameter(torch.randn(H, N, K) / math.sqrt(N))
        self.span = nn.Parameter(torch.ones(H))
        self.norm_scale = nn.Parameter(torch.ones(D))
        self.norm_bias = nn.Parameter(torch.zeros(D))
        self.job = job

    def forward(self, h_BTD: Tensor, cache_BLD: Tensor, position_LK: Tensor) -> Tensor:
        D, H, K = self.query.shape

        def project(kernel_DHK: Tensor, *states: Tensor) -> Tensor:
            # Cache and block apart, since the cache needs no gradient.
            kernel_DE = kernel_DHK.reshape(D, H * K)
            parts = [(states_BSD @ kernel_DE).unflatten(2, (H, K)) for states_BSD in states]
            return torch.cat(parts, 1).transpose(1, 2)

        out_BHTK = all_attention(
            project(self.query, h_BTD),
            project(self.key, cache_BLD, h_BTD),
            project(self.value, cache_BLD, h_BTD),
            position_LK,
            self.persistent_key * math.sqrt(K),
            self.persistent_value * math.sqrt(self.job.persistent),
            self.span * self.job.limit,
            self.job.ramp,
        )
        out_BTD = out_BHTK.transpose(1, 2).flatten(2) @ self.output.reshape(H * K, D)
        return F.layer_norm(h_BTD + out_BTD, (D,), self.norm_scale, self.norm_bias)


class Network(nn.Module):
    """`allattn.model.Network` in PyTorch, with parameters of the same names and shapes."""

    def __init__(self, job: Job):
        super().__init__()
        V = job.vocab_size
        D = job.width
        bound = D**-0.5
        self.embedding = nn.Parameter(torch.randn(V, D))
        self.kernel = nn.Parameter(torch.empty(V, D).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(V).uniform_(-bound, bound))
        self.position = nn.Parameter(torch.randn(job.limit, D // job.heads))
        self.layers = nn.ModuleList(Layer(job) for _ in range(job.depth))

    def forward(self, tokens_BT: Tensor, memory: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """logits_BTV, and the last inputs of each layer, as many as there were in `memory`."""
        h_BTD = self.embedding[tokens_BT]
        new = []
        for layer, cache_BLD in zip(self.layers, memory, strict=True):
            new.append(torch.cat([cache_BLD, h_BTD.detach()], 1)[:, h_BTD.shape[1] :])
            h_BTD = layer(h_BTD, cache_BLD, self.position)
        return F.linear(h_BTD, self.kernel, self.bias), new


class XTransformers(nn.Module):
    """x-transformers' decoder, as near to the network as its options come."""

    def __init__(self, job: Job, fused: bool):
        super().__init__()
        from x_transformers import Decoder, TransformerWrapper  # benchmarks/flex.py does without

        layers = Decoder(
            dim=job.width,
            depth=job.depth,
            heads=job.heads,
            attn_dim_head=job.width // job.heads,
            only_attn=True,
            pre_norm=False,
            rotary_pos_emb=True,
            attn_num_mem_kv=job.persistent,
            attn_flash=fused,
        )
        self.inner = TransformerWrapper(
            num_tokens=job.vocab_size,
            max_seq_len=job.block,
            max_mem_len=job.limit,
            attn_layers=layers,
        )

    def forward(self, tokens_BT: Tensor, memory: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.inner(tokens_BT, mems=memory, return_mems=True)


PEERS: dict[str, Callable[[Job], nn.Module]] = {
    "torch": Network,
    "x-transformers, fused": functools.partial(XTransformers, fused=True),
    "x-transformers, unfused": functools.partial(XTransformers, fused=False),
}


def update(parameters: list[nn.Parameter], sums: list[Tensor], rate: float) -> None:
    """Adagrad as in `allattn.train.optim.paper_adagrad`; gradients are dropped after it."""
    with torch.no_grad():
        for p, total in zip(parameters, sums, strict=True):
            if p.grad is None:
                continue
            # Clipped tensor by tensor.
            step = rate * min(1.0, CLIP / (float(p.grad.norm()) + 1e-10))
            total.addcmul_(p.grad, p.grad)
            p.addcdiv_(p.grad, total.sqrt() + 1e-10, value=-step)
            p.grad = None


def trainer(network: nn.Module, job: Job) -> Callable[[], None]:
    """A function that makes one update on random text; the rate is 0, as it is for ours."""
    tokens_BT = torch.randint(job.vocab_size, (job.rows, job.block + 1))
    memory = [torch.zeros(job.rows, job.limit, job.width) for _ in range(job.depth)]
    parameters = list(network.parameters())
    sums = [torch.zeros_like(p) for p in parameters]

    def step() -> None:
        logits_BTV, memory[:] = network(tokens_BT[:, :-1], memory)
        F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
        update(parameters, sums, 0.0)

    return step


def main() -> None:
    """Build every peer, then time what is asked for."""
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    steps = {name: trainer(build(job), job) for name, build in PEERS.items()}
    versions: dict[str, Any] = {
        name: importlib.metadata.version(name) for name in ("torch", "x-transformers")
    }
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        name, count = json.loads(line)
        began = time.perf_counter()
        for _ in range(count):
            steps[name]()
        print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
