"""Generation against the training-mode forward pass, and the draws against their definitions.

Dimension key: X layer, B batch, T position, S cached position, H head, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import KINDS, geometry, naive_forward, random_params

from allattn.data import Vocabulary
from allattn.errors import UserError
from allattn.evaluation import sampling
from allattn.evaluation.sampling import Sampling
from allattn.model import Model, Params
from allattn.run import Run
from configs import base

PROMPT = np.random.default_rng(1).integers(29, size=150)
SHORT = {"adaptive": False, "limit": 12}


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Collects logits_V of every call of `advance`."""
    advance = sampling.advance
    collected = []

    def spy(*arguments: Any) -> Any:
        cache, logits_V = advance(*arguments)
        collected.append(np.asarray(logits_V))
        return cache, logits_V

    monkeypatch.setattr(sampling, "advance", spy)
    return collected


def tiny(**changes: Any) -> tuple[Model, Params]:
    model = Model(geometry(**changes))
    return model, random_params(model)


@pytest.mark.parametrize(
    ("changes", "slack", "block", "prompt", "length"),
    [
        (
            {},
            8,
            8,
            70,
            30,
        ),  # learned spans, a cache of 64 places of the 160; blocks fill the free places exactly
        (
            {**SHORT, "implementation": None},
            sampling.SLACK,
            sampling.PROMPT_BLOCK,
            2 * sampling.PROMPT_BLOCK + 3,
            280,
        ),
    ],
    ids=["spans", "real-sizes"],
)
def test_logits_equal_the_training_pass(
    logits: list,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    slack: int,
    block: int,
    prompt: int,
    length: int,
) -> None:
    """Every step, across shifts of the cache, predicts what one pass over prompt and continuation
    predicts.
    """
    monkeypatch.setattr(sampling, "SLACK", slack)
    monkeypatch.setattr(sampling, "PROMPT_BLOCK", block)
    model, params = tiny(**changes)
    drawn = list(sampling.generate(model, params, PROMPT[:prompt], length, seed=5))
    assert len(drawn) == length and prompt + length > slack, "the cache must be shifted"
    text_T = np.concatenate([PROMPT[:prompt], drawn])
    expected_TV = naive_forward(
        Model(geometry(**{**changes, "implementation": "reference"})),
        params,
        text_T[None],
        len(text_T) - 1,
    )[0][0]
    steps_V = np.stack(logits[-length:])
    np.testing.assert_allclose(steps_V, expected_TV[prompt - 1 :], atol=1e-4, rtol=0)
    assert np.ptp(expected_TV) > 1, "the logits must differ by far more than the tolerance"


