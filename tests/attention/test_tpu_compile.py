"""The TPU kernels compiled to machine code by libtpu, for chips that need not be here: `make
test-tpu-compile`.

Dimension key: B batch, T query position, S context key, D model width, H head, K head width.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import notebook_programs
import pytest
from attention_cases import GEOMETRIES, arrays, call, options
from jax.sharding import AbstractDevice, AxisType, Mesh, NamedSharding, PartitionSpec

from allattn import config
from allattn.model.reach_projection import project
from allattn.planning import communication, compilation
from allattn.planning.chips import chip as known
from allattn.planning.chips import devices

pytest.importorskip("libtpu", reason="libtpu is not installed: make test-tpu-compile installs it")
TOPOLOGIES = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def device(topology: str) -> Any:
    """The first chip of a topology."""
    return devices(topology)[0]


def compiled(chip: Any, run: Any, *shapes: Any, donated: tuple[int, ...] = ()) -> str:
    """The text of a function compiled for a chip; arguments that are donated may be written in
    place.
    """
    place = NamedSharding(Mesh([chip], ("data",), axis_types=(AxisType.Auto,)), PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    described = AbstractDevice(device_kind=chip.device_kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=described
    )
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = (
            jax.jit(run, donate_argnums=donated).trace(*placed).lower(lowering_platforms=("tpu",))
        )
    return lowered.compile().as_text()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_generation_reads_the_cache_where_it_lies(topology: str) -> None:
    """One token is written into a cache with slack, at a place known at run time, and read: no copy
    of the cache.
    """
    case = dataclasses.replace(GEOMETRIES["enwik8_small"], B=1, T=1, S=8448, dropout=0.0)
    shapes = jax.eval_shape(lambda: arrays(case, jnp.bfloat16))
    E = case.H * case.K
    cache = [jax.ShapeDtypeStruct((1, case.S, E), jnp.bfloat16)] * 2  # as `KeyValue` keeps them
    new = shapes.pop("query")
    position = jax.ShapeDtypeStruct((), jnp.int32)
    del shapes["key"], shapes["value"]

    def run(cache: list, inputs: dict[str, Any], new_BTHK: jax.Array, position: jax.Array) -> Any:
        new_BTE = new_BTHK.reshape(1, 1, E)
        cache = [
            jax.lax.dynamic_update_slice_in_dim(old_BSE, new_BTE, position, 1) for old_BSE in cache
        ]
        key, value = (x_BSE.reshape(1, case.S, case.H, case.K) for x_BSE in cache)
        options = {"query_start": position, "ramp": case.ramp, "implementation": "pallas_tpu"}
        return cache, call({"query": new_BTHK, "key": key, "value": value, **inputs}, **options)

    text = compiled(device(topology), run, cache, shapes, new, position, donated=(0,))
    shape = rf"\w+\[1,{case.S},(?:{E}|{case.H},{case.K})\]"
    assert re.search(shape, text) and re.search(r"%all_attention_\w+\.\d+ = ", text)
    assert not re.findall(rf"%[\w.]+ = {shape}\S* (?:copy|transpose)\(", text)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_compiles(name: str, topology: str) -> None:
    """Projection and operation, forward and backward: they fit, and keys are never laid out anew
    between them.
    """
    chip = device(topology)
    case = GEOMETRIES[name]
    shapes = jax.eval_shape(lambda: arrays(case, jnp.bfloat16))
    D = case.H * case.K
    kernel_DHK = jax.ShapeDtypeStruct((D, case.H, case.K), jnp.bfloat16)
    shapes["key"] = shapes["value"] = kernel_DHK
    shapes["states_BSD"] = jax.ShapeDtypeStruct((case.B, case.S, D), jnp.bfloat16)

    def loss(inputs: dict[str, Any]) -> jax.Array:
        states_BSD = inputs["states_BSD"]
        inputs = {k: x for k, x in inputs.items() if k != "states_BSD"}
        inputs |= {name: project(inputs[name], states_BSD) for name in ("key", "value")}
        return call(inputs, implementation="pallas_tpu", **options(case)).astype(jnp.float32).sum()

    text = compiled(chip, jax.grad(loss), shapes)
    calls = [line for line in text.splitlines() if re.search(r"%all_attention_\w+\.\d+ = ", line)]
    assert len(calls) == 2
    vmem = [
        int(re.search(r'"used_scoped_memory_configs":\[{[^]]*"size":"(\d+)"', line)[1])
        for line in calls
    ]
    print(
        f"{name} on {chip.device_kind}: VMEM forward {vmem[0] / 2**20:.1f} MiB, "
        f"backward {vmem[1] / 2**20:.1f} MiB"
    )
    if 128 % case.K:  # such heads are padded to whole lanes, which is a copy
        return
    shape = rf"\w+\[{case.B},{case.S},(?:{D}|{case.H},{case.K})\]"
    layout = dict(re.findall(rf"(%[\w.]+) = {shape}{{([\d,]+)", text))
    moved = re.findall(rf"(%[\w.]+) = {shape}\S+ (?:copy|transpose)\((%[\w.]+)", text)
    assert layout and not [names for names in moved if layout[names[0]] != layout.get(names[1])]


def test_kernels_that_go_round_a_ring() -> None:
    """On a mesh that is all fsdp a TPU sends parts of kernels on while it multiplies: gathers, as
    many as it needs.
    """
    changes = {"model.depth": "2", "mesh.fsdp": "16"}
    c = config.load(str(Path(__file__).parents[2] / "configs" / "enwik8_xl_large.py"), changes)
    found = compilation.compile_step(c, "enwik8_xl_large", "v5e:4x4")
    rings = [use for use in found.collectives if use.collective.kind == "collective-permute"]
    assert (
        rings
        and {use.purpose for use in rings} == {communication.Purpose.FSDP_GATHER}
        and {use.axes for use in rings} == {("fsdp",)}
    )
    assert found.fits and found.unexpected == []


@pytest.mark.parametrize("machine", ["v5e:1x1", "v6e:1x1"])
def test_the_notebook_on_one_tpu(machine: str) -> None:
    """All that launch/colab.ipynb computes fits the TPUs that Colab lends, with the kernels in
    it.
    """
    programs = list(notebook_programs.compiled(machine))
    assert len(programs) == 21
    for name, text, memory in programs:
        assert memory < known(machine).memory, name
        assert bool(re.search(r"%all_attention_\w+\.\d+ = ", text)) == notebook_programs.attends(
            name
        ), name
