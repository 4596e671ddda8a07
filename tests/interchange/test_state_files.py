"""State dicts in files of others: what holds the numbers of a network is imported, all else is
refused with one line, before it costs memory or runs.
"""

import io
import os
import pickle
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from tiny_model import geometry, random_params

from allattn.errors import UserError
from allattn.interchange import paper_checkpoints, state_files
from allattn.interchange.paper_state_dicts import SOURCES, State
from allattn.model import Model
from allattn.model.parameters import check_spans

MODEL = Model(geometry())
TABLE = SOURCES["adaptive-span"]
ENTRIES = TABLE.entries(MODEL.config)
# A span, which their code stores twice, and a parameter.
SPAN = "layers.1.attn.attn.adaptive_span._mask.current_val"
SPAN_COPY = "layers.1.attn.attn.persistent_memory.adaptive_span._mask.current_val"
NORM = "layers.0.norm1.weight"


def theirs() -> State:
    """A state dict of the tiny network as their code saves it, but for the prefix."""
    params = jax.tree.map(np.asarray, random_params(MODEL))
    state = paper_checkpoints.to_theirs(params, ENTRIES)
    for copy, original in TABLE.copies(MODEL.config).items():
        state[copy] = state[original]
    return state | TABLE.constants(MODEL.config)


STATE = theirs()


def write(path: Path, changes: dict[str, Any] | None = None, prefix: str = "") -> str:
    """An .npz with that state dict, and with what is changed in it."""
    named: dict[str, Any] = {prefix + name: x for name, x in (STATE | (changes or {})).items()}
    np.savez(path, **named)
    return str(path)


def read(file: str) -> State:
    return paper_checkpoints._read(file, TABLE, MODEL)


