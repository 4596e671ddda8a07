"""More persistent pairs for a network that has learned with fewer, whose function stays the same.

A pair that is added has a key that is drawn as at the start of a run, the value 0 and the offset
-inf, which removes it exactly; what the network has learned stays as it is. Values are stored over
sqrt(N), so those of the pairs that were there are multiplied by sqrt(N before / N now).

A removed pair has no gradient: it stays removed until an offset is given to it. That is done where
a run starts from another one, by `train.grown_share`. All pairs that are removed then get the
offset at which they together have this share of the weight of all pairs where logits are alike,

    log(share / (1 - share)) + log(sum of exp(b) of the other pairs) - log(number of removed pairs)

and since their values are 0, the output of all pairs is smaller by about this share at first.

Dimension key: X layer, H head, N persistent pair.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from allattn.config import changed_fields
from allattn.config_checks import MAY_CHANGE_ON_WARM_START
from allattn.errors import UserError
from allattn.model import Params
from allattn.model.parameters import parameter_name

Array = jax.Array

# What may differ in the model of a run whose pairs are added to.
FIELDS_OF_PAIRS = ("persistent", "persistent_bias")


def check_models(
    there: ml_collections.ConfigDict, here: ml_collections.ConfigDict, source: str
) -> None:
    """Refuse to start from a model whose parameters are not, or do not become, those of another.

    Args:
      there: section `model` of the run to start from.
      here: the same of the run that starts.
      source: workdir of the former, for the message.

    Raises:
      UserError: names the fields that differ, and what they are.
    """
    start = f"train.init_from: {source}: expected"
    if grows(there, here):
        if here.persistent < there.persistent:
            raise UserError(
                f"{start} at most the pairs of this configuration, model.persistent "
                f"{here.persistent}, found {there.persistent}"
            )
        if here.persistent > there.persistent and not here.persistent_bias:
            raise UserError(
                f"{start} model.persistent_bias True in this configuration, so that pairs can be "
                f"added to its {there.persistent} without effect, found False"
            )
        # All other fields must be the same.
        there = there.copy_and_resolve_references().unlock()
        there.update({name: here[name] for name in FIELDS_OF_PAIRS})
    changed = changed_fields(there, here, MAY_CHANGE_ON_WARM_START, ("there", "here"))
    if changed:
        raise UserError(f"{start} the model of this configuration, found {'; '.join(changed)}")


def grows(there: ml_collections.ConfigDict, here: ml_collections.ConfigDict) -> bool:
    """Whether pairs, or offsets of them, are added to a network that has pairs."""
    if not there.persistent or not here.persistent:
        return False
    more_offsets = here.persistent_bias and not there.persistent_bias
    return more_offsets or here.persistent != there.persistent


def grow_pairs(params: Params, fresh: Params, share: float) -> Params:
    """Parameters of a network with more pairs, which is the same function where the share is 0.

    Args:
      params: of the network so far, with or without offsets.
      fresh: initial ones of the network to be, from which keys are taken.
      share: of the pairs' weight, for all pairs that are removed; 0: they stay so.

    Returns:
      Parameters in the structure and the shapes of `fresh`.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    before = {parameter_name(path): x for path, x in leaves}

    def grown(path: tuple, new: Array) -> Array:
        name = parameter_name(path)
        # The pairs that were there come first.
        if name.endswith("persistent_key"):
            old_XHNK = before[name]
            return jnp.concatenate([old_XHNK, new[:, :, old_XHNK.shape[2] :]], axis=2)
        if name.endswith("persistent_value"):
            return _more_values(before[name], new.shape[2])
        if name.endswith("persistent_bias"):
            keys = before[name.replace("bias", "key")]
            old_XHN = before.get(name, jnp.zeros((*new.shape[:2], keys.shape[2]), new.dtype))
            return _open_pairs(_more_offsets(old_XHN, new.shape[2]), share)
        # What is not of the pairs stays as it was.
        return before[name]

    return jax.tree_util.tree_map_with_path(grown, fresh)


def _more_values(value_XHNK: Array, pairs: int) -> Array:
    """Values of so many pairs, zeros for those that are new."""
    before = value_XHNK.shape[2]
    # The layer multiplies by sqrt(N): exact where the ratio is a power of 4.
    value_XHNK = value_XHNK * math.sqrt(before / pairs)
    return jnp.pad(value_XHNK, ((0, 0), (0, 0), (0, pairs - before), (0, 0)))


def _more_offsets(bias_XHN: Array, pairs: int) -> Array:
    """Offsets of so many pairs, of which those that are new are removed."""
    missing = pairs - bias_XHN.shape[2]
    return jnp.pad(bias_XHN, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)


def _open_pairs(bias_XHN: Array, share: float) -> Array:
    """Give an offset to the pairs that are removed."""
    if share == 0:
        return bias_XHN
    # Where none is removed the offset is not used.
    removed_XHN = jnp.isneginf(bias_XHN)
    others_XH1 = jax.nn.logsumexp(bias_XHN, axis=2, keepdims=True)
    number_XH1 = removed_XHN.sum(2, keepdims=True)
    offset_XH1 = math.log(share / (1 - share)) + others_XH1 - jnp.log(number_XH1)
    return jnp.where(removed_XHN, offset_XH1, bias_XHN)


def pairs_of(config: ml_collections.ConfigDict, model: Any) -> ml_collections.ConfigDict:
    """The configuration of a run with as many pairs and offsets as another model has.

    Args:
      config: the whole configuration of the run.
      model: section `model` of the other one.
    """
    config = config.copy_and_resolve_references().unlock()
    config.model.update({name: model[name] for name in FIELDS_OF_PAIRS})
    # A share is of a start, and needs offsets.
    config.model.persistent_share = 0.0
    return config
