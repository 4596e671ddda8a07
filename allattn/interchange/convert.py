"""Checkpoints of the papers' own code as ours, and back; `their_names` has the names and shapes.

Both directions only move numbers: a round trip is bit-exact. Ids are not renumbered: a checkpoint's
vocabulary must have the order of ours, which for adaptive-span is theirs.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from allattn import data
from allattn.config import with_vocabulary
from allattn.errors import UserError
from allattn.interchange.paper_state_dicts import SOURCES, Entry, Source, State
from allattn.model import Model, ModelConfig, Params
from allattn.model.parameters import parameter_count
from allattn.run import load
from allattn.storage import checkpoint


def to_theirs(params: Params, entries: list[Entry]) -> State:
    """Our parameters under their names.

    Args:
      params: nested dict of arrays.
      entries: a table.

    Returns:
      Their state dict, without what is stored twice there.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for entry in entries:
        x = _at(params, entry.ours)
        parts.setdefault(entry.theirs, []).append(
            entry.to_theirs(x if entry.layer is None else x[entry.layer])
        )
    return {name: np.ascontiguousarray(np.concatenate(found)) for name, found in parts.items()}


def to_ours(state: State, abstract: Params, entries: list[Entry]) -> Params:
    """Their tensors as our parameters.

    Args:
      state: their state dict, without what is stored twice there.
      abstract: shapes and dtypes of our parameters.
      entries: a table.

    Returns:
      The parameters, nested as `abstract`.

    Raises:
      UserError: lists the keys that are missing, those that have no place here and those of another
        shape.
    """
    empty = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), abstract)
    expected = {name: x.shape for name, x in to_theirs(empty, entries).items()}
    wrong = [f"{name} missing" for name in expected if name not in state]
    wrong += [
        f"{name} has no place in this configuration" for name in state if name not in expected
    ]
    both = [name for name in expected if name in state and state[name].shape != expected[name]]
    wrong += [
        f"{name}: expected shape {expected[name]}, found {state[name].shape}" for name in both
    ]
    if wrong:
        raise UserError(f"{len(wrong)} keys do not fit the configuration: {'; '.join(wrong)}")
    params = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), abstract)
    for entry in entries:
        x = _at(params, entry.ours)
        x[... if entry.layer is None else entry.layer] = entry.to_ours(
            state[entry.theirs][entry.rows]
        )
    return params


def _at(params: Params, path: str) -> Any:
    """The leaf at a path; members of lists have numbers."""
    found: Any = params
    for name in path.split("/"):
        found = found[int(name) if name.isdigit() else name]
    return found


# --- files
#
#
# -------------------------------------------------------------------------------------------------------


def convert(
    source: str, file: str, config: ml_collections.ConfigDict, workdir: str
) -> dict[str, Any]:
    """Make a workdir of a checkpoint of theirs, for `evaluate`, `generate` and further training.

    Args:
      source: a name in SOURCES.
      file: a .pt file with a state dict (needs torch), or the same as .npz.
      config: the whole configuration; its data set gives the vocabulary.
      workdir: folder or bucket URL without a checkpoint.

    Returns:
      parameters (their number) and tensors (of the state dict).

    Raises:
      UserError: file, configuration, data and workdir do not fit each other.
    """
    dataset = data.prepare(
        config.dataset.name, config.dataset.data_dir or None, unit=config.dataset.unit
    )
    config = with_vocabulary(config, dataset.vocabulary.size, dataset.name)
    model, table = Model(ModelConfig.from_config(config)), _source(source, config)
    state = _read(file)
    for name in table.constants(model.config):
        state.pop(name, None)
    for copy, original in table.copies(model.config).items():
        if copy not in state or original not in state:
            continue
        twin = state.pop(copy)
        if not np.array_equal(twin, state[original]):
            raise UserError(
                f"{file}: expected {copy} to equal {original}, with which it is shared, found another"
            )
    params = to_ours(
        state, jax.eval_shape(model.init, jax.random.key(0)), table.entries(model.config)
    )
    with checkpoint.Checkpointer(workdir) as checkpoints:
        if checkpoints.steps():
            raise UserError(
                f"--workdir: expected one without checkpoints, found steps {checkpoints.steps()} in {workdir}"
            )
        checkpoints.save_params(
            0,
            params,
            checkpoint.describe(0, config, dataset.vocabulary.to_json()) | {"params_only": True},
        )
    return {"parameters": parameter_count(params), "tensors": len(state)}


def export(source: str, workdir: str, file: str, step: int | str | None = None) -> dict[str, Any]:
    """Write a run's parameters under the names of their state dict, with all that their code stores beside them.

    Args:
      source: a name in SOURCES.
      workdir: folder or bucket URL of the run.
      file: .npz to write.
      step: which checkpoint; None: the newest.

    Returns:
      parameters (their number) and tensors (of the state dict).

    Raises:
      UserError: no such checkpoint, one of another kind, or the file is there already.
    """
    if Path(file).exists() or not file.endswith(".npz") or not Path(file).parent.is_dir():
        raise UserError(
            f"--export: expected a new file that ends in .npz, in a folder that exists, found {file}"
        )
    run = load(workdir, step)
    table, config = _source(source, run.config), run.model.config
    params = jax.tree.map(np.asarray, run.params)
    state = to_theirs(params, table.entries(config))
    size = len(state)
    state |= {
        copy: state[original] for copy, original in table.copies(config).items()
    } | table.constants(config)
    named: dict[str, Any] = {table.prefix + name: x for name, x in state.items()}
    np.savez(file, **named)
    return {"parameters": parameter_count(params), "tensors": size}


def _source(name: str, config: ml_collections.ConfigDict) -> Source:
    if name not in SOURCES:
        raise UserError(f"--source: expected one of {tuple(SOURCES)}, found {name!r}")
    layers, model = SOURCES[name].layers, config.model
    if model.layer not in layers or model.integration != "joint":
        expected = f"model.layer in {layers} and model.integration joint"
        raise UserError(
            f"--source={name}: expected {expected}, found {model.layer} and {model.integration}"
        )
    return SOURCES[name]


def _read(file: str) -> State:
    """A state dict from a file, its names without what a data-parallel wrapper puts before them."""
    if not Path(file).is_file():
        raise UserError(f"--checkpoint: expected a file, found none at {file}")
    state = _read_npz(file) if file.endswith(".npz") else _read_torch(file)
    return {name.removeprefix("module."): x for name, x in state.items()}


def _read_npz(file: str) -> State:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--checkpoint: {file} cannot be read as arrays by name: {error}"
        ) from error


def _read_torch(file: str) -> State:
    """The state dict of a .pt file: the whole of it, or its entry "model". Nothing but tensors is unpickled."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"--checkpoint: {file} needs PyTorch: pip install 'allattn[torch]', or give an .npz"
        ) from None
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's errors are of many kinds
        raise UserError(
            f"--checkpoint: {file} holds no state dict (save `model.state_dict()`): {str(error)[:200]}"
        ) from error
    found = found.get("model", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(
        isinstance(x, torch.Tensor) for x in found.values()
    ):
        raise UserError(
            f"--checkpoint: {file}: expected a state dict of tensors, or one under `model`, found another"
        )
    return {name: x.numpy() for name, x in found.items()}
