"""Whether two commits compute the same: every configuration's lowered programs, compared.

    python .ci/same_program.py --base=COMMIT      compare COMMIT with the working tree
    python .ci/same_program.py --write=FOLDER     lower what the current folder's code computes
    python .ci/same_program.py --base=FOLDER      compare what was written there

Every configuration is cut to a small size, then its training step, its scoring of a block and its
generation of a symbol are lowered for cpu, tpu and cuda (`jax.jit(...).trace().lower()` needs none
of them). Locations are left out and private functions numbered, so that moving or renaming code
changes nothing. Kernels lie inside the text as bytecode, which is decoded for the same reason.
"""

import argparse
import base64
import difflib
import itertools
import operator
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SELF = Path(__file__).resolve()
DEVICES = 4
# What an abstract device of a platform is called, and its cores; None: the CPU that is here.
PLATFORMS: dict[str, tuple[str, int] | None] = {
    "cpu": None,
    "tpu": ("TPU v5 lite", 1),
    "cuda": ("NVIDIA H100 80GB HBM3", 132),
}
# Fields whose value, where it is not 0, decides nothing but a constant in a program.
CONSTANTS = {
    "model.dropout": 0.3,
    "model.attention_dropout": 0.2,
    "model.embedding_dropout": 0.1,
    "model.span.loss": 1e-6,
    "model.span.check_every": 100,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup": 100,
    "optimizer.clip": 0.1,
    "train.steps": 1000,
    "train.finetune_steps": 100,
    "train.log_every": 1,
    "checkpoint.every": 1,
    "evaluate.every": 1,
    "evaluate.target_length": 64,
    "evaluate.memory_length": 256,
    "evaluate.clamp_length": 128,
}
# The modules that hold the compiled functions: in this layout, and in the one before it.
TRAIN = ("allattn.train",)
SCORING = ("allattn.evaluation.scoring", "allattn.evaluate")
SAMPLING = ("allattn.evaluation.sampling", "allattn.generate")


# --- lowering ----------------------------------------------------------------------------------


