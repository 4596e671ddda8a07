"""Reading collectives from compiled text, judging them, and `allattn compile` without any
accelerator.

Dimension key: B batch, T query position, S context key, H head, K head width, X any.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from new_process import fresh

from allattn import config
from allattn.errors import UserError
from allattn.planning import chips, collectives, communication, compilation
from benchmarks import scaling

ROOT = Path(__file__).resolve().parents[2]

# --- reading --------------------------------------------------------------------------------------

TEXT = """HloModule jit_step, entry_computation_layout={()->()}, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%below (state: (s32[], f32[4,8])) -> pred[] {
  %last = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%counter, %last), direction=LT
}

%unknown (state: (s32[], f32[4,8])) -> pred[] {
  ROOT %lt.1 = pred[] compare(%counter, %bound), direction=LT
}

%all-reduce-scatter.1 (input: bf16[8,8]) -> bf16[4,8] {
  %all-reduce.9 = bf16[8,8]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add
}

%begun (shard: bf16[2,8]) -> (bf16[2,8], bf16[4,8]) {
  %all-gather.1 = bf16[4,8] all-gather(%shard), channel_id=1, replica_groups=[4,2]<=[8], backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}

%within (shard: bf16[2,8]) -> (bf16[2,8], bf16[4,8]) {
  %all-gather.2 = bf16[4,8] all-gather(%shard), channel_id=1, replica_groups=[4,2]<=[8], backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%short (h: f32[4,8]) -> f32[4,8] {
  ROOT %all-reduce.4 = f32[4]{0} all-reduce(%h), replica_groups={}, to_apply=%add
}

%long (h: f32[4,8]) -> f32[4,8] {
  ROOT %all-reduce.5 = f32[4,8]{1,0} all-reduce(%h), replica_groups={}, to_apply=%add
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %fusion.1 = bf16[4,8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/transpose(jvp())/dot"}
  %start = (bf16[2,8], bf16[4,8]) fusion(%x), kind=kCustom, calls=%begun
  %middle = (bf16[2,8], bf16[4,8]) fusion(%x), kind=kOutput, calls=%within
  %chosen = f32[4,8] conditional(%which, %h, %h), branch_computations={%short, %long}
}

%ring (state: (u32[], f32[4,8])) -> pred[] {
  %rounds = u32[]{:T(128)} constant(7)
  %get-tuple-element.1 = u32[]{:T(128)} get-tuple-element(%state), index=1
  ROOT %lt.2 = pred[]{:T(512)} compare(%get-tuple-element.1, %rounds), direction=LT
}

%twice (state: (f32[4,8], u32[])) -> (f32[4,8], u32[]) {
  %constant.2 = u32[]{:T(128)} constant(2), metadata={op_name="dot"}
  %add.5 = u32[]{:T(128)} add(%counter, %constant.2)
  %permute.1 = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%h), source_target_pairs={{0,1},{1,0}}
  %permute.2 = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%h), source_target_pairs={{0,1},{1,0}}
  ROOT %tuple.1 = (f32[4,8]{1,0:T(8,128)}, /*index=1*/u32[]{:T(128)}) tuple(%permute.2, /*index=1*/%add.5), metadata={op_name="dot"}
}

%free (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %permute = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%h), source_target_pairs={{0,1},{1,0}}
  %done = f32[4,8] collective-permute-done(%permute)
}

%wrapped_concatenate_computation.1 (a: f32[2,4], b: f32[2]) -> f32[10] {
  %a.1 = f32[2,4]{1,0} parameter(0)
  %b.1 = f32[2]{0} parameter(1)
}

