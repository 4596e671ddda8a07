"""Checkpoints of the papers' own code: what comes in is what goes out, bit by bit, and what does
not fit is listed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden_data
import jax
import numpy as np
import pytest
from command_line import ROOT, call, flags, write_texts

import allattn
from allattn import sharding
from allattn.evaluation import scoring
from allattn.interchange import paper_checkpoints
from allattn.interchange.paper_checkpoints import to_ours, to_theirs
from allattn.interchange.paper_state_dicts import SOURCES
from allattn.model import Model
from allattn.storage import checkpoint

RECORDED = {
    "model_pers_span": "adaptive-span",
    "model_ff_span": "adaptive-span",
    "model_pers_span_adaptio_tied": "adaptive-span",
    "model_pers_span_adaptio_untied": "adaptive-span",
    "model_ff_adaptio_tied_div4": "adaptive-span",
    "txl_lm_plain": "transformer-xl",
    "txl_lm_adaptive": "transformer-xl",
    "txl_lm_adaptive_div2": "transformer-xl",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A run of the tiny network, and its texts."""
    place = tmp_path_factory.mktemp("convert")
    texts = write_texts(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(place / "prepared"))
        patch.chdir(ROOT)
        assert call("train", *flags(texts), f"--workdir={place / 'run'}").code == 0
        yield place / "run", texts


# The module of the papers' code that holds the persistent vectors of the first layer.
MEMORY = "module.layers.0.attn.attn.persistent_memory"


def convert(file: Path, texts: Path, workdir: Path, **changes: Any) -> Any:
    words = [f"--checkpoint={file}", *flags(texts, **changes), f"--workdir={workdir}"]
    return call("convert", "--source=adaptive-span", *words)


def exported(run: Path, file: Path) -> dict[str, np.ndarray]:
    assert (
        call("convert", "--source=adaptive-span", f"--workdir={run}", f"--export={file}").code == 0
    )
    with np.load(file) as arrays:
        return dict(arrays)


def test_there_and_back_is_bit_exact(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, texts = trained
    state = exported(run, tmp_path / "out.npz")
    assert convert(tmp_path / "out.npz", texts, tmp_path / "back").code == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        allattn.load(run).params,
        allattn.load(tmp_path / "back").params,
    )
    again = exported(tmp_path / "back", tmp_path / "again.npz")
    assert state.keys() == again.keys()
    for name in state:
        np.testing.assert_array_equal(state[name], again[name])