def write(folder: Path, only: str) -> None:
    """Lower every program of the code in the current folder, each into a file."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, os.getcwd())
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    seen: dict[str, str] = {}
    for file in experiments():
        name = "-".join(file.with_suffix("").parts[1:])
        if not re.search(only, name):
            continue
        config = small(file)
        text = str(config)
        if text in seen:
            print(f"{name}: as {seen[text]}", flush=True)
            continue
        seen[text] = name
        for program, lowered in programs(config):
            (folder / f"{name}.{program}.txt").write_text(
                normalised(lowered.as_text()), encoding="utf8"
            )
        print(name, flush=True)


def experiments() -> list[Path]:
    """Every configuration file, base.py first."""
    files = [*Path("configs").glob("*.py"), *Path("configs/ablations").glob("*.py")]
    return sorted(file for file in files if file.name != "__init__.py")


def small(file: Path) -> Any:
    """A configuration cut to a size that is traced at once; the width of its heads stays."""
    from allattn.config import load

    config = load(str(file)).copy_and_resolve_references()
    model = config.model
    head_width = model.width // model.heads
    model.heads = 2
    model.width = 2 * head_width
    model.depth = 2
    model.persistent = min(model.persistent, 80)
    model.feed_forward = min(model.feed_forward, 96)
    model.span.limit = min(model.span.limit, 256)
    model.vocab_size = 1000 if model.adaptive_io.cutoffs else 100
    model.adaptive_io.cutoffs = tuple(100 * (i + 1) for i in range(len(model.adaptive_io.cutoffs)))
    config.train.batch = 4
    config.train.block = 64
    # Constants of a program: configurations that differ in nothing else are lowered once.
    for name, value in CONSTANTS.items():
        section, field = name.rsplit(".", 1)
        owner = operator.attrgetter(section)(config)
        owner[field] = type(owner[field])(value if owner[field] else 0)
    config.dataset.name = ""
    return config.lock()


def programs(config: Any) -> Iterator[tuple[str, Any]]:
    """The lowered programs of a configuration, each with its name."""
    for platform in PLATFORMS:
        for mesh_name, changes in meshes(config, platform):
            yield f"train.{mesh_name}.{platform}", lower_step(changed(config, changes), platform)
        yield f"evaluate.{platform}", lower_scoring(config, platform)
        for part, lowered in lower_generation(config, platform):
            yield f"generate.{part}.{platform}", lowered


def meshes(config: Any, platform: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """One device; on a CPU also four, and two with accumulation and recomputation."""
    yield "one", {"data": 1, "fsdp": 1, "tensor": 1, "accumulation": 1, "remat": ""}
    if platform == "cpu":
        apart = config.model.integration in ("head_split", "single_head", "sublayer", "pattention")
        split = (
            {"data": 2, "fsdp": 2, "tensor": 1} if apart else {"data": 1, "fsdp": 2, "tensor": 2}
        )
        yield "four", {**split, "accumulation": 1, "remat": ""}
        yield (
            "parts",
            {"data": 1, "fsdp": 2, "tensor": 1, "accumulation": 2, "remat": "projections"},
        )


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """The configuration on another mesh, with another accumulation and remat."""
    config = config.copy_and_resolve_references().unlock()
    for axis in ("data", "fsdp", "tensor"):
        config.mesh[axis] = changes[axis]
    config.train.accumulation = changes["accumulation"]
    config.train.remat = changes["remat"]
    return config.lock()


def lower_step(config: Any, platform: str) -> Any:
    """The training step of the largest context."""
    import jax
    import jax.numpy as jnp

    from allattn import data, sharding

    train = module(TRAIN)
    devices = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    program = getattr(train, "TrainProgram", None) or train.Program
    program = program(config, mesh)
    row = sharding.row_sharding(mesh)
    shape = (config.train.batch, config.train.block)
    tokens_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=row)
    batch = data.Batch(tokens_BT, tokens_BT, jax.ShapeDtypeStruct((), jnp.int32))
    limit = config.model.span.limit

    def step() -> Any:
        return program.jitted_step(limit), (program.abstract_state(limit), batch)

    return lower(step, platform, mesh)


def lower_scoring(config: Any, platform: str) -> Any:
    """The scoring of one block, as `evaluate` does it."""
    import jax
    import jax.numpy as jnp

    from allattn import sharding

    scoring = module(SCORING)
    model, params = abstract_model(config)
    mesh = sharding.make_mesh(
        changed(config, dict(meshes(config, "cpu"))["one"]), jax.devices()[:1]
    )
    rows, block = config.train.batch, config.train.block
    cache = jax.eval_shape(lambda: model.empty_key_value(rows, config.model.span.limit + block))
    tokens_RT = jax.ShapeDtypeStruct((rows, block), jnp.int32)
    scored_RT = jax.ShapeDtypeStruct((rows, block), jnp.bool_)
    before = jax.ShapeDtypeStruct((), jnp.int32)

    def step() -> Any:
        arguments = (model, mesh, 1, params, cache, before, tokens_RT, tokens_RT, scored_RT)
        return scoring.score_block, arguments

    return lower(step, platform, mesh)


def lower_generation(config: Any, platform: str) -> Iterator[tuple[str, Any]]:
    """The programs that read a symbol and draw the next one."""
    import jax
    import jax.numpy as jnp

    from allattn import sharding

    sampling = module(SAMPLING)
    model, params = abstract_model(config)
    mesh = sharding.make_mesh(
        changed(config, dict(meshes(config, "cpu"))["one"]), jax.devices()[:1]
    )
    cache = jax.eval_shape(lambda: model.empty_key_value(1, config.model.span.limit + 64))
    token_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    place = jax.ShapeDtypeStruct((), jnp.int32)
    logits_V = jax.ShapeDtypeStruct((config.model.vocab_size,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def advance() -> Any:
        return sampling.advance, (model, params, cache, token_BT, place, place)

    def draw() -> Any:
        return sampling.draw, (logits_V, key, sampling.Sampling(0.7, 5, 0.9))

    yield "advance", lower(advance, platform, mesh)
    yield "draw", lower(draw, platform, mesh)


def abstract_model(config: Any) -> tuple[Any, Any]:
    """The network, and the shapes of its parameters."""
    import jax

    from allattn.model import Model, ModelConfig

    model = Model(ModelConfig.from_config(config))
    return model, jax.eval_shape(model.init, jax.random.key(0))


def module(names: tuple[str, ...]) -> Any:
    """The first of some modules that this layout has."""
    import importlib

    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise SystemExit(f"same_program: expected one of the modules {names}, found none")


def lower(step: Any, platform: str, mesh: Any) -> Any:
    """Trace a function for a platform, whose kind of device decides which kernels are traced."""
    import contextlib

    import jax

    described: Any = contextlib.nullcontext()
    kind = PLATFORMS[platform]
    if kind is not None:
        name = "gpu" if platform == "cuda" else platform
        device = jax.sharding.AbstractDevice(device_kind=kind[0], num_cores=kind[1], platform=name)
        abstract = jax.sharding.AbstractMesh(
            tuple(mesh.shape.values()),
            tuple(mesh.shape),
            axis_types=mesh.axis_types,
            abstract_device=device,
        )
        described = jax.sharding.use_abstract_mesh(abstract)
    with described:
        function, arguments = step()
        return function.trace(*arguments).lower(lowering_platforms=(platform,))


# --- text without places and names ---------------------------------------------------------------


def normalised(text: str) -> str:
    """A program's text with its kernels decoded and private functions numbered in order."""
    text = re.sub(r"body\\22: \\22([A-Za-z0-9+/=]+)\\22", _tpu_kernel, text)
    text = re.sub(r'(?<=ir = ")((?:[^"\\]|\\.)*)"', _gpu_kernel, text)
    names = re.findall(r"func\.func private @([\w.]+|\"[^\"]*\")", text)
    numbers = {name: f"private_{number}" for number, name in enumerate(dict.fromkeys(names))}
    return re.sub(r'@([\w.]+|"[^"]*")', lambda m: f"@{numbers.get(m[1], m[1])}", text)