ENTRY %main (h: f32[4,8]) -> f32[4,8] {
  %while.1 = (s32[], f32[4,8]) while(%state), condition=%below, body=%body
  %while.2 = (s32[], f32[4,8]) while(%state), condition=%unknown, body=%free
  %while.3 = (s32[], f32[4,8]) while(%state), condition=%unknown, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %while.4 = (u32[], f32[4,8]) while(%state), condition=%ring, body=%twice
  %gathered = (f32[2,8], f32[4,8]) all-gather-start(%h), replica_groups=[4,2]<=[2,2,2]T(2,1,0), dimensions={0}
  %wrapped_concatenate.1 = f32[10]{0} fusion(%a, %b), kind=kLoop, calls=%wrapped_concatenate_computation.1
  %send = (bf16[2,8,128]{2,1,0}, u32[]{:S(2)}, token[]) send(%h, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %joined = f32[10]{0} all-reduce-start(%wrapped_concatenate.1), replica_groups={{0,1}}, to_apply=%add
  ROOT %scattered = f32[2,8]{1,0} reduce-scatter(%h), replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, to_apply=%add, metadata={op_name="jit(step)/psum"}
}
"""  # noqa: E501


def test_reading() -> None:
    """Every form that CPUs, GPUs and TPUs write: which, of how many bytes, how often, between
    whom.
    """
    found = collectives.parse(TEXT)
    pairs = ((0, 1), (2, 3), (4, 5), (6, 7))
    halves = ((0, 4), (2, 6), (1, 5), (3, 7))

    def of_body(times: int) -> list[collectives.Collective]:
        return [
            collectives.Collective(
                "reduce-scatter",
                (64,),
                128,
                ((0, 2), (1, 3)),
                times,
                "jit(step)/transpose(jvp())/dot",
            ),
            collectives.Collective(
                "all-gather", (32,), 64, pairs, times, ""
            ),  # its later part is not another one
            collectives.Collective(
                "all-reduce", (32,), 128, (tuple(range(8)),), times, ""
            ),  # of the larger branch
        ]

    assert found == [
        *of_body(5),
        collectives.Collective("collective-permute", (32,), 128, ((0, 1), (1, 0)), None, ""),
        *of_body(3),
        *[collectives.Collective("collective-permute", (32,), 128, ((0, 1), (1, 0)), 4, "")] * 2,
        collectives.Collective("all-gather", (32,), 128, halves, 1, ""),
        collectives.Collective("all-reduce over slices", (2048,), 4096, ((),), 1, ""),
        collectives.Collective("all-reduce", (8, 2), 40, ((0, 1),), 1, ""),
        collectives.Collective(
            "reduce-scatter", (64,), 256, ((0, 1, 2, 3), (4, 5, 6, 7)), 1, "jit(step)/psum"
        ),
    ]


def test_unknown_groups() -> None:
    with pytest.raises(LookupError, match="no known form of device groups: .*replica_groups=other"):
        collectives.parse(
            "ENTRY %main () -> f32[] {\n  %x = f32[] all-reduce(%y), replica_groups=other\n}"
        )


# --- judging --------------------------------------------------------------------------------------

JUDGE = """
import json, jax
from allattn.sharding import operation
from allattn.planning import compilation, collectives, communication
from allattn import config, sharding, train

def sent(c):
    program = train.TrainProgram(c, sharding.make_mesh(c))
    quick = {{"xla_backend_optimization_level": 0}}
    text = compilation.lower_step(program).compile(compiler_options=quick).as_text()
    return communication.classify(collectives.parse(text), program), program

def verdict(uses, program):
    return [communication.unexpected(uses, program), communication.summary(uses)]

cases = [config.load("{root}/configs/demo.py", changes) for changes in {changes}]
first, *others = [sent(c) for c in cases]
found = [verdict(*each) for each in (first, *others)]
{injected}
print(json.dumps(found))
"""
SMALL = {
    **{
        "model.vocab_size": "96",
        "model.depth": "3",
        "model.width": "64",
        "model.heads": "2",
        "model.persistent": "16",
    },
    **{"model.span.limit": "128", "train.batch": "8", "train.block": "24", "model.dropout": "0.1"},
    **{"model.span.check_every": "30", "mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"},
}
INJECTED = """
all_attention = operation.all_attention
def leaky(*inputs, **options):
    out_BTHK, mass_BTH = all_attention(*inputs, **options)
    return jax.lax.pmean(out_BTHK, "data"), mass_BTH
operation.all_attention = leaky
found.append(verdict(*sent(cases[0])))
operation.all_attention = all_attention
uses, program = first
gather = communication.Purpose.FSDP_GATHER
twice = uses + [use for use in uses if use.purpose is gather]
found.append(verdict(twice, program))
sharding.gather_tables = lambda mesh, tree: tree
found.append(verdict(*sent(cases[0])))
"""


def judged(*cases: dict[str, str], injected: str = "") -> list[Any]:
    """What is wrong with the step of each case, and a summary of what it sends."""
    changes = [
        {**SMALL, **{name.replace("__", "."): value for name, value in case.items()}}
        for case in cases
    ]
    # A program in the cache shall have the names of this source, since they are judged.
    named = {"JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY": "true"}
    return fresh(JUDGE.format(root=ROOT, changes=changes, injected=injected), 8, **named)


def test_collectives_of_a_step() -> None:
    """A step sends what it must and nothing else: all-attention on 2 x 2 x 2 devices.

    What is found: a sum inside the operation, gathers twice as often, a table left in parts.
    """
    (broken, uses), (leaks, _), (often, _), (parts, _) = judged({}, injected=INJECTED)
    assert broken == []
    roles = {use["role"] for use in uses}
    assert roles == {
        communication.Purpose.GRADIENT_REDUCTION.value,
        communication.Purpose.FSDP_GATHER.value,
        communication.Purpose.ACTIVATION.value,
        communication.Purpose.METRICS.value,
    }
    looped = [use for use in uses if use["role"] == "activations" and use["times"] == 3]
    block = 2 * 24 * 64 * 4  # rows of a device x tokens x width x bytes
    assert (
        sum(use["bytes"] for use in looped) == 3 * block * 4
    )  # output; keys, values and queries in the backward pass
    assert leaks and all("all_attention" in line for line in leaks)
    assert len(often) == 1 and often[0].startswith(
        "fsdp gather: expected at most 133,545 numbers, found "
    )
    assert any("gather" in line for line in parts)


SUMMED = """
attention_over = sharding.attention_over
@jax.custom_vjp
def same(x): return x
def backward(_, d_x):
    place = jax.sharding.PartitionSpec(sharding.ROWS)
    mean = lambda d_x: jax.lax.pmean(d_x, "data")
    return (jax.shard_map(mean, mesh=mesh, in_specs=place, out_specs=place, check_vma=False)(d_x),)
same.defvjp(lambda x: (x, None), backward)
def leaky_over(mesh_here, rows):
    global mesh
    mesh, operation = mesh_here, attention_over(mesh_here, rows)
    return lambda query_BTHK, *inputs, **options: operation(same(query_BTHK), *inputs, **options)
sharding.attention_over = leaky_over
found.append(verdict(*sent(cases[0])))
"""


def test_activations_of_the_size_of_a_kernel() -> None:
    """A sum of activations that have the size of a kernel is found.

    Rows of one to a device, as long as they are wide: the sum passes for a gradient's, and is one
    too many.
    """
    alike = {"mesh__data": "8", "mesh__fsdp": "1", "mesh__tensor": "1", "train__block": "64"}
    (broken, _), (leaks, uses) = judged(alike, injected=SUMMED)
    assert broken == []
    assert "unexpected" not in {use["role"] for use in uses} and len(leaks) == 1
    assert (
        leaks[0]
        == "gradient reduction over data of 4,096 numbers: expected at most 15 times, found 18"
    )


ACCUMULATED = {"train__batch": "16", "train__accumulation": "2"}
MESHES = (
    {"mesh__data": "2", "mesh__fsdp": "2", "mesh__tensor": "2"},
    {"mesh__data": "1", "mesh__fsdp": "8", "mesh__tensor": "1"},
)
TRANSFORMER_XL = {
    "model__layer": "transformer_xl",
    "model__feed_forward": "80",
    "model__persistent": "0",
    "model__span__adaptive": "false",
    "model__span__limit": "40",
    "evaluate__protocol": "xl",
}


def test_steps_send_what_they_must() -> None:
    """An accumulated batch sends gradients in parts, and metrics once; and Transformer-XL's step,
    here with Muon, which makes every matrix whole once.

    Together, since they share the start of a process with eight devices.
    """
    accumulating = [{**ACCUMULATED, **mesh} for mesh in MESHES]
    *accumulated, xl = judged(*accumulating, {**TRANSFORMER_XL, "optimizer__name": "muon"})
    assert xl[0] == [] and "whole matrices" in {use["role"] for use in xl[1]}
    for broken, uses in accumulated:
        assert broken == []
        assert {use["times"] for use in uses if use["role"] == "norms and metrics"} == {1}


# --- the command ----------------------------------------------------------------------------------


def run(**flags: str) -> Any:
    values = {"config": str(ROOT / "configs" / "enwik8_small.py"), "topology": "v5e:2x2", **flags}
    return call(
        "compile", *(f"--{name.replace('__', '.')}={value}" for name, value in values.items())
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"topology": "v5e:2x9"},
            r"--topology: expected one of .*v5e:\{1x1,.*h200:\{1,2,4,8\}; found v5e:2x9",
        ),
        (
            {"topology": "h100:8", "slices": "2"},
            "--slices: expected at least 1, and 1 for a node of GPUs, found 2",
        ),
        (
            {"config.model.vocab_size": "0"},
            "model.vocab_size: expected a size, as no data are read here, found 0",
        ),
    ],
)
def test_mistakes(flags: dict[str, str], message: str) -> None:
    result = run(**flags)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    with pytest.raises(UserError, match=message):
        raise UserError(result.err)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_no_compiler() -> None:
    result = run()
    assert (
        result.code == 2
        and "expected libtpu (pip install" in result.err
        and len(result.err.splitlines()) == 1
    )


@pytest.mark.parametrize(
    ("machine", "mesh", "changes", "setting"),
    [
        ("v5e:2x2", (4, 1, 1), {}, "--config.train.accumulation=2"),
        ("v5e:2x2", (4, 1, 1), {"train.accumulation": "8"}, "--config.train.accumulation=16"),
        ("h100:8", (64, 1, 1), {}, "--config.train.remat=projections"),
        # Which a TPU computes again in any case.
        ("v5e:2x2", (64, 1, 1), {}, "--config.train.remat=layer"),
        ("v5e:2x2", (64, 1, 1), {"train.remat": "projections"}, "--config.train.remat=layer"),
        ("v5e:2x2", (64, 1, 1), {"train.remat": "layer"}, "--config.mesh.fsdp=64"),
        ("v5e:2x2", (1, 64, 1), {"train.remat": "layer"}, "a chip with more memory"),
    ],
)
def test_what_to_change(
    machine: str, mesh: tuple[int, ...], changes: dict[str, str], setting: str
) -> None:
    c = config.load(str(ROOT / "configs" / "enwik8_small.py"), changes)
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    memory = {"arguments": 9 * compilation.GIB, "temporaries": 8 * compilation.GIB, "outputs": 0}
    found = compilation.Compiled(
        name="small",
        topology=machine,
        slices=1,
        mesh=sizes,
        batch=64,
        parameters=1,
        memory=memory,
        hbm=16 * compilation.GIB,
        flops=1.0,
        collectives=[],
        unexpected=[],
        overflow="",
    )
    assert not found.fits
    assert setting in compilation.report(found, c).splitlines()[-1]
    assert dataclasses.replace(found, hbm=17 * compilation.GIB).fits


def test_devices_of_chips() -> None:
    """Chips have the devices that their shapes name.

    Every known topology is a chip's, and a shape that is no topology is refused.
    """
    for name, chip in chips.CHIPS.items():
        assert all(chips.chip(f"{name}:{shape}") is chip for shape in chip.shapes)
        with pytest.raises(UserError, match="expected one of"):
            chips.chip(f"{name}:5x5x5")


# --- several slices, and scaling on paper ---------------------------------------------------------


def over_slices(kind: str, size: int) -> collectives.Collective:
    return collectives.Collective(kind + collectives.OVER_SLICES, (size,), size, ((),), 1, "")


def test_between_slices() -> None:
    """Sums may pass, up to what is summed within a slice; nothing else may."""
    within = communication.ClassifiedCollective(
        communication.Purpose.GRADIENT_REDUCTION,
        ("data",),
        collectives.Collective("all-reduce", (9,), 100, ((0, 1),), 2, "x"),
    )
    inside = collectives.Collective(
        "all-gather", (9,), 100, ((0, 1),), 2, "jit(step)/all_attention/x"
    )

    def unexpected(*sent: collectives.Collective) -> list[str]:
        between = communication.classify_between_slices([within.collective, *sent])
        return communication.unexpected_between_slices(between, [within])

    assert unexpected(over_slices("all-reduce", 200)) == []
    assert unexpected(over_slices("all-reduce", 201)) == [
        "between slices: expected no more than is summed within one, 200 bytes, found 201"
    ]
    assert unexpected(over_slices("all-gather", 1)) == ["all-gather over slices of 1 bytes in "]
    assert unexpected(inside) == ["all-gather of 100 bytes in jit(step)/all_attention/x"]


def test_scaling_by_hand() -> None:
    """2 and 512 chips of 16 x 16 a slice, with numbers that can be computed in the head."""
    chip = chips.CHIPS["v5e"]
    sent = (chip.ici, 1)  # a second's bytes in one collective
    assert scaling.summing(sent, 1, "v5e") == 0
    assert scaling.summing(sent, 256, "v5e") == pytest.approx(2 * 255 / 256 + 60 * scaling.HOP)
    between = 2 * chip.ici / 256 / 2 / chip.dcn + scaling.CROSSING
    assert scaling.summing(sent, 512, "v5e") == pytest.approx(
        2 * 255 / 256 + 60 * scaling.HOP + between
    )
    step = scaling.Step(
        chip.flops * scaling.SHARE, rows=4, heads=2, gradients=(0.0, 0), activations=(0.0, 0)
    )
    rows = scaling.curve(step, "v5e")
    assert [row["strong"] and row["strong"]["seconds"] for row in rows[:5]] == pytest.approx(
        [4, 2, 1, 0.5, None]
    )
    assert scaling.stops(rows, "strong") == "100% at 8 chips, where rows and heads are used up"
    assert scaling.stops(rows, "weak") == "100% at 4096 chips"


def test_what_processes_did_as_a_table() -> None:
    found = {
        "processes": (1, 2),
        "cores": 2,
        "flops_ratio": [1.0, 1.0003],
        "cpu_s_ratio": [1.0, 0.987],
    }
    assert scaling.measured(found).splitlines()[3:6] == [
        "|---|---|---|",
        "| 1 | 1.0000 | 1.00 |",
        "| 2 | 1.0003 | 0.99 |",
    ]
