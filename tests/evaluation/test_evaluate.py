"""The evaluation protocols against plain loops over the training-mode forward pass.

Dimension key: R row of parallel work, T position in the block.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny_model import KINDS, geometry, naive_forward, random_params

from allattn.data import Vocabulary
from allattn.errors import UserError
from allattn.evaluation import protocols, scoring
from allattn.model import Model, Params
from allattn.sharding import mesh_over_rows

COVERAGE = json.loads((Path(__file__).parents[1] / "golden" / "data_pipeline.json").read_text())[
    "full_eval_coverage"
]
REAL_TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "enwik8_slice" / "valid.txt"
MESH = mesh_over_rows()
TOKENS = np.random.default_rng(0).integers(29, size=500)


def naive_nll(model: Model, params: Params, rows_RT: np.ndarray, block: int) -> np.ndarray:
    return naive_forward(model, params, rows_RT, block)[1]


def scored(plan: protocols.Plan, tokens: int, block: int) -> list[int]:
    """Indices of the targets that a plan scores, row by row, as the evaluation reads them from its
    blocks.
    """
    found: list[list[int]] = [[] for _ in plan.begin_R]
    for number in range(plan.blocks):
        inputs_RT, targets_RT, scored_RT = scoring.read_block(
            np.arange(tokens), plan, block, number
        )
        assert ((targets_RT == inputs_RT + 1) | ~scored_RT).all()
        for row, (targets_T, scored_T) in enumerate(zip(targets_RT, scored_RT, strict=True)):
            found[row] += targets_T[scored_T].tolist()
    return [target for row in found for target in row]


@pytest.mark.parametrize("case", COVERAGE, ids=lambda c: f"T{c['T']}-M{c['block']}")
@pytest.mark.parametrize("rest", [0, 7])
def test_authors_coverage(case: dict[str, int], rest: int) -> None:
    """The golden targets in each of 8 streams; what does not fill the streams is dropped."""
    length = case["T"]
    tokens = 8 * case["T"] + rest
    plan = protocols.authors_plan(tokens, case["block"])
    row = range(case["first_target"], case["last_target"] + 1)
    assert len(row) == case["scored"] and plan.blocks == case["blocks"]
    assert scored(plan, tokens, case["block"]) == [r * length + t for r in range(8) for t in row]


@pytest.mark.parametrize("tokens", [2, 3, 50, 101])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("block", [3, 8, 50])
@pytest.mark.parametrize("warm_up", [0, 1, 20])
def test_full_coverage(tokens: int, rows: int, block: int, warm_up: int) -> None:
    """Targets 1..T-1, each once, after at least `warm_up` tokens or all there are."""
    plan = protocols.full_plan(tokens, block, rows, warm_up)
    assert scored(plan, tokens, block) == list(range(1, tokens))
    assert (plan.begin_R == np.maximum(0, plan.first_R - 1 - warm_up)).all()


def test_authors_equals_the_training_pass() -> None:
    model = Model(geometry())
    params = random_params(model)
    block = 8
    found = scoring.evaluate_tokens(
        model, params, TOKENS, protocol="authors", block=block, mesh=MESH
    )
    nll_RT = naive_nll(model, params, TOKENS[: 8 * (len(TOKENS) // 8)].reshape(8, -1), block)
    assert found["tokens"] == nll_RT.size == 8 * 56
    assert found["nll"] == pytest.approx(nll_RT.mean(), rel=2e-6)
    assert found["bpc"] == pytest.approx(nll_RT.mean() / math.log(2), rel=2e-6)
    assert found["ppl"] == pytest.approx(math.exp(nll_RT.mean()), rel=2e-5)


@pytest.mark.parametrize(
    ("adaptive", "block", "rows"), [(True, 3, 2), (True, 8, 1), (True, 50, 5), (False, 50, 5)]
)
def test_full_does_not_depend_on_the_work(adaptive: bool, block: int, rows: int) -> None:
    """Every way to cut the work gives what one pass over the whole text gives."""
    limit = 160 if adaptive else 24
    # None is what users run.
    implementation = None if rows == 5 else "reference"
    model = Model(geometry(adaptive=adaptive, limit=limit, implementation=implementation))
    params = random_params(model)
    assert scoring.scoring_context(model, params) == (64 if adaptive else 24)
    plain = Model(geometry(adaptive=adaptive, limit=limit))
    whole = naive_nll(plain, params, TOKENS[None], len(TOKENS) - 1)
    found = scoring.evaluate_tokens(
        model, params, TOKENS, protocol="full", block=block, rows=rows, mesh=MESH
    )
    assert found["tokens"] == len(TOKENS) - 1
    assert found["nll"] == pytest.approx(whole.mean(), rel=2e-6)


@pytest.mark.parametrize("protocol", ["authors", "full"])
def test_words_without_line_ends(protocol: str) -> None:
    """`ppl` counts every target; `ppl_words` leaves line ends out of both its sums, and bytes have
    none.
    """
    model = Model(geometry())
    end = 7
    params = random_params(model)
    block = 8
    symbols = [chr(ord("!") + i) for i in range(29)]
    symbols[end] = "\n"
    options = {"protocol": protocol, "block": block, "rows": 3, "mesh": MESH}
    words, letters = (
        scoring.evaluate_tokens(
            model, params, TOKENS, vocabulary=Vocabulary(unit, tuple(symbols)), **options
        )
        for unit in ("word", "byte")
    )
    rows_RT, block = (
        (TOKENS[None], len(TOKENS) - 1)
        if protocol == "full"
        else (TOKENS[:496].reshape(8, -1), block)
    )
    nll_RT = naive_nll(model, params, rows_RT, block)
    word_RT = rows_RT[:, 1 : 1 + nll_RT.shape[1]] != end
    assert 0.9 < word_RT.mean() < 1 and words["tokens"] == nll_RT.size
    assert words["ppl"] == pytest.approx(math.exp(nll_RT.mean()), rel=1e-5)
    assert words["ppl_words"] == pytest.approx(math.exp(nll_RT[word_RT].mean()), rel=1e-5)
    assert abs(words["ppl_words"] / words["ppl"] - 1) > 1e-3, (
        "line ends must make a difference that is seen"
    )
    assert letters == pytest.approx(
        {name: value for name, value in words.items() if name != "ppl_words"}, rel=1e-6
    )


def test_words_of_nothing_but_line_ends() -> None:
    model = Model(geometry())
    options = {
        "protocol": "full",
        "block": 8,
        "mesh": MESH,
        "vocabulary": Vocabulary("word", ("\n", "a")),
    }
    found = scoring.evaluate_tokens(model, random_params(model), np.zeros(20, np.int32), **options)
    assert found["tokens"] == 19 and "ppl_words" not in found


@pytest.mark.parametrize(
    "name",
    [
        "bias",
        "epsilon",
        "head_split",
        "single_head",
        "transformer",
        "transformer_xl",
        "pre_norm",
        "stable",
        "sublayer",
    ],
)
def test_kinds(name: str) -> None:
    """`authors` is the training pass, and `full` one pass over the whole text, for the other kinds
    of layers.
    """
    model = Model(geometry(**KINDS[name]))
    params = random_params(model)
    tokens = TOKENS[:200]
    rows_RT = tokens.reshape(8, -1)
    authors = scoring.evaluate_tokens(model, params, tokens, protocol="authors", block=8, mesh=MESH)
    assert authors["nll"] == pytest.approx(naive_nll(model, params, rows_RT, 8).mean(), rel=2e-6)
    whole = naive_nll(model.windowed(model.config.limit), params, tokens[None], len(tokens) - 1)
    full = scoring.evaluate_tokens(
        model, params, tokens, protocol="full", block=16, rows=2, mesh=MESH
    )
    assert full["nll"] == pytest.approx(whole.mean(), rel=2e-6)


@pytest.mark.parametrize(("tokens", "block"), [(100, 8), (107, 3), (500, 49), (20, 8)])
def test_xl_coverage(tokens: int, block: int) -> None:
    """10 streams, every target but the first of each, the short last block included; the rest is
    dropped.
    """
    length = tokens // 10
    plan = protocols.xl_plan(tokens, block)
    assert scored(plan, tokens, block) == [
        r * length + t for r in range(10) for t in range(1, length)
    ]


@pytest.mark.parametrize("name", ["transformer_xl", "pre_norm"])
def test_xl(name: str) -> None:
    """Other lengths than in training, clamped distances, an empty memory at the start, weighted by
    tokens.
    """
    model = Model(geometry(**KINDS[name]))
    params = random_params(model)
    lengths = protocols.Lengths(target=7, memory=20, clamp=9)
    options = {"protocol": "xl", "block": 16, "lengths": lengths, "mesh": MESH}
    found = scoring.evaluate_tokens(model, params, TOKENS, **options)
    rows_RT = TOKENS.reshape(10, -1)
    whole = naive_nll(model.windowed(20, 9), params, rows_RT, rows_RT.shape[1] - 1)
    assert found["tokens"] == whole.size == 490
    assert found["nll"] == pytest.approx(whole.mean(), rel=2e-6)
    other = scoring.evaluate_tokens(
        model, params, TOKENS, **{**options, "lengths": lengths._replace(clamp=0)}
    )
    assert abs(other["nll"] - found["nll"]) > 1e-4, "the clamp must matter"


def test_real_text() -> None:
    """A piece of Wikipedia by both protocols."""
    if not REAL_TEXT.exists():
        pytest.skip(f"{REAL_TEXT.name} of enwik8_slice is not on this machine")
    text = REAL_TEXT.read_bytes()[:600]
    tokens = Vocabulary.from_text(text).encode(text)
    model = Model(geometry())
    params = random_params(model)
    full = scoring.evaluate_tokens(model, params, tokens, protocol="full", block=8, mesh=MESH)
    authors = scoring.evaluate_tokens(model, params, tokens, protocol="authors", block=8, mesh=MESH)
    assert (full["tokens"], authors["tokens"]) == (599, 8 * 72)
    assert authors["nll"] == pytest.approx(
        naive_nll(model, params, tokens.reshape(8, -1), 8).mean(), rel=2e-6
    )
    assert 1e-4 < abs(full["nll"] - authors["nll"]) < 0.1, (
        "the protocols must differ on this text, but not by much"
    )


def test_refusals() -> None:
    model = Model(geometry())
    params = random_params(model)
    with pytest.raises(UserError, match="expected one of .*, found 'ful'"):
        scoring.evaluate_tokens(model, params, TOKENS, protocol="ful", block=8, mesh=MESH)
    with pytest.raises(UserError, match="authors: expected at least 72 tokens, found 71"):
        scoring.evaluate_tokens(model, params, TOKENS[:71], protocol="authors", block=8, mesh=MESH)
    assert protocols.authors_plan(72, 8).blocks == 1
    with pytest.raises(
        UserError, match="protocol xl: expected model.layer transformer_xl, found all_attention"
    ):
        scoring.evaluate_tokens(model, params, TOKENS, protocol="xl", block=8, mesh=MESH)
    with pytest.raises(UserError, match="xl: expected at least 20 tokens, found 19"):
        protocols.xl_plan(19, 8)
    for tokens in (0, 1):
        with pytest.raises(UserError, match=f"full: expected at least 2 tokens, found {tokens}"):
            scoring.evaluate_tokens(
                model, params, TOKENS[:tokens], protocol="full", block=8, mesh=MESH
            )
    assert (
        scoring.evaluate_tokens(model, params, TOKENS[:2], protocol="full", block=8, mesh=MESH)[
            "tokens"
        ]
        == 1
    )