def _tpu_kernel(match: re.Match) -> str:
    return "body: " + _decoded(base64.b64decode(match[1]))


def _gpu_kernel(match: re.Match) -> str:
    escaped = re.sub(r"\\([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), match[1])
    escaped = escaped.replace('\\"', '"').replace("\\\\", "\\")
    return _decoded(escaped.encode("latin1")) + '"'


def _decoded(bytecode: bytes) -> str:
    """The text of a kernel's module, without locations."""
    from jax._src.lib import tpu, triton
    from jax._src.lib.mlir import ir

    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        tpu.register_dialect(context)
        triton.dialect.register_dialect(context)
        parsed = ir.Module.parse(bytecode)
        return parsed.operation.get_asm(enable_debug_info=False)


# --- comparing -----------------------------------------------------------------------------------


def compare(base: str, only: str) -> int:
    """Lower both commits and print the programs that differ; the number of them."""
    with tempfile.TemporaryDirectory() as place:
        old = Path(base) if Path(base).is_dir() else Path(place) / "old"
        new = Path(place) / "new"
        if not old.exists():
            tree = Path(place) / "tree"
            subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, base], check=True)
            try:
                _write_apart(tree, old, only)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", tree], check=True)
        _write_apart(Path.cwd(), new, only)
        return report(old, new, base, only)


def _write_apart(code: Path, folder: Path, only: str) -> None:
    """`write` in a process of its own, which imports the code of one commit."""
    command = [sys.executable, str(SELF), f"--write={folder}", f"--only={only}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(code)}
    subprocess.run(command, cwd=code, env=environment, check=True, stdout=subprocess.DEVNULL)


def report(old: Path, new: Path, base: str, only: str) -> int:
    """Print what differs between two folders of programs."""
    found = {file.name for folder in (old, new) for file in folder.iterdir()}
    names = sorted(name for name in found if re.search(only, name.partition(".")[0]))
    different = 0
    for name in names:
        before, after = (_lines(folder / name) for folder in (old, new))
        if before == after:
            continue
        different += 1
        print(f"{name} differs:")
        changes = difflib.unified_diff(before, after, base, "working tree", lineterm="", n=1)
        print("\n".join(line[:200] for line in itertools.islice(changes, 20)))
    print(f"{len(names)} programs compared with {base}: {different} differ")
    return different


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf8").splitlines() if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="commit to compare with, or a folder written before")
    parser.add_argument("--only", default="", help="pattern of configuration names; all")
    parser.add_argument("--write", type=Path, help="folder for the programs of the current code")
    given = parser.parse_args()
    if given.write:
        write(given.write, given.only)
    elif given.base:
        sys.exit(1 if compare(given.base, given.only) else 0)
    else:
        parser.error("expected --base=COMMIT or --write=FOLDER")


if __name__ == "__main__":
    main()
