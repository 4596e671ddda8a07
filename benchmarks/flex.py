"""The operation written with PyTorch's FlexAttention, forward and with its gradients, on a GPU.

Command:  python -m benchmarks.flex --geometry=enwik8_small --rows=64 --dtype=bfloat16 --spans=full

It does the same job: persistent pairs are further keys, positions and the soft span are a score
modification, the band and the spans' ends are a block mask, so blocks outside a head's reach are
skipped. It differs in two things: dropout is not to be had (FlexAttention has none), and
query.position lies in memory as B T H L float32 numbers, its gradient as well, since a score
modification cannot multiply by a table. The block mask is computed once, not at each call. Last
line: JSON as benchmarks/attention.py prints it; share counts the same required products.

Dimension key: B batch, T query position, S context key, C context key or persistent pair, L
distance, N persistent pair, H head, K head width.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks import machine
from benchmarks.attention import RAMP, required_flops, spans
from benchmarks.geometries import GEOMETRIES, OPERATIONS
from benchmarks.peers_torch import log_mask


def block_mask(span_H: Tensor, ramp: int, T: int, L: int, N: int) -> BlockMask:
    """Which blocks of (T, C) a head needs.

    Distances from 1 to L within its span and ramp, and the persistent pairs.
    """

    def counts(b, h, t, c):
        distance = L + t - c
        in_reach = (distance >= 1) & (distance <= L) & (distance < span_H[h] + ramp + 1)
        return in_reach | (c >= T + L)

    return create_block_mask(counts, None, len(span_H), T, T + L + N, device=span_H.device)


def all_attention(
    query_BHTK: Tensor,
    key_BHSK: Tensor,
    value_BHSK: Tensor,
    position_LK: Tensor,
    persistent_key_HNK: Tensor,
    persistent_value_HNK: Tensor,
    span_H: Tensor,
    *,
    ramp: int,
    mask: BlockMask,
    attention: Callable[..., Any],
) -> Tensor:
    """`allattn.attention.all_attention` for S = T + L, by FlexAttention.

    Args:
      query_BHTK, key_BHSK, value_BHSK: S = T + L.
      position_LK: position keys, nearest first.
      persistent_key_HNK, persistent_value_HNK: used as they are.
      span_H: spans in tokens.
      ramp: length of their soft end.
      mask: the blocks to compute.
      attention: flex_attention, compiled or not.

    Returns:
      out_BHTK.
    """
    B, _, _, K = query_BHTK.shape
    S = key_BHSK.shape[2]
    L = position_LK.shape[0]
    # What depends on the distance alone. In float32, since gradients are added to it atomically.
    by_distance_BHTL = ((query_BHTK * K**-0.5) @ position_LK.T).float()
    distance_L = torch.arange(1, L + 1, device=span_H.device)
    bias_BHTL = by_distance_BHTL + log_mask(span_H, ramp, distance_L)[:, None]

    def score(logit, b, h, t, c):
        # Persistent pairs read any row and use none: different ones, so that the atomic additions
        # of their gradients do not meet at one address.
        row = (L + t - c - 1) % L
        return torch.where(c < S, logit + bias_BHTL[b, h, t, row], logit)

    key_BHCK = torch.cat([key_BHSK, persistent_key_HNK.expand(B, -1, -1, -1)], 2)
    value_BHCK = torch.cat([value_BHSK, persistent_value_HNK.expand(B, -1, -1, -1)], 2)
    return attention(query_BHTK, key_BHCK, value_BHCK, score_mod=score, block_mask=mask)


def inputs(arguments: argparse.Namespace) -> list[Tensor]:
    """Random query, key, value, position table, persistent keys and values."""
    H, K, L, T, N = GEOMETRIES[arguments.geometry].of_operation()
    B = arguments.rows
    shapes = [(B, H, T, K), (B, H, T + L, K), (B, H, T + L, K), (L, K), (H, N, K), (H, N, K)]
    dtype = getattr(torch, arguments.dtype)
    return [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes]


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call; the first compiles and does not count."""

    def finished() -> None:
        run()
        torch.cuda.synchronize()

    return statistics.median([machine.seconds(finished) for _ in range(repeats + 1)][1:])


def matmul_gflops(dtype: str) -> float:
    """Rate of a square matrix product, as `machine.matmul_gflops`, by PyTorch."""
    size = 8192
    x = torch.randn(size, size, dtype=getattr(torch, dtype), device="cuda")
    return 2 * size**3 / seconds(lambda: x @ x, 10) / 1e9


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians between two measurements of the matrix product."""
    H, _, L, T, N = GEOMETRIES[arguments.geometry].of_operation()
    span_XH = spans(arguments.spans, L, H)
    span_H = torch.tensor(span_XH[0], device="cuda", requires_grad=True)
    arrays = [*inputs(arguments), span_H]
    mask = block_mask(span_H.detach(), RAMP, T, L, N)
    attention = torch.compile(flex_attention, dynamic=False)

    def run() -> Tensor:
        return all_attention(*arrays, ramp=RAMP, mask=mask, attention=attention)

    # Forward, then forward with the gradients.
    before = matmul_gflops(arguments.dtype)
    with torch.no_grad():
        forward = seconds(run, arguments.repeats)
    both = seconds(lambda: torch.autograd.grad(run().float().sum(), arrays), arguments.repeats)
    after = matmul_gflops(arguments.dtype)

    rate = (before + after) / 2 * 1e9
    flops = required_flops(arguments, span_XH)
    return {
        "geometry": arguments.geometry,
        "spans": arguments.spans,
        "rows": arguments.rows,
        "dropout": 0.0,
        "dtype": arguments.dtype,
        "implementation": "FlexAttention",
        "forward_ms": round(forward * 1e3, 2),
        "both_ms": round(both * 1e3, 2),
        "matmul_gflops": [round(before, 1), round(after, 1)],
        "share_forward": round(flops / forward / rate, 4),
        "share_both": round(3 * flops / both / rate, 4),
        **machine.provenance(),
        "devices": f"1 {torch.cuda.get_device_name()}",  # JAX sees none here
        "torch": torch.__version__,
    }


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--geometry", choices=OPERATIONS, default="enwik8_small")
    found.add_argument("--spans", choices=("full", "zero"), default="full")
    found.add_argument("--rows", type=int, default=64, help="B")
    found.add_argument("--dtype", default="bfloat16")
    found.add_argument("--repeats", type=int, default=9)
    return found


def main() -> None:
    """Parse the flags, measure, print."""
    arguments = parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "FlexAttention: expected a GPU that PyTorch sees, since its backward pass needs one, "
            "found none"
        )
    jax.config.update("jax_platforms", "cpu")  # the GPU's memory is PyTorch's
    print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