@pytest.mark.parametrize(
    "name", ["bias", "epsilon", "head_split", "transformer", "transformer_xl", "stable"]
)
def test_kinds(logits: list, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same for the other kinds of layers; Transformer-XL's begins with an empty memory, and its
    window slides.
    """
    monkeypatch.setattr(sampling, "SLACK", 8)
    monkeypatch.setattr(sampling, "PROMPT_BLOCK", 8)
    model, params = tiny(**KINDS[name])
    drawn = list(sampling.generate(model, params, PROMPT[:19], 12, seed=5))
    text_T = np.concatenate([PROMPT[:19], drawn])
    expected_TV = naive_forward(
        model.windowed(model.config.limit), params, text_T[None], len(text_T) - 1
    )[0][0]
    scale = np.ptp(expected_TV)
    np.testing.assert_allclose(
        np.stack(logits[-12:]) / scale, expected_TV[18:] / scale, atol=1e-5, rtol=0
    )
    assert scale > 1


def test_constant_time_per_token() -> None:
    """What is compiled does not depend on how long prompt and text are: a block, and one token."""
    model, params = tiny(**SHORT)
    counts = []
    for function in (sampling.advance, sampling._make_room, sampling.draw):
        function.clear_cache()
    for prompt, length in ((70, 3), (150, 300), (1, 20)):
        assert len(list(sampling.generate(model, params, PROMPT[:prompt], length))) == length
        counts.append(sampling.advance._cache_size())
    assert counts == [2, 2, 2]
    assert sampling._make_room._cache_size() == sampling.draw._cache_size() == 1


def test_seed() -> None:
    model, params = tiny(**SHORT)
    first = list(sampling.generate(model, params, PROMPT[:5], 40, seed=1))
    again = list(sampling.generate(model, params, PROMPT[:5], 40, seed=1))
    other = list(sampling.generate(model, params, PROMPT[:5], 40, seed=2))
    assert first == again and first != other
    assert list(sampling.generate(model, params, PROMPT[:5], 15, seed=1)) == first[:15]


@pytest.mark.parametrize(
    "options",
    [
        Sampling(0.0),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_p=1e-6),
        Sampling(1e-40),
        Sampling(5.0, 3, 1e-6),
    ],
    ids=str,
)
def test_greedy(logits: list, options: Sampling) -> None:
    """Temperature 0, and whatever leaves only the likeliest symbol."""
    model, params = tiny(**SHORT)
    drawn = list(sampling.generate(model, params, PROMPT[:5], 12, options, seed=3))
    assert drawn == [int(logits_V.argmax()) for logits_V in logits[-12:]]
    assert len(set(drawn)) > 1


def frequencies(logits_V: np.ndarray, options: Sampling, draws: int = 20_000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), draws)
    found = jax.jit(jax.vmap(lambda key: sampling.draw(jnp.asarray(logits_V), key, options)))(keys)
    return np.bincount(found, minlength=len(logits_V)) / draws


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (Sampling(), lambda p: p > 0),
        (Sampling(0.5), lambda p: p > 0),
        (Sampling(2.0), lambda p: p > 0),
        (Sampling(top_k=3), lambda p: p >= 0.15),
        (Sampling(top_k=100), lambda p: p > 0),
        (
            Sampling(top_p=0.6),
            lambda p: p >= 0.25,
        ),  # 0.4 alone is too little, 0.4 and 0.25 reach it
        (Sampling(top_p=0.7), lambda p: p >= 0.15),
        (
            Sampling(top_k=4, top_p=0.8),
            lambda p: p >= 0.15,
        ),  # of 0.9 that top-k leaves, 0.4 and 0.25 are 0.72
    ],
    ids=lambda x: str(x) if isinstance(x, Sampling) else "",
)
def test_draws(options: Sampling, kept: Callable[[np.ndarray], np.ndarray]) -> None:
    """Symbols come as often as temperature, top-k and top-p say."""
    probability_V = np.array([0.1, 0.4, 0.06, 0.15, 0.25, 0.04])
    expected_V = np.where(kept(probability_V), probability_V, 0) ** (1 / options.temperature)
    expected_V /= expected_V.sum()
    found_V = frequencies(np.log(probability_V) + 3, options)
    np.testing.assert_allclose(found_V, expected_V, atol=0.015)
    assert (found_V[expected_V == 0] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": PROMPT[:0]}, "--prompt: expected at least one symbol"),
        ({"length": -1}, "length -1"),
        ({"sampling": Sampling(-0.1)}, "temperature -0.1"),
        ({"sampling": Sampling(float("nan"))}, "temperature nan"),
        ({"sampling": Sampling(top_k=-1)}, "top_k -1"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p 0.0"),
        ({"sampling": Sampling(top_p=1.1)}, "top_p 1.1"),
        ({"seed": -1}, "--seed: expected"),
        ({"seed": 2**32}, "--seed: expected a whole number from 0 to 4294967295, found 4294967296"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x,
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    """At once, not when the first symbol is asked for."""
    model = Model(geometry())
    with pytest.raises(UserError, match=message):
        sampling.generate(model, {}, **{"prompt": PROMPT[:5], "length": 3, **changes})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (b"the", b" the cat\nsat\n\nthe"),
        (b"the\n", b"the cat\nsat\n\nthe"),
        (b"the ", b"the cat\nsat\n\nthe"),
    ],
)
def test_words_come_apart(monkeypatch: pytest.MonkeyPatch, prompt: bytes, expected: bytes) -> None:
    """By single spaces, and lines begin and end without one."""
    words = Vocabulary("word", ("\n", "the", "cat", "sat"))
    monkeypatch.setattr(sampling, "generate", lambda *_: iter([1, 2, 0, 3, 0, 0, 1]))
    assert (
        b"".join(Run(Model(geometry()), {}, base.get_config(), words, 0).generate(prompt))
        == expected
    )


def test_bytes_come_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = Vocabulary("byte", ("\n", "a", " ", "\xff"))
    monkeypatch.setattr(sampling, "generate", lambda *_: iter([1, 2, 0, 3, 1]))
    assert list(Run(Model(geometry()), {}, base.get_config(), letters, 0).generate(b"a")) == [
        b"a",
        b" ",
        b"\n",
        b"\xff",
        b"a",
    ]


def test_run_refuses_at_once() -> None:
    run = Run(Model(geometry()), {}, base.get_config(), Vocabulary("byte", ("\n", "a")), 0)
    for prompt, message in ((b"ab", "byte b'b' at offset 1"), (b"", "--prompt: expected")):
        with pytest.raises(UserError, match=message):
            run.generate(prompt)