def test_bytes_have_the_numbers_of_the_papers(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """A state dict of fewer than 256 symbols is read with them, though bytes have their values."""
    run, texts = trained
    exported(run, tmp_path / "out.npz")
    back = tmp_path / "back"
    assert convert(tmp_path / "out.npz", texts, back, dataset__numbering="value").code == 0
    assert allattn.load(back).config.dataset.numbering == "appearance"
    assert allattn.load(back).vocabulary == allattn.load(run).vocabulary


KINDS = {
    "transformer": {"model__persistent": 0, "model__feed_forward": 24},
    "transformer_xl": {
        "model__persistent": 0,
        "model__feed_forward": 24,
        "model__span__adaptive": "false",
    },
    "all_attention": {"model__adaptive_io__cutoffs": "3,6", "model__adaptive_io__division": 2},
}


@pytest.mark.parametrize("layer", KINDS)
def test_other_models_there_and_back(
    trained: tuple[Path, Path], tmp_path: Path, layer: str
) -> None:
    """With what is stored twice in their state dicts: tied tables, masks and frequencies."""
    source = "transformer-xl" if layer == "transformer_xl" else "adaptive-span"
    words = flags(
        trained[1], model__layer=layer, train__steps=1, train__finetune_steps=0, **KINDS[layer]
    )
    assert call("train", *words, f"--workdir={tmp_path / 'run'}").code == 0
    assert (
        call(
            "convert",
            f"--source={source}",
            f"--workdir={tmp_path / 'run'}",
            f"--export={tmp_path / 'x.npz'}",
        ).code
        == 0
    )
    back = [f"--checkpoint={tmp_path / 'x.npz'}", *words, f"--workdir={tmp_path / 'back'}"]
    assert call("convert", f"--source={source}", *back).code == 0
    params = (allattn.load(tmp_path / name).params for name in ("run", "back"))
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_the_names_are_theirs(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Every key has the prefix, spans appear twice with the distances of their masks, linear maps
    are (out, in).
    """
    state = exported(trained[0], tmp_path / "out.npz")
    assert all(name.startswith("module.") for name in state)
    attention = "module.layers.0.attn.attn."
    span = state[f"{attention}adaptive_span._mask.current_val"]
    np.testing.assert_array_equal(
        span, state[f"{attention}persistent_memory.adaptive_span._mask.current_val"]
    )
    np.testing.assert_array_equal(
        state[f"{attention}adaptive_span._mask.mask_template"], np.arange(-31, 1)
    )
    assert span.shape == (2, 1, 1) and state["module.key_pe"].shape == (1, 8, 32)
    query = allattn.load(trained[0]).params["layers"]["query"][0].reshape(16, 16)
    np.testing.assert_array_equal(state["module.layers.0.attn.proj_query.weight"], query.T)


def test_a_converted_workdir_is_an_ordinary_one(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """It is evaluated as the run that it came from, generates, and trains on from step 0."""
    run, texts = trained
    exported(run, tmp_path / "out.npz")
    assert convert(tmp_path / "out.npz", texts, tmp_path / "back").code == 0
    before = call("evaluate", f"--workdir={run}").last()
    after = call("evaluate", f"--workdir={tmp_path / 'back'}").last()
    assert after["step"] == 0 and after["nll"] == before["nll"]
    assert call("generate", f"--workdir={tmp_path / 'back'}", "--prompt=a", "--length=3").code == 0
    tuned = flags(
        texts, optimizer__learning_rate=1e-3
    )  # no state of an optimizer stands against other settings
    assert call("train", *tuned, f"--workdir={tmp_path / 'back'}").last()["step"] == 12
    first = json.loads((tmp_path / "back" / "metrics.jsonl").read_text().splitlines()[0])
    fresh = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["nll"] < fresh["nll"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda state: state.pop("module.key_pe"), "1 missing (key_pe)"),
        (
            lambda state: state.update({"module.extra": np.zeros(1)}),
            "1 with no place in this configuration (extra)",
        ),
        (
            lambda state: state.update({"module.in_emb.weight": np.zeros((3, 16))}),
            "in_emb.weight: expected shape (9, 16), found (3, 16)",
        ),
        (
            lambda state: state.update(
                {f"{MEMORY}.adaptive_span._mask.current_val": np.ones((2, 1, 1))}
            ),
            "with which it is shared",
        ),
    ],
)
def test_keys_that_do_not_fit_are_listed(
    trained: tuple[Path, Path], tmp_path: Path, damage: Any, expected: str
) -> None:
    state = exported(trained[0], tmp_path / "out.npz")
    damage(state)
    np.savez(tmp_path / "damaged.npz", **state)
    found = convert(tmp_path / "damaged.npz", trained[1], tmp_path / "back")
    assert found.code == 2 and expected in found.err and found.err.count("\n") == 1
    assert not (tmp_path / "back").exists()


def test_other_mistakes(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, texts = trained
    exported(run, tmp_path / "out.npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "out.npz").read_bytes()[:300])
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    for found, expected in (
        *(
            (convert(tmp_path / f"{x}.npz", texts, tmp_path / "b"), "cannot be read")
            for x in ("empty", "cut", "one")
        ),
        (
            call(
                "convert",
                "--source=adaptive-span",
                f"--workdir={run}",
                f"--export={tmp_path / 'no' / 'x.npz'}",
            ),
            "--export: expected a new file",
        ),
        (convert(tmp_path / "out.npz", texts, run), "--workdir: expected one without checkpoints"),
        (convert(tmp_path / "none.npz", texts, tmp_path / "b"), "--checkpoint: expected a file"),
        (convert(tmp_path / "out.npz", texts, tmp_path / "b", model__heads=4), "keys do not fit"),
        (
            convert(tmp_path / "out.npz", texts, tmp_path / "b", model__vocab_size=8),
            "model.vocab_size: expected",
        ),
        (
            call("convert", "--source=gpt", f"--workdir={run}", f"--export={tmp_path / 'x.npz'}"),
            "--source: expected",
        ),
        (
            call(
                "convert",
                "--source=transformer-xl",
                f"--workdir={run}",
                f"--export={tmp_path / 'x.npz'}",
            ),
            "expected model.layer in ('transformer_xl',)",
        ),
        (
            call(
                "convert",
                "--source=adaptive-span",
                f"--workdir={run}",
                f"--export={tmp_path / 'out.npz'}",
            ),
            "--export: expected a new file",
        ),
        (
            call("convert", "--source=adaptive-span", f"--workdir={run}"),
            "expected --checkpoint and --config",
        ),
    ):
        assert found.code == 2 and expected in found.err and found.err.count("\n") == 1, found.err
    assert not (tmp_path / "b").exists() and not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("sinks", 2), ("qk_norm", True), ("persistent_gain", "gain"), ("pre_norm", True)]
    + [("feed_forward", 8), ("persistent_bias", True)],
)
def test_models_that_are_ours_alone(
    trained: tuple[Path, Path], tmp_path: Path, field: str, value: Any
) -> None:
    """What the papers' code does not have is refused by name, before a file is written."""
    run, texts = trained
    exported(run, tmp_path / "out.npz")
    found = convert(tmp_path / "out.npz", texts, tmp_path / "b", **{f"model__{field}": value})
    expected = f"allattn: --source=adaptive-span: expected model.{field} "
    assert found.code == 2 and found.err.startswith(expected) and found.err.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_torch_files(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """A state dict alone or under `model`; anything that is not a tensor is not unpickled."""
    torch = pytest.importorskip("torch")
    run, texts = trained
    state = {name: torch.from_numpy(x) for name, x in exported(run, tmp_path / "out.npz").items()}
    torch.save(state, tmp_path / "alone.pt")
    torch.save({"model": state, "iter_no": 3}, tmp_path / "inside.pt")
    torch.save({"model": Path("no tensor")}, tmp_path / "other.pt")
    for name in ("alone", "inside"):
        assert convert(tmp_path / f"{name}.pt", texts, tmp_path / name).code == 0
        jax.tree.map(
            np.testing.assert_array_equal,
            allattn.load(run).params,
            allattn.load(tmp_path / name).params,
        )
    found = convert(tmp_path / "other.pt", texts, tmp_path / "other")
    assert (
        found.code == 2 and "holds no state dict" in found.err and not (tmp_path / "other").exists()
    )


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_state_dicts(name: str) -> None:
    """Tensors of the papers' own models lie here where the tests of the golden numbers put them,
    and come back.
    """
    g = golden_data.load(name)
    source = RECORDED[name]
    theirs = source == "adaptive-span"
    config = golden_data.layer_config(g) if theirs else golden_data.xl_config(g)
    state = {key.removeprefix("p."): x for key, x in g.items() if key.startswith("p.")}
    abstract = jax.eval_shape(Model(config).init, jax.random.key(0))
    entries = SOURCES[source].entries(config)
    params = to_ours(state, abstract, entries)
    expected = (golden_data.params if theirs else golden_data.xl_params)(g, config, "p.")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    back = to_theirs(params, entries)
    assert back.keys() == state.keys()
    for key in state:
        np.testing.assert_array_equal(back[key], state[key])


def test_parameters_that_they_lack(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither left out of an export nor made up in an import, also of a field that is not listed
    as ours alone.
    """
    monkeypatch.setattr(paper_checkpoints, "OURS_ALONE", ())
    run, texts = trained
    exported(run, tmp_path / "out.npz")
    found = convert(tmp_path / "out.npz", texts, tmp_path / "back", model__persistent_bias=True)
    message = "expected parameters that its code has, found layers/persistent_bias"
    assert found.code == 2 and f"--source=adaptive-span: {message}" in found.err
    assert not (tmp_path / "back").exists()


WORD_MODELS = ["model_pers_span_adaptio_tied", "model_pers_span_adaptio_untied"]


@pytest.mark.parametrize("name", WORD_MODELS)
def test_scores_of_word_models(name: str, tmp_path: Path, own_data_dir: None) -> None:
    """What the papers' code printed for its own checkpoint, from the state dict to `evaluate`."""
    g = golden_data.load(name)
    state = {f"module.{key[2:]}": x for key, x in g.items() if key.startswith("p.")}
    np.savez(tmp_path / "theirs.npz", **state)
    # As many symbols as the model has, with <unk> and the end of a line.
    words = [f"w{i:02}" for i in range(1, 39)]
    lines = [" ".join(words[: 39 - i]) for i in range(1, 39)]
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "valid", "test"):
        (texts / f"{split}.txt").write_text("\n".join(lines) + "\n" * 10)
    config = golden_data.layer_config(g)
    changes: dict[str, Any] = {
        "model__depth": config.depth,
        "model__width": config.width,
        "model__heads": config.heads,
        "model__persistent": config.persistent,
        "model__span__limit": config.limit,
        "model__span__ramp": config.ramp,
        "model__adaptive_io__cutoffs": "10,20",
        "model__adaptive_io__division": config.division,
        "model__adaptive_io__tied": config.tied,
        "dataset__unit": "word",
    }
    words = [f"--checkpoint={tmp_path / 'theirs.npz'}", *flags(texts, **changes)]
    done = call("convert", "--source=adaptive-span", *words, f"--workdir={tmp_path / 'run'}")
    assert done.code == 0, done.err

    # The two recorded streams, four times each: `authors` scores eight.
    run = allattn.load(tmp_path / "run")
    assert run.config.model.span.epsilon == 1e-8
    tokens = np.tile(g["tokens"], (4, 1)).ravel()
    mesh = sharding.mesh_over_rows()
    options = {"protocol": "authors", "block": int(g["block"]), "mesh": mesh}
    found = scoring.evaluate_tokens(run.model, run.params, tokens, **options)
    assert found["nll"] == pytest.approx(g["nll"].mean(), rel=1e-6)


# --- numbers that are none ------------------------------------------------------------------------


def overwritten(run: Path, workdir: Path, leaf: str, value: float) -> Path:
    """The run's parameters as those of a new workdir, with one number changed."""
    with checkpoint.Checkpointer(run, create=False) as checkpoints:
        meta = checkpoints.restore_meta()
    params = jax.tree.map(np.array, allattn.load(run).params)
    part = params[leaf.split("/")[0]]
    part[leaf.split("/")[1]].flat[0] = value
    with checkpoint.Checkpointer(workdir) as checkpoints:
        checkpoints.save_params(0, params, {**meta, "step": 0, "params_only": True})
    return workdir


def strict(text: str) -> Any:
    """JSON without the words that only Python knows."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_scores_that_are_not_numbers(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """JSON says null, and one line says why the command has failed."""
    broken = overwritten(trained[0], tmp_path / "broken", "io/bias", np.nan)
    found = call("evaluate", f"--workdir={broken}")
    scores = strict(found.out.splitlines()[-1])
    assert found.code == 1 and scores["nll"] is scores["bpc"] is None and scores["tokens"] > 100
    assert (
        found.err.startswith("allattn: nll, bpc, ppl: expected finite")
        and len(found.err.splitlines()) == 1
    )
    # Training that has nothing left to do ends in the same way.
    words = flags(trained[1], train__steps=0, train__finetune_steps=0)
    again = call("train", *words, f"--workdir={broken}")
    assert again.code == 1 and strict(again.out.splitlines()[-1])["nll"] is None
    assert strict((broken / "scores.json").read_text())["nll"] is None


@pytest.mark.parametrize("span", [-7.0, 1.5, np.nan])
def test_a_checkpoint_with_no_span(trained: tuple[Path, Path], tmp_path: Path, span: float) -> None:
    broken = overwritten(trained[0], tmp_path / "broken", "layers/span", span)
    words = flags(trained[1])
    for command, *rest in (("evaluate",), ("generate", "--prompt=a"), ("train", *words)):
        found = call(command, *rest, f"--workdir={broken}")
        assert found.code == 2 and found.err.count("\n") == 1
        assert "expected spans from 0 to 1" in found.err and f"{span:g}" in found.err
    begun = call(
        "train", *flags(trained[1], train__init_from=broken), f"--workdir={tmp_path / 'x'}"
    )
    assert begun.code == 2 and "train.init_from: " in begun.err and "spans from 0" in begun.err