def refusal(file: str) -> str:
    """The line that a file is refused with."""
    with pytest.raises(UserError) as refused:
        read(file)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 600
    return line


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.net."]
)
def test_a_prefix_is_left_out_and_named(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state = read(write(tmp_path / "x.npz", prefix=prefix))
    np.testing.assert_array_equal(state["key_pe"], STATE["key_pe"])
    assert len(state) == len({entry.theirs for entry in ENTRIES})
    said = capsys.readouterr().out
    # The one that their own code writes is no news.
    if prefix in ("", "module."):
        assert said == ""
    else:
        assert said.endswith(f"x.npz: names are read without their prefix {prefix!r}\n")


def test_what_has_no_prefix_has_no_place(tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz", prefix="model.")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("loss.weight.npy", npy(np.ones(3, np.float32)))
    assert "1 keys do not fit" in refusal(file) and "(loss.weight)" in refusal(file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("key_pe.npy", npy(STATE["key_pe"]))
    assert "expected key_pe once" in refusal(file)


def test_a_mismatch_names_the_first_few(tmp_path: Path) -> None:
    """Of a larger network than the configuration's, and of another program's."""
    more = {f"layers.{i}.norm1.weight": STATE[NORM] for i in range(2, 50)}
    assert "48 keys do not fit the configuration: 48 with no place" in refusal(
        write(tmp_path / "more.npz", more)
    )
    np.savez(tmp_path / "other.npz", **{f"h.{i}.attn.weight": np.ones(2) for i in range(99)})
    line = refusal(str(tmp_path / "other.npz"))
    assert "missing (key_pe, in_emb.weight, out_emb.weight, ...); 99 with no place" in line


# --- numbers -------------------------------------------------------------------------------------


def changed(name: str, place: int, value: float, kind: Any = np.float32) -> dict[str, Any]:
    x = STATE[name].astype(kind)
    x.flat[place] = value
    return {name: x}


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.longdouble, ">f4"])
def test_floats_of_any_width(kind: Any, tmp_path: Path) -> None:
    state = read(write(tmp_path / "x.npz", {name: x.astype(kind) for name, x in STATE.items()}))
    assert {x.dtype for x in state.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(state[NORM], STATE[NORM].astype(kind).astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (changed(NORM, 3, np.nan), "expected finite numbers, found NaN or infinity 1 times"),
        (changed(NORM, 3, -np.inf), "expected finite numbers, found NaN or infinity 1 times"),
        (
            changed(NORM, 3, 1e39, np.float64),
            "expected no number beyond 1e+06, as in a trained network, found 1 in float64",
        ),
        (
            changed(NORM, 3, -1e30),
            "expected no number beyond 1e+06, as in a trained network, found 1 in float32",
        ),
        ({NORM: STATE[NORM] + 1j}, "expected floating-point numbers, found complex64"),
        ({NORM: STATE[NORM] > 0}, "expected floating-point numbers, found bool"),
        ({NORM: STATE[NORM].astype(np.int8)}, "expected floating-point numbers, found int8"),
        ({NORM: STATE[NORM].astype("U8")}, "expected floating-point numbers, found str"),
        ({NORM: STATE[NORM].view("V4")}, "expected floating-point numbers, found void32"),
        ({NORM: STATE[NORM].view([("a", "f4")])}, "expected floating-point numbers, found void32"),
        ({NORM: STATE[NORM].astype(object)}, "expected floating-point numbers, found object"),
    ],
)
def test_numbers_of_no_network(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """The message names the tensor, what is wrong with it, and how often."""
    line = refusal(write(tmp_path / "x.npz", changes))
    assert f"{NORM}: {expected}" in line


@pytest.mark.parametrize("span", [-7.0, 1.01, np.nan])
def test_spans_are_shares(span: float, tmp_path: Path) -> None:
    """In a file and in the parameters of a checkpoint."""
    file = write(tmp_path / "x.npz", changed(SPAN, 0, span) | changed(SPAN_COPY, 0, span))
    if np.isfinite(span):
        params = paper_checkpoints.to_ours(read(file), MODEL_SHAPES, ENTRIES)
        with pytest.raises(UserError, match=rf"from 0 to 1, .* found .*{span:g}"):
            check_spans(params, file)
    else:
        assert SPAN in refusal(file)


MODEL_SHAPES = jax.eval_shape(MODEL.init, jax.random.key(0))


# --- files that lie ------------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape: str, kind: str = "<f4") -> bytes:
    """The beginning of an .npy that announces this."""
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


class Harmful:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


MEMBERS: dict[str, Callable[[], bytes]] = {
    "text": lambda: b"no array",
    "empty": lambda: b"",
    "2^36 elements": lambda: header("(68719476736,)"),
    "2^70 elements": lambda: header("(1180591620717411303424,)"),
    "negative": lambda: header("(-16,)") + b"\0" * 64,
    "short": lambda: npy(STATE[NORM])[:-1],
    "long": lambda: npy(STATE[NORM]) + b"\0",
    "long header": lambda: b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 1000,
    "future": lambda: b"\x93NUMPY\x09\x00" + npy(STATE[NORM])[8:],
    "deep header": lambda: header("(" * 5000),
    "no kind": lambda: header("(16,)", "<q9"),
    "pickle": lambda: header("(1,)", "|O") + pickle.dumps(Harmful()),
    "bare pickle": lambda: pickle.dumps(Harmful()),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_members_that_lie(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by their name; nothing is allocated as announced, and nothing is unpickled."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.npz", "w") as archive:
        for name, x in STATE.items():
            if name != NORM:
                archive.writestr(f"{name}.npy", npy(x))
        archive.writestr(f"{NORM}.npy", MEMBERS[kind]())
    tracemalloc.start()
    assert NORM in refusal("x.npz")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert os.listdir() == ["x.npz"]


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are compared before numbers are read, also those of a tensor that is stored twice."""
    monkeypatch.chdir(tmp_path)
    bomb = header("(1, 10000000)") + b"\0" * 40_000_000
    for name, expected in ((NORM, "of another shape"), ("x", "no place"), (SPAN_COPY, "to equal")):
        with zipfile.ZipFile("x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for other, x in STATE.items():
                if other != name:
                    archive.writestr(f"{other}.npy", npy(x))
            archive.writestr(f"{name}.npy", bomb)
        tracemalloc.start()
        assert expected in refusal("x.npz")
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()


def test_names_that_lead_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are keys, and nothing is written."""
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.writestr("../harmed.npy", npy(STATE[NORM]))
        archive.writestr("/harmed.npy", npy(STATE[NORM]))
    assert "2 with no place" in refusal("x.npz")
    assert os.listdir() == ["x.npz"] and os.listdir(tmp_path) == ["inside"]


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    """The archive has a checksum of every member."""
    file = Path(write(tmp_path / "x.npz"))
    content = bytearray(file.read_bytes())
    place = content.index(STATE["key_pe"].tobytes())
    content[place + 100] ^= 4
    file.write_bytes(content)
    assert "key_pe cannot be read: Bad CRC-32" in refusal(str(file))


# --- PyTorch -------------------------------------------------------------------------------------


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"")
    assert "needs PyTorch: pip install 'allattn[torch]'" in refusal(str(tmp_path / "x.pt"))


class FakeTensor:
    """As much of a parameter in bfloat16 as is asked for."""

    dtype = "torch.bfloat16"
    is_quantized = False

    def __init__(self, x: np.ndarray, ready: bool = False) -> None:
        self.x = x
        self.shape = x.shape
        self.ready = ready

    def is_floating_point(self) -> bool:
        return True

    def element_size(self) -> int:
        return 2

    def detach(self) -> "FakeTensor":
        return FakeTensor(self.x, ready=True)

    to_dense = cpu = float = resolve_neg = lambda self: self

    def numpy(self) -> np.ndarray:
        assert self.ready, "PyTorch refuses a tensor that requires a gradient"
        return self.x


@pytest.mark.parametrize("outer", [(), ("model",), ("state_dict",), ("model", "state_dict")])
def test_state_dicts_within(outer: tuple[str, ...], tmp_path: Path, monkeypatch: Any) -> None:
    """Where PyTorch is not installed a stand-in shows what is asked of it."""
    content: Any = {f"_orig_mod.{name}": FakeTensor(x) for name, x in STATE.items()}
    for name in outer:
        content = {"epoch": 3, name: content}
    asked: list[dict[str, Any]] = []

    def load(file: str, **options: Any) -> Any:
        asked.append(options)
        return content

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=load, Tensor=FakeTensor))
    (tmp_path / "x.pt").write_bytes(b"")
    state = read(str(tmp_path / "x.pt"))
    np.testing.assert_array_equal(state[NORM], STATE[NORM])
    assert asked == [{"map_location": "cpu", "weights_only": True}]


