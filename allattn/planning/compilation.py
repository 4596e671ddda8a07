"""The real training step compiled for a machine that is not here: memory, FLOPs and collectives.

`compile_step` traces the step as a run does, with the kernel, the sharding and the longest context,
and compiles it for the devices that `chips.devices` describes. `report` is the text that `allattn
compile` prints of it.

Dimension key: B batch, T position in the block.
"""

import contextlib
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from allattn import data, sharding, train
from allattn.errors import UserError
from allattn.model import forward_flops
from allattn.model.parameters import parameter_count
from allattn.planning import chips, collectives, communication
from allattn.planning.communication import ClassifiedCollective

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What is known of a step that was compiled."""

    # The configuration, the machine and how many slices of it.
    name: str
    topology: str
    slices: int

    # Sizes of the mesh's axes, rows of the batch, numbers in all parameters.
    mesh: dict[str, int]
    batch: int
    parameters: int

    # Bytes of one device: arguments, temporaries, outputs that replace none; {}: not known.
    memory: dict[str, float]

    # Bytes that a device has.
    hbm: float

    # Required products of a step on all devices, with full spans.
    flops: float

    # What the step sends, and the collectives that no rule allows, a line each.
    collectives: list[ClassifiedCollective]
    unexpected: list[str]

    # What the compiler said if memory did not suffice; "" if it did.
    overflow: str

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def used(self) -> float:
        """Bytes of one device that the step needs."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a device."""
        return not self.overflow and self.used <= self.hbm


# --- compiling -----------------------------------------------------------------------------------


def compile_step(
    config: ml_collections.ConfigDict, name: str, machine: str, slices: int = 1
) -> Compiled:
    """Compile the training step of the longest context; needs neither data nor accelerators.

    Args:
      config: the whole configuration; its mesh is over all devices of the machine.
      name: what to call it.
      machine: a topology, such as `v5e:16x16` or `h100:8`.
      slices: how many of it, which the mesh's axis `data` spans.

    Raises:
      UserError: an unknown topology, no compiler for it, or a configuration that does not fit the
        mesh.
    """
    # What a run would refuse is refused here, before anything is traced.
    if not config.model.vocab_size:
        raise UserError("model.vocab_size: expected a size, as no data are read here, found 0")
    train.check(config)
    chip = chips.chip(machine)
    mesh = sharding.make_mesh(config, chips.devices(machine, slices))

    # The step, for the machine's compiler.
    program = train.TrainProgram(config, mesh)
    platform = "tpu" if chip.platform == "tpu" else "cuda"
    compiled, overflow = _compile(lower_step(program, platform))

    # What it sends. A step that does not fit has no text.
    text = compiled.as_text() if compiled else None
    sent = collectives.parse(text or "") if compiled else []
    if slices == 1:
        classified = communication.classify(sent, program)
        unexpected = communication.unexpected(classified, program)
    else:
        # The compiler rewrites the sums within a slice beyond recognition, so these are read from
        # the program that one slice would run with its share of the rows.
        one_slice = compile_step(_share_of_one_slice(config, mesh, slices), name, machine)
        between = communication.classify_between_slices(sent)
        classified = between + one_slice.collectives
        unexpected = communication.unexpected_between_slices(between, one_slice.collectives)
        unexpected = unexpected + one_slice.unexpected

    parameters = jax.eval_shape(program.model.init, jax.random.key(0))
    return Compiled(
        name=name,
        topology=machine,
        slices=slices,
        mesh=dict(mesh.shape),
        batch=config.train.batch,
        parameters=parameter_count(parameters),
        memory=memory(compiled),
        hbm=chip.memory,
        flops=_required_flops(program),
        collectives=classified,
        unexpected=unexpected,
        overflow=overflow,
    )


def lower_step(
    program: train.TrainProgram, platform: str | None = None, context_length: int | None = None
) -> jax.stages.Lowered:
    """The training step, traced for the devices of the program's mesh.

    Args:
      program: the run's program.
      platform: tpu or cuda, of devices that are not here; None: those are.
      context_length: in tokens; None: the longest.
    """
    train_config = program.config.train
    if context_length is None:
        context_length = program.config.model.span.limit
    # A batch of the run's shape, split over its rows.
    shape = (train_config.batch, train_config.block)
    row_sharding = sharding.row_sharding(program.mesh)
    tokens_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=row_sharding)
    batch = data.Batch(tokens_BT, tokens_BT, jax.ShapeDtypeStruct((), jnp.int32))
    # The kind of device decides which kernels are traced.
    described: Any = contextlib.nullcontext()
    options: dict[str, Any] = {}
    if platform is not None:
        described = jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh)
        options["lowering_platforms"] = (platform,)
    with described:
        step = program.jitted_step(context_length)
        traced = step.trace(program.abstract_state(context_length), batch)
        return traced.lower(**options)


