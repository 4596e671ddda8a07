"""Share of a TPU's matrix rate that the operation reaches, by libtpu's own schedule: needs no TPU.

Command:  python -m benchmarks.schedule [--chips=v5e,v6e] [--widths=64] [--dropout=0.3]
              [--spans=full,zero] [--kinds=operation] [--regions=8]
          (needs libtpu: pip install -e '.[tpu]')

Compiles the operation as a model calls it, forward and backward, for chips that are not here, and
beside it jax's splash attention (over all pairs and causal, without positions, spans, dropout or
persistent pairs) and a plain product. `bundles` says how the cycles of their kernels are counted;
spans are arguments, so one program is counted for all of them. Full spans are L, zero spans leave
the ramp, paper-like spans are the layers of paper_like_spans.json, one after the other.

The share is that of required products (the backward pass: twice the forward's) over what the matrix
units could have done in these cycles. A schedule does not say how long the core waits for
transfers. That is bounded from both sides: `share` has none of them waited for, `at least` has all
of them waited for, one after the other, at the chip's bandwidth. `steps` are points of the grid,
whose own cycles (0.1 to 0.3 thousand each) are in the schedule and counted.

Without flags that choose less, the rows are kept in benchmarks/results. The last line is JSON: of
each chip and spans the shares of the forward pass and of both, at one width and dropout (64 and
0.3, unless others were asked for).

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width, X layer, U unit, M and N sides of a product.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from allattn.attention import all_attention
from allattn.errors import UserError, first_line
from allattn.planning.chips import CHIPS, devices
from benchmarks import attention, bundles
from benchmarks.geometries import GEOMETRIES
from benchmarks.machine import provenance

ROOT = Path(__file__).resolve().parents[1]
PAPER = Path(__file__).with_name("paper_like_spans.json")

# The operation: a layer of this model, also with half as many heads of twice the width.
GEOMETRY = GEOMETRIES["enwik8_small"]
WIDTHS = (64, 128)
DROPOUT = (0.0, 0.3)
SPANS = ("full", "zero", "paper")
KINDS = ("operation", "splash", "causal-splash", "product")

# Splash attention: as many queries as keys, in blocks that were best for it.
SPLASH_LENGTH = 8192
SPLASH_QUERIES = 512
SPLASH_KEYS = 1024

# The product: sides, and those of its blocks.
PRODUCT = 2048
PRODUCT_DEPTH = 2048
PRODUCT_BLOCK = 512


class Core(NamedTuple):
    """What a schedule does not say of a chip; `CHIPS` has the rest."""

    # What one device of JAX is compiled for, and how many cores work as that device.
    topology: str
    cores: int
    # Products of a core in a cycle: FLOP of all matrix units. Times cores and clock that is the
    # chip's published rate; the plain product holds it.
    flops: int
    # Of `bundles.run`.
    branch_slots: int
    granule: int
    # Bytes/s between HBM and the device, from its maker's public tables.
    bandwidth: float


# Four matrix units of 128 x 128; since v6e two of 256 x 256, which take two rows in a cycle.
_FOUR = 4 * 128 * 128 * 2
_TWO = 2 * 256 * 256 * 2 * 2

CORES = {
    "v4": Core("v4:2x2x1", 2, _FOUR, branch_slots=1, granule=512, bandwidth=1228e9),
    "v5e": Core("v5e:2x2", 1, _FOUR, branch_slots=4, granule=32, bandwidth=819e9),
    "v5p": Core("v5p:2x2x1", 2, _FOUR, branch_slots=4, granule=32, bandwidth=2765e9),
    "v6e": Core("v6e:2x2", 1, _TWO, branch_slots=4, granule=32, bandwidth=1638e9),
    "tpu7x": Core("tpu7x:2x2x1", 1, _TWO, branch_slots=6, granule=32, bandwidth=3690e9),
}


# --- what is compiled -----------------------------------------------------------------------------


class Load(NamedTuple):
    """One call of a function: its arguments, and the products that it requires."""

    # Concrete arguments, or their shapes.
    arguments: tuple[Any, ...]
    # FLOP of every kernel's required products.
    flops: dict[str, float]


class Subject(NamedTuple):
    """A function that is compiled, and the calls whose cycles are counted."""

    function: Callable
    # The kernel of each pass.
    kernels: dict[str, str]
    # By the name of the spans: calls, one after the other, and how often each is made.
    loads: dict[str, list[tuple[Load, int]]]


class Case(NamedTuple):
    """What one process compiles."""

    chip: str
    # One of KINDS.
    kind: str
    K: int
    dropout: float


def operation(K: int, dropout: float, spans: Sequence[str], L: int = GEOMETRY.limit) -> Subject:
    """A layer's operation and its gradients, in bfloat16, with L cached positions."""
    _, _, _, T, N = GEOMETRY.of_operation()
    H = GEOMETRY.width // K
    S = T + L

    def gradients(seed: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        def output(*arrays: jax.Array) -> jax.Array:
            options = {"dropout_rate": dropout, "dropout_seed": seed}
            return attention.attend(all_attention, arrays, implementation="pallas_tpu", **options)

        return attention.both(output)(*arrays)

    shapes = [(1, T, H, K), (1, S, H, K), (1, S, H, K), (1, L, K), (H, N, K), (H, N, K)]
    loads: dict[str, list[tuple[Load, int]]] = {name: [] for name in spans}
    for name in spans:
        for span_H, times in _layers(name, L, H):
            arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
            arguments = (jnp.uint32(7), *arrays, jnp.asarray(span_H))
            forward = float(2 * T * K * (3 * np.minimum(span_H + attention.RAMP, L) + 2 * N).sum())
            flops = {"forward": forward, "backward": 2 * forward}
            loads[name].append((Load(arguments, flops), times))
    kernels = {name: f"all_attention_{name}" for name in ("forward", "backward")}
    return Subject(gradients, kernels, loads)


def _layers(name: str, L: int, H: int) -> list[tuple[np.ndarray, int]]:
    """Spans of different layers with H heads, and how many layers have them."""
    if name != "paper":
        return [(attention.spans(name, L, H)[0], 1)]
    # Half as many heads: a layer is two.
    span_XH = attention.spans(str(PAPER), L, GEOMETRY.heads).reshape(-1, H)
    different_XH, times_X = np.unique(span_XH, axis=0, return_counts=True)
    return list(zip(different_XH, times_X.tolist(), strict=True))


def splash(K: int, causal: bool) -> Subject:
    """jax's splash attention and its gradients, in bfloat16, over all pairs or the causal ones."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    H = GEOMETRY.width // K
    S = SPLASH_LENGTH
    # Every pair counts, or those of a query and what came before it.
    name = "full"
    mask: masks.Mask = masks.FullMask((S, S))
    pairs = S * S
    if causal:
        name = "causal"
        mask = masks.CausalMask((S, S))
        pairs = S * (S + 1) // 2
    blocks = kernel.BlockSizes(
        block_q=SPLASH_QUERIES,
        block_kv=SPLASH_KEYS,
        block_kv_compute=SPLASH_KEYS,
        block_q_dkv=SPLASH_QUERIES,
        block_kv_dkv=SPLASH_KEYS,
        block_kv_dkv_compute=SPLASH_KEYS,
        use_fused_bwd_kernel=True,
    )
    attend = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * H), block_sizes=blocks
    )
    gradients = jax.grad(_sum_of(attend), (0, 1, 2))
    # Two products for each.
    forward = float(2 * 2 * K * pairs * H)
    load = Load(
        (jnp.zeros((H, S, K), jnp.bfloat16),) * 3, {"forward": forward, "backward": 2 * forward}
    )
    kernels = {
        "forward": "splash_mha_fwd_residuals",
        "backward": "splash_mha_dkv_no_residuals",
    }
    return Subject(gradients, kernels, {name: [(load, 1)]})


def product() -> Subject:
    """A plain product, block by block, whose share is known: the matrix units do nothing else."""

    def kernel(x_MX: Any, y_XN: Any, out_MN: Any) -> None:
        product_MN = jnp.dot(x_MX[...], y_XN[...], preferred_element_type=jnp.float32)
        out_MN[...] = product_MN.astype(out_MN.dtype)

    def multiply(x_MX: jax.Array, y_XN: jax.Array) -> jax.Array:
        side = PRODUCT // PRODUCT_BLOCK
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((PRODUCT, PRODUCT), jnp.bfloat16),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=0,
                grid=(side, side),
                in_specs=[
                    pl.BlockSpec((PRODUCT_BLOCK, PRODUCT_DEPTH), lambda i, j: (i, 0)),
                    pl.BlockSpec((PRODUCT_DEPTH, PRODUCT_BLOCK), lambda i, j: (0, j)),
                ],
                out_specs=pl.BlockSpec((PRODUCT_BLOCK, PRODUCT_BLOCK), lambda i, j: (i, j)),
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
            name="product",
        )(x_MX, y_XN)

    x_MX = jnp.zeros((PRODUCT, PRODUCT_DEPTH), jnp.bfloat16)
    flops = {"forward": 2.0 * PRODUCT * PRODUCT * PRODUCT_DEPTH}
    load = Load((x_MX, x_MX.T), flops)
    return Subject(multiply, {"forward": "product"}, {"full": [(load, 1)]})


def _sum_of(function: Callable) -> Callable[..., jax.Array]:
    """A function's sum, so that it has gradients."""
    return lambda *arrays: function(*arrays).astype(jnp.float32).sum()


def subject(case: Case, spans: Sequence[str]) -> Subject:
    """What a case compiles."""
    if case.kind == "operation":
        return operation(case.K, case.dropout, spans)
    if case.kind.endswith("splash"):
        return splash(case.K, causal=case.kind.startswith("causal"))
    return product()


# --- compiling ------------------------------------------------------------------------------------


def compile_for(chip: str, found: Subject, folder: Path) -> None:
    """Compile a function for a chip; libtpu writes the schedule into a folder.

    The first of its process: libtpu reads its flags once.
    """
    os.environ["LIBTPU_INIT_ARGS"] = bundles.FLAGS.format(folder=folder)
    mesh = _mesh(chip)
    place = NamedSharding(mesh, PartitionSpec())
    ((load, _), *_), *_ = found.loads.values()
    shapes = [
        jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=place)
        for x in load.arguments
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(found.function).trace(*shapes)
        traced.lower(lowering_platforms=("tpu",)).compile()


def _mesh(chip: str) -> Mesh:
    """A mesh of one device of a chip that is not here."""
    return Mesh(devices(CORES[chip].topology)[:1], ("data",), axis_types=(AxisType.Auto,))


class Call(NamedTuple):
    """What a call of a kernel is told at run time."""

    # Points of the grid.
    steps: int
    # Words of the operands in scalar memory, by their number.
    scalars: dict[int, np.ndarray]


def recorder(
    chip: str, function: Callable, arguments: Sequence[Any]
) -> Callable[..., dict[str, Call]]:
    """A function of the same arguments that returns the calls of kernels, by the kernel's name.

    It is traced as for the chip, but runs here, and every kernel returns zeros.
    """
    found: dict[str, Call] = {}

    def keep(name: str, steps: int, *scalars: np.ndarray) -> None:
        words = {index: bundles.words(np.asarray(x)) for index, x in enumerate(scalars)}
        found[name] = Call(steps, words)

    def pallas_call(_: Any, *, out_shape: Any, grid_spec: Any, name: str, **__: Any) -> Callable:
        steps = int(np.prod(grid_spec.grid))

        def call(*operands: Any) -> Any:
            # Operands that are None are not passed.
            first = operands[: grid_spec.num_scalar_prefetch]
            scalars = [operand for operand in first if operand is not None]
            jax.debug.callback(functools.partial(keep, name, steps), *scalars)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

        return call

    # What was traced with the real kernels must not be used again.
    jax.clear_caches()
    with (
        mock.patch.object(pl, "pallas_call", pallas_call),
        jax.sharding.use_abstract_mesh(_mesh(chip).abstract_mesh),
    ):
        traced = jax.jit(function).trace(*arguments)
    compiled = traced.lower(lowering_platforms=("cpu",)).compile()

    def record(*arguments: Any) -> dict[str, Call]:
        jax.block_until_ready(compiled(*arguments))
        jax.effects_barrier()
        return dict(found)

    return record


# --- counting -------------------------------------------------------------------------------------


def measure(case: Case, spans: Sequence[str], regions: int) -> list[dict[str, Any]]:
    """Compile a case in this process and count its cycles.

    Args:
      case: what is compiled.
      spans: which spans the operation is counted for.
      regions: how many regions of each kernel are listed.

    Returns:
      A row for each pass and spans, or one with an `error`.
    """
    jax.config.update("jax_platforms", "cpu")
    described = {"chip": case.chip, "kind": case.kind, "K": case.K, "dropout": case.dropout}
    with tempfile.TemporaryDirectory() as folder:
        found = subject(case, spans)
        # What a chip cannot compile, such as tiles that are too large, is said in the table; jax
        # and libtpu have many kinds of errors for it.
        try:
            compile_for(case.chip, found, Path(folder))
        except Exception as error:
            return [{**described, "error": first_line(error)[:200]}]
        programs = {
            name: bundles.read(Path(folder), kernel) for name, kernel in found.kernels.items()
        }
    rows = []
    ((first, _), *_), *_ = found.loads.values()
    record = recorder(case.chip, found.function, first.arguments)
    for name, loads in found.loads.items():
        totals = {pass_name: _Total(program) for pass_name, program in programs.items()}
        for load, times in loads:
            made = record(*load.arguments)
            for pass_name, total in totals.items():
                call = made[found.kernels[pass_name]]
                total.add(case.chip, call, load.flops[pass_name], times)
        for pass_name, total in totals.items():
            row = {**described, "spans": name, "pass": pass_name}
            rows.append({**row, **total.row(case.chip, regions)})
    return rows


class _Total:
    """The sum of a kernel's calls."""

    def __init__(self, program: bundles.Program):
        self.program = program
        self.times_X = np.zeros(len(program.used_XU), int)
        self.moved = 0
        self.flops = 0.0
        self.steps = 0

    def add(self, chip: str, call: Call, flops: float, times: int) -> None:
        """Add a call that is made several times."""
        core = CORES[chip]
        # Cores share the grid: the slowest decides.
        counts = [
            bundles.run(self.program, call.scalars, number, core.branch_slots, core.granule)
            for number in range(core.cores)
        ]
        slowest = max(counts, key=lambda count: count.cycles)
        self.times_X += times * slowest.times_X
        # What lies on the chip already was brought there once.
        self.moved += times * (sum(count.moved for count in counts) + self.program.resident)
        self.flops += times * flops
        self.steps += times * call.steps

    def row(self, chip: str, regions: int) -> dict[str, Any]:
        """What the table says."""
        program = self.program
        cycles = int(self.times_X.sum())
        busy_U = self.times_X @ program.used_XU / program.capacity_U / cycles
        found: dict[str, Any] = {
            "cycles": cycles,
            "transfer_cycles": round(self.moved / CORES[chip].bandwidth * clock(chip)),
            "flops": self.flops,
            "moved": self.moved,
            "steps": self.steps,
            "units": dict(zip(program.units, busy_U.round(3).tolist(), strict=True)),
        }
        if regions:
            listed = bundles.regions(program, self.times_X)[:regions]
            found["regions"] = [region._asdict() for region in listed]
        return found


def clock(chip: str) -> float:
    """Cycles in a second, from the chip's published rate."""
    core = CORES[chip]
    return CHIPS[chip].flops / core.flops / core.cores


# --- reporting ------------------------------------------------------------------------------------


def shares(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Share of the chip's matrix rate of some passes, one after the other.

    Args:
      rows: of the passes.

    Returns:
      The share if no transfer is waited for, and if all are.
    """
    core = CORES[rows[0]["chip"]]
    cycles = sum(row["cycles"] for row in rows)
    waiting = sum(row["transfer_cycles"] for row in rows)
    needed = sum(row["flops"] for row in rows) / core.flops / core.cores
    return needed / cycles, needed / (cycles + waiting)


def groups(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every pass, and both together, of everything that was counted."""
    for forward in rows:
        if forward.get("pass") != "forward":
            continue
        yield "forward", [forward]
        same = ("chip", "kind", "K", "dropout", "spans")
        for row in rows:
            if row.get("pass") == "backward" and all(row[name] == forward[name] for name in same):
                yield "backward", [row]
                yield "both", [forward, row]


COLUMNS = ("chip", "what", "K", "dropout", "spans", "pass", "Mcycles", "share", "at least")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    measured = [row for row in rows if "error" not in row]
    units = [unit for row in measured[:1] for unit in row["units"]]
    # Fills and spills are a part of loads and stores.
    names = [*COLUMNS, *(unit.split(":")[-1] for unit in units), "MB", "steps"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, group in groups(measured):
        lines.append(f"| {' | '.join(_cells(name, group))} |")
    for row in rows:
        if "error" in row:
            what = [row["chip"], row["kind"], str(row["K"]), str(row["dropout"]), row["error"]]
            lines.append(f"| {' | '.join(what)} |")
    return "\n".join(lines)


def _cells(name: str, group: Sequence[dict[str, Any]]) -> list[str]:
    """The cells of one pass, or of both."""
    first = group[0]
    cycles = sum(row["cycles"] for row in group)
    share, at_least = shares(group)
    busy = [
        sum(row["units"][unit] * row["cycles"] for row in group) / cycles for unit in first["units"]
    ]
    return [
        first["chip"],
        first["kind"],
        str(first["K"]),
        str(first["dropout"]),
        first["spans"],
        name,
        f"{cycles / 1e6:.3f}",
        f"{share:.3f}",
        f"{at_least:.3f}",
        *(f"{used:.2f}" for used in busy),
        f"{sum(row['moved'] for row in group) / 1e6:.1f}",
        f"{sum(row['steps'] for row in group)}",
    ]


def summary(rows: Sequence[dict[str, Any]], K: int, dropout: float) -> dict[str, Any]:
    """Shares of the operation: chip, then spans, then forward and both."""
    found: dict[str, Any] = {}
    chosen = [
        row
        for row in rows
        if row["kind"] == "operation" and row["K"] == K and row["dropout"] == dropout
    ]
    for name, group in groups(chosen):
        if name != "backward":
            spans = found.setdefault(group[0]["chip"], {}).setdefault(group[0]["spans"], {})
            spans[name] = round(shares(group)[0], 4)
    return found


def paper_costs(rows: Sequence[dict[str, Any]]) -> str:
    """What spans that differ cost: cycles over their part of those of full spans, a line each."""
    cycles: dict[tuple, dict[str, float]] = {}
    for name, group in groups(rows):
        first = group[0]
        if first["kind"] == "operation" and name == "both":
            case = (first["chip"], first["K"], first["dropout"])
            flops = sum(row["flops"] for row in group)
            found = cycles.setdefault(case, {})
            found[first["spans"]] = sum(row["cycles"] for row in group) / flops
    return "\n".join(
        f"- {chip}, K {K}, dropout {dropout}: paper-like spans take "
        f"{per_flop['paper'] / per_flop['full']:.2f} x their share of the cycles of full spans"
        for (chip, K, dropout), per_flop in cycles.items()
        if {"paper", "full"} <= set(per_flop)
    )


def listing(rows: Sequence[dict[str, Any]]) -> str:
    """The regions of every kernel, if they were asked for."""
    lines = []
    for row in rows:
        if "regions" not in row:
            continue
        names = ("chip", "kind", "K", "dropout", "spans", "pass")
        lines.append(f"\n{' '.join(str(row[name]) for name in names)}: bundles x times")
        for region in row["regions"]:
            place = f"{region['first']:6} {region['bundles']:5} x {region['times']:<6}"
            busy = "  ".join(f"{unit} {used:.2f}" for unit, used in region["units"].items())
            lines.append(f"{place} {100 * region['share']:5.1f} %  {busy}")
    return "\n".join(lines)


def report(rows: Sequence[dict[str, Any]], here: dict[str, str]) -> str:
    """The page of results."""
    versions = f"{here['commit']}, jax {here['jax']}, libtpu {here['libtpu']}"
    return (
        f"# The TPU kernels by libtpu's schedule, {here['date']}\n\n"
        f"By `python -m benchmarks.schedule` at {versions}. No TPU was used; the head of "
        "`benchmarks/schedule.py` says what the columns mean, and what a schedule cannot say: "
        "how long the core waits for transfers, which lies between `share` and `at least`.\n\n"
        f"{table(rows)}\n\nForward and backward:\n\n{paper_costs(rows)}\n"
    )


# --- the command ----------------------------------------------------------------------------------


def cases(arguments: argparse.Namespace) -> list[Case]:
    """What is compiled, the slowest first."""
    found = []
    for kind, chip, K in itertools.product(KINDS, arguments.chips, arguments.widths):
        # What has no dropout, or no heads, is compiled once.
        rates = [0.0]
        if kind == "operation":
            rates = arguments.dropout
        if kind == "product":
            K = PRODUCT_DEPTH
        found += [Case(chip, kind, K, dropout) for dropout in rates]
    return [case for case in dict.fromkeys(found) if case.kind in arguments.kinds]


def count(
    cases: Sequence[Case], spans: Sequence[str], regions: int = 0, workers: int = 2
) -> list[dict[str, Any]]:
    """The rows of all cases, in their order; each case has a process of its own.

    Args:
      cases: what is compiled.
      spans: which spans the operation is counted for.
      regions: how many regions of each kernel are listed.
      workers: processes beside each other.
    """
    work = functools.partial(measure, spans=spans, regions=regions)
    rows = []
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for case, found in zip(cases, pool.map(work, cases), strict=True):
            rows += found
            print(*case, found[0].get("error", "counted"), file=sys.stderr, flush=True)
    return rows


def listed(known: Sequence[Any]) -> Callable[[str], list[Any]]:
    """A reader of a flag's list, each of what is known."""

    def read(text: str) -> list[Any]:
        found = [type(known[0])(word) for word in text.split(",")]
        unknown = [word for word in found if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(map(str, known))}, found {text}"
            )
        return found

    return read


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", type=listed(KINDS), default=list(KINDS))
    parser.add_argument("--chips", type=listed(list(CORES)), default=list(CORES))
    parser.add_argument("--widths", type=listed(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--dropout", type=listed(DROPOUT), default=list(DROPOUT))
    parser.add_argument("--spans", type=listed(SPANS), default=list(SPANS))
    parser.add_argument("--regions", type=int, default=0, help="listed of each kernel")
    parser.add_argument("--workers", type=int, default=2, help="that compile beside each other")
    parser.add_argument("--output", type=Path, help="where the rows are kept")
    return parser.parse_args()


def require_libtpu() -> None:
    """Make JAX and libtpu ready to compile for chips that are not here.

    Raises:
      UserError: there is no libtpu.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("expected libtpu (pip install -e '.[tpu]'), found none")
    # Whatever is here, it is only described; and libtpu says only what went wrong.
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(TPU_STDERR_LOG_LEVEL="3", TPU_MIN_LOG_LEVEL="3", TF_CPP_MIN_LOG_LEVEL="3")


def main() -> int:
    """Compile and count all cases; print the table, then a line of JSON."""
    arguments = _arguments()
    require_libtpu()
    # Asked once: the workers take the code as it is now.
    here = {**provenance(), "libtpu": importlib.metadata.version("libtpu")}
    rows = count(cases(arguments), arguments.spans, arguments.regions, arguments.workers)

    # A whole table is kept.
    parts = (arguments.kinds, arguments.chips, arguments.widths, arguments.dropout, arguments.spans)
    known = (KINDS, CORES, WIDTHS, DROPOUT, SPANS)
    whole = [len(words) for words in parts] == [len(words) for words in known]
    file = arguments.output
    if whole and not file:
        file = ROOT / "benchmarks" / "results" / f"{here['date']}-tpu-schedule.jsonl"
    if file:
        lines = [json.dumps({**row, **here}) + "\n" for row in rows]
        file.write_text("".join(lines), encoding="utf8")
        file.with_suffix(".md").write_text(report(rows, here), encoding="utf8")

    print(table(rows))
    print(listing(rows))
    print(paper_costs(rows))
    print(json.dumps(summary(rows, arguments.widths[0], arguments.dropout[-1])))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: benchmarks.schedule: {error}", file=sys.stderr)
        sys.exit(2)