TORCH_KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "float16": lambda torch, x: x.half(),
    "bfloat16": lambda torch, x: x.bfloat16(),
    "float64": lambda torch, x: x.double(),
    "parameter": lambda torch, x: torch.nn.Parameter(x),
    "sparse": lambda torch, x: x.to_sparse(),
    "view": lambda torch, x: torch.stack([x, x], -1)[..., 0],
    "negative": lambda torch, x: torch._neg_view(-x),
}
TORCH_REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "int64": (lambda torch, x: x.long(), "expected floating-point numbers, found int64"),
    "bool": (lambda torch, x: x > 0, "expected floating-point numbers, found bool"),
    "complex": (lambda torch, x: x + 1j, "expected floating-point numbers, found complex64"),
    "meta": (lambda torch, x: x.to("meta"), "cannot be read"),
    "expanded": (lambda torch, x: x[:1].expand(2**40), "expected shape (16,), found (109951162"),
    "number": (lambda torch, x: 3, "found int under 'layers.0.norm1.weight'"),
    "module": (lambda torch, x: torch.nn.Linear(2, 2), "holds no state dict"),
    "object": (lambda torch, x: Harmful(), "holds no state dict"),
    "nan": (lambda torch, x: x / 0 * 0, "found NaN or infinity 16 times"),
}


@pytest.mark.parametrize("kind", TORCH_KINDS)
def test_torch_tensors(kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    saved = {name: TORCH_KINDS[kind](torch, torch.tensor(x)) for name, x in STATE.items()}
    torch.save(saved, tmp_path / "x.pt")
    state = read(str(tmp_path / "x.pt"))
    tolerance = 2**-8 if kind in ("float16", "bfloat16") else 0
    for name in (NORM, "key_pe", SPAN):
        np.testing.assert_allclose(state[name], STATE[name], rtol=tolerance)


@pytest.mark.parametrize("kind", TORCH_REFUSED)
def test_torch_refuses(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    change, expected = TORCH_REFUSED[kind]
    saved = {name: torch.tensor(x) for name, x in STATE.items()}
    saved[NORM] = change(torch, saved[NORM])
    torch.save({"model": saved}, "x.pt")
    assert expected in refusal("x.pt")
    assert os.listdir() == ["x.pt"]


def test_torch_archives_are_not_compressed(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as plain:
        with zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    assert "expected a file as PyTorch writes it" in refusal(str(tmp_path / "y.pt"))


def test_other_files(tmp_path: Path) -> None:
    assert "expected a file, found none" in refusal(str(tmp_path))
    (tmp_path / "x.npz").write_bytes(b"\0" * 100)
    assert "x.npz cannot be read" in refusal(str(tmp_path / "x.npz"))
    assert state_files.read(write(tmp_path / "y.npz"))[NORM].kind == "float32"