def memory(compiled: jax.stages.Compiled | None) -> dict[str, float]:
    """Memory of one device, as the compiler has planned it.

    Args:
      compiled: a program; None: it did not fit.

    Returns:
      Bytes of arguments, of temporaries, and of outputs that take no argument's memory; {} where
      the compiler does not say.
    """
    sizes = compiled.memory_analysis() if compiled else None
    if sizes is None:
        return {}
    return {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "outputs": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    }


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str]:
    """The compiled program and "", or None and what the compiler says of too little memory."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
    # A TPU's compiler names the bytes it would need, in one of two sentences.
    needed = re.search(
        r"total memory required .*? exceeds available HBM \(\S+\)|Used \S+ of \S+ hbm", text
    )
    if needed:
        return None, needed[0]
    return None, " ".join(text.split())[:200]


def _share_of_one_slice(
    config: ml_collections.ConfigDict, mesh: Mesh, slices: int
) -> ml_collections.ConfigDict:
    """The configuration with which one slice trains its share of the rows."""
    config = config.copy_and_resolve_references()
    config.train.batch //= slices
    config.mesh.data = mesh.shape["data"] // slices
    return config


def _required_flops(program: train.TrainProgram) -> float:
    """Required products of a step with full spans; a backward pass has twice those of a forward."""
    config = program.config
    tokens = config.train.batch * config.train.block
    per_token = forward_flops(program.model.config, config.model.span.limit, config.train.block)
    return 3 * per_token * tokens


# --- reporting -----------------------------------------------------------------------------------


def report(step: Compiled, config: ml_collections.ConfigDict) -> str:
    """The text that `allattn compile` prints.

    Args:
      step: from `compile_step`.
      config: the configuration that it was compiled for.
    """
    lines = [
        f"{step.name}, {step.parameters:,} parameters, batch {step.batch}, on {_machine(step)}",
        f"memory of a device in GiB: {_memory_text(step)}",
        f"required products of a step, full spans: {step.flops:.3g} FLOP, "
        f"of a device {step.flops / step.devices:.3g}",
    ]
    if step.collectives:
        lines.append("collectives of a step: bytes of the whole arrays")
        lines += communication.table(step.collectives)
    lines += [f"unexpected: {line}" for line in step.unexpected]
    # The last line is the answer.
    if not step.fits:
        lines.append(f"does not fit; change: {advice(step, config)}")
    elif step.unexpected:
        lines.append("fits, but sends what is unexpected")
    else:
        lines.append("fits")
    return "\n".join(lines)


def advice(step: Compiled, config: ml_collections.ConfigDict) -> str:
    """The first setting to change where a step does not fit."""
    train_config = config.train
    mesh = step.mesh
    rows = step.batch // (mesh["data"] * mesh["fsdp"] * train_config.accumulation)
    # Fewer rows at once cost the least: the smallest number of further parts that divides them.
    if rows > 1:
        parts = next(n for n in range(2, rows + 1) if rows % n == 0)
        return f"--config.train.accumulation={train_config.accumulation * parts}"
    # Then recomputing, of projections first, where that is not done anyway, and of layers next.
    platform = chips.chip(step.topology).platform
    again = train.recomputation(config, config.model.span.limit, platform)
    if again != "layer":
        remat = "layer" if again else "projections"
        return f"--config.train.remat={remat}"
    # Then splitting parameters, which costs communication.
    if mesh["data"] > 1:
        fsdp = mesh["fsdp"] * mesh["data"]
        return f"--config.mesh.fsdp={fsdp}, which splits parameters and optimizer state"
    return "a chip with more memory"


def _machine(step: Compiled) -> str:
    """The machine and the mesh on it, as in `2 x v5e:16x16: data 64 x fsdp 1 x tensor 8`."""
    slices = f"{step.slices} x " if step.slices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in step.mesh.items())
    return f"{slices}{step.topology}: {mesh}"


def _memory_text(step: Compiled) -> str:
    """The parts of a device's memory beside what it has, or what the compiler said."""
    if not step.memory:
        return step.overflow
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in step.memory.items())
    return f"{sizes}; together {step.used / GIB:.2f} of {step.hbm / GIB:.0f}"
