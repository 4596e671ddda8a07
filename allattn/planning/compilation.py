"""The real training step compiled for machines that are not here: memory, FLOPs, collectives, and what must not be.

Dimension key: B batch, T position in the block.
"""

import contextlib
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from allattn import data, sharding, train
from allattn.errors import UserError
from allattn.model import forward_flops
from allattn.model.parameters import parameter_count
from allattn.planning import chips, collectives, communication

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of a step that was compiled."""

    name: str  # of the configuration
    topology: str
    slices: int
    mesh: dict[str, int]
    batch: int
    parameters: int
    memory: dict[
        str, float
    ]  # bytes of one device: arguments, temporaries, outputs that replace none; {}: not known
    hbm: float  # bytes that a device has
    flops: float  # of a step on all devices: required products, full spans
    uses: list[communication.Use]  # what its collectives are for
    broken: list[str]  # what it sends that it must not
    overflow: str  # what the compiler said if memory did not suffice

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def used(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return not self.overflow and self.used <= self.hbm


# --- compiling
#
#
# ---------------------------------------------------------------------------------------------------


def compile_step(
    config: ml_collections.ConfigDict, name: str, machine: str, slices: int = 1
) -> Compiled:
    """Compile the training step of the largest context bucket; neither data nor accelerators are needed.

    Args:
      config: the whole configuration; its mesh is over all devices of the machine.
      name: what to call it.
      machine: a topology, such as `v5e:16x16` or `h100:8`.
      slices: how many of it, which the mesh's axis `data` spans.

    Raises:
      UserError: an unknown topology, no compiler for it, or a configuration that does not fit the
        mesh.
    """
    if not config.model.vocab_size:
        raise UserError("model.vocab_size: expected a size, as no data are read here, found 0")
    train.check(config)
    chip, mesh = chips.chip(machine), sharding.make_mesh(config, chips.devices(machine, slices))
    program = train.TrainProgram(config, mesh)
    compiled, overflow = _compile(lower_step(program, "tpu" if chip.platform == "tpu" else "cuda"))
    params = jax.eval_shape(program.model.init, jax.random.key(0))
    parameters, tokens = (
        parameter_count(params),
        config.train.batch * config.train.block,
    )
    flops = (
        3
        * forward_flops(program.model.config, config.model.span.limit, config.train.block)
        * tokens
    )
    found = collectives.collectives(compiled.as_text() or "") if compiled else []
    if slices == 1:
        uses = communication.judge(found, program)
        broken = communication.violations(uses, program)
    # there the compiler has rewritten the sums beyond recognition; one slice is judged in their
    # place
    else:
        one, far = (
            compile_step(_of_one(config, mesh, slices), name, machine),
            communication.between_slices(found),
        )
        uses, broken = far + one.uses, communication.violations_between(far, one.uses) + one.broken
    known = (name, machine, slices, dict(mesh.shape), config.train.batch, parameters)
    return Compiled(*known, memory(compiled), chip.memory, flops, uses, broken, overflow)


def _of_one(
    config: ml_collections.ConfigDict, mesh: Mesh, slices: int
) -> ml_collections.ConfigDict:
    """The configuration of one slice's share of rows."""
    config = config.copy_and_resolve_references()
    config.train.batch //= slices
    config.mesh.data = mesh.shape["data"] // slices
    return config


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str]:
    """The program, or what a TPU's compiler says where memory does not suffice."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(
            r"total memory required .*? exceeds available HBM \(\S+\)|Used \S+ of \S+ hbm",
            str(error),
        )
        return None, needed[0] if needed else " ".join(str(error).split())[:200]


def memory(compiled: jax.stages.Compiled | None) -> dict[str, float]:
    """Bytes of one device: arguments, temporaries, outputs that replace none; {} where the compiler does not say."""
    sizes = compiled.memory_analysis() if compiled else None
    if sizes is None:
        return {}
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "outputs": outputs,
    }


def lower_step(
    program: train.TrainProgram, platform: str | None = None, bucket: int | None = None
) -> jax.stages.Lowered:
    """The step of a context bucket, traced for the devices of the program's mesh.

    Args:
      program: the run's program.
      platform: tpu or cuda, of devices that are not here; None: those are.
      bucket: in tokens; None: the largest.
    """
    train_config, mesh = program.config.train, program.mesh
    row = sharding.row_sharding(mesh)
    tokens_BT = jax.ShapeDtypeStruct(
        (train_config.batch, train_config.block), jnp.int32, sharding=row
    )
    batch = data.Batch(tokens_BT, tokens_BT, jax.ShapeDtypeStruct((), jnp.int32))
    bucket = bucket or program.config.model.span.limit
    # the kind of device decides which kernels are traced
    described = (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if platform else contextlib.nullcontext()
    )
    with described:
        traced = program.jitted_step(bucket).trace(program.abstract_state(bucket), batch)
        return traced.lower(lowering_platforms=(platform,)) if platform else traced.lower()


# --- saying it
#
#
# ---------------------------------------------------------------------------------------------------


def advice(found: Compiled, config: ml_collections.ConfigDict) -> str:
    """The first setting to change where a step does not fit."""
    train_config, mesh = config.train, found.mesh
    rows = found.batch // (mesh["data"] * mesh["fsdp"] * train_config.accumulation)
    if rows > 1:
        parts = next(n for n in range(2, rows + 1) if rows % n == 0)
        return f"--config.train.accumulation={train_config.accumulation * parts}"
    if train_config.remat != "layer":
        return f"--config.train.remat={'layer' if train_config.remat else 'projections'}"
    if mesh["data"] > 1:
        return f"--config.mesh.fsdp={mesh['fsdp'] * mesh['data']}, which splits parameters and optimizer state"
    return "a chip with more memory"


def report(found: Compiled, config: ml_collections.ConfigDict) -> str:
    """What `allattn compile` prints."""
    mesh, devices = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items()), found.devices
    slices = f"{found.slices} x " if found.slices > 1 else ""
    sizes = (
        ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.memory.items())
        or found.overflow
    )
    together = f"; together {found.used / GIB:.2f} of {found.hbm / GIB:.0f}" if found.memory else ""
    lines = [
        f"{found.name}, {found.parameters:,} parameters, batch {found.batch}, on {slices}{found.topology}: {mesh}",
        f"memory of a device in GiB: {sizes}{together}",
        f"required products of a step, full spans: {found.flops:.3g} FLOP, of a device {found.flops / devices:.3g}",
    ]
    lines += (
        ["collectives of a step: bytes of the whole arrays", *communication.table(found.uses)]
        if found.uses
        else []
    )
    lines += [f"must not be: {line}" for line in found.broken]
    if not found.fits:
        lines.append(f"does not fit; change: {advice(found, config)}")
    else:
        lines.append("fits, but for what must not be" if found.broken else "fits")
    return "\n".join(lines)
