"""State dicts in files of others: .npz of NumPy, .pt of PyTorch.

A file is read in two steps, so that one that lies about itself costs neither memory nor time:

    read       names, shapes and kinds of its tensors, and no number
    numbers    the numbers of a tensor whose name and shape are those that are expected

Nothing in a file is executed, and objects are never unpickled. What is refused is refused with one
line that names the file and the tensor.
"""

import io
import math
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allattn.errors import UserError, first_line

# What is read of a member of an .npz before its header is understood; headers have about 100 bytes.
HEADER_BYTES = 1 << 16
# Under these names training code saves the state dict beside other things.
INNER = ("model", "state_dict", "model_state_dict")
# No trained network has a number beyond this.
LARGEST = 1e6
# What a message keeps of an error of another library.
MESSAGE_LENGTH = 200


class Tensor(NamedTuple):
    """A tensor of a file whose numbers have not been read."""

    shape: tuple[int, ...]
    # As a message names it, such as "float32", "bfloat16" or "complex64".
    kind: str
    # Floating-point numbers of any width.
    is_float: bool
    # The numbers, as NumPy has them.
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


# --- a file --------------------------------------------------------------------------------------


def read(file: str) -> Tensors:
    """The tensors of a state dict, by name.

    Args:
      file: .npz with arrays by name, or a .pt with a state dict (needs torch).

    Raises:
      UserError: no such file, or it holds something else.
    """
    if not Path(file).is_file():
        raise UserError(f"--checkpoint: expected a file, found none at {file}")
    # Training code gives PyTorch's files any ending.
    if file.endswith(".npz"):
        return _read_npz(file)
    return _read_torch(file)


def numbers(file: str, name: str, tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor.

    Args:
      file, name: for the message.
      tensor: one of `read`.

    Returns:
      The numbers in float32, in the tensor's shape.

    Raises:
      UserError: the tensor holds something else, NaN or infinity, or numbers that no trained
        network has.
    """
    # Whole numbers may be those of a quantized tensor, whose scale is elsewhere.
    where = f"--checkpoint: {file}: {name}"
    if not tensor.is_float:
        raise UserError(f"{where}: expected floating-point numbers, found {tensor.kind}")
    with _refused_as(where):
        x = tensor.read()
    # float16 has no number as large as the largest.
    x = x.astype(np.result_type(x.dtype, np.float32), copy=False)

    # Not finite in the file, and not finite in float32 or beyond any network.
    bad = x.size - np.count_nonzero(np.isfinite(x))
    if bad:
        raise UserError(f"{where}: expected finite numbers, found NaN or infinity {bad} times")
    bad = np.count_nonzero(np.abs(x) > LARGEST)
    if bad:
        raise UserError(
            f"{where}: expected no number beyond {LARGEST:.0e}, as in a trained network, "
            f"found {bad} in {tensor.kind}, the largest {np.abs(x).max():.3g}"
        )
    return x.astype(np.float32, copy=False)


@contextmanager
def _refused_as(where: str) -> Iterator[None]:
    """Turns what a library raises about a file within into one line.

    NumPy, zipfile, zlib, pickle and PyTorch raise dozens of kinds about a damaged file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = first_line(error)[:MESSAGE_LENGTH]
        raise UserError(f"{where} cannot be read: {found}") from error


# --- names ---------------------------------------------------------------------------------------


def without_prefix(tensors: Tensors, expected: Iterable[str]) -> tuple[Tensors, str]:
    """Tensors under the names that are expected, where a prefix stands before all of them.

    Wrappers put one before every name: "module." for several devices, "_orig_mod." for compiled
    modules, "model." for a module that holds the network.

    Args:
      tensors: by name.
      expected: names without a prefix.

    Returns:
      The tensors, each name without the prefix that most of the expected names have; and the
      prefix, "" if there is none.

    Raises:
      UserError: two tensors would have one name.
    """
    # Every end of a name that begins after a dot may be an expected name.
    known = set(expected)
    prefixes: Counter[str] = Counter()
    for name in tensors:
        starts = [0] + [i + 1 for i, letter in enumerate(name) if letter == "."]
        prefixes.update(name[:i] for i in starts if name[i:] in known)
    if not prefixes:
        return tensors, ""
    prefix = prefixes.most_common(1)[0][0]

    # Names without the prefix stay, so that a message can say that they have no place.
    stripped: Tensors = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if short in stripped:
            raise UserError(
                f"--checkpoint: expected {short} once, found it with {prefix} before it and without"
            )
        stripped[short] = tensor
    return stripped, prefix


# --- .npz ----------------------------------------------------------------------------------------


def _read_npz(file: str) -> Tensors:
    where = f"--checkpoint: {file}"
    # Archives may hold a name twice, and readers differ in which of the two they take.
    tensors: Tensors = {}
    with _refused_as(where), zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in tensors:
                raise UserError(f"{where}: expected distinct names, found {name} twice")
            with _refused_as(f"{where}: {name}"):
                tensors[name] = _npz_tensor(file, archive, member)
    return tensors


def _npz_tensor(file: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    """A member of an .npz, from its header alone."""
    # A header says how long it is, which may be a lie: no more than its beginning is read.
    with archive.open(member) as opened:
        head = io.BytesIO(opened.read(HEADER_BYTES))
    # Version 3 differs from 2 in the names of a record's fields alone.
    version = np.lib.format.read_magic(head)
    read_header = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read_header = np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read_header(head)

    # Objects, texts and records are refused when they are asked for, and are never read.
    start = head.tell()
    is_float = dtype.kind == "f"
    announced = math.prod(shape) * dtype.itemsize
    if is_float and (min(shape, default=0) < 0 or announced != member.file_size - start):
        raise UserError(
            f"{file}: {member.filename}: expected {announced} bytes for the shape {shape}, "
            f"found {member.file_size - start}"
        )

    # Read at last, a member has exactly the bytes that its shape needs.
    def load() -> np.ndarray:
        with zipfile.ZipFile(file) as archive, archive.open(member) as opened:
            flat = np.frombuffer(opened.read()[start:], dtype)
        if by_columns:
            return flat.reshape(shape[::-1]).T
        return flat.reshape(shape)

    return Tensor(shape, dtype.name, is_float, load)


# --- .pt -----------------------------------------------------------------------------------------


def _read_torch(file: str) -> Tensors:
    """The state dict of a .pt file: the whole of it, or what training code saves it under."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"--checkpoint: {file} needs PyTorch: pip install 'allattn[torch]', or give an .npz"
        ) from None
    # A pickle can run any code when it is read: nothing but tensors is unpickled.
    where = f"--checkpoint: {file}"
    _refuse_compressed(file)
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's errors are of many kinds
        raise UserError(
            f"{where} holds no state dict (save `model.state_dict()`): "
            f"{first_line(error)[:MESSAGE_LENGTH]}"
        ) from error
    state = _innermost(content)
    _check_state_dict(where, state, torch.Tensor)
    return {name: _torch_tensor(f"{where}: {name}", x) for name, x in state.items()}


def _refuse_compressed(file: str) -> None:
    """Refuse an archive that would unpack to more than it is: PyTorch compresses nothing."""
    if not zipfile.is_zipfile(file):
        return
    # Also an archive whose members lie over each other is less than they are together.
    size = Path(file).stat().st_size
    with _refused_as(f"--checkpoint: {file}"), zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > size:
        raise UserError(
            f"--checkpoint: {file}: expected a file as PyTorch writes it, found an archive of "
            f"{size} bytes that unpacks to {unpacked}"
        )


def _innermost(content: Any) -> Any:
    """What lies under the names that training code uses, however often."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in INNER if _is_mapping(content, name)), None)
        if inner is None:
            return content
        content = inner
    return content


def _is_mapping(content: Mapping[Any, Any], name: str) -> bool:
    return isinstance(content.get(name), Mapping)


def _check_state_dict(where: str, state: Any, tensor: type) -> None:
    """Refuse what is not a dict of tensors by name."""
    # What it is instead, as a message names it.
    found = ""
    if not isinstance(state, Mapping) or not state:
        found = type(state).__name__
    else:
        # A tensor's name is text, whatever else may be a key.
        for name, x in state.items():
            if not isinstance(name, str) or not isinstance(x, tensor):
                found = f"{type(x).__name__} under {name!r:.80}"
                break
    if found:
        under = ", ".join(INNER)
        raise UserError(
            f"{where}: expected a state dict of tensors, or one under {under}; found {found}"
        )


def _torch_tensor(where: str, x: Any) -> Tensor:
    """A tensor of PyTorch, of any class, layout and device."""
    with _refused_as(where):
        kind = str(x.dtype).removeprefix("torch.")
        # A quantized tensor has its scale with it.
        is_float = x.is_floating_point() or x.is_quantized
        shape = tuple(int(n) for n in x.shape)
    return Tensor(shape, kind, is_float, lambda: _torch_numbers(x))


def _torch_numbers(x: Any) -> np.ndarray:
    """The numbers of a tensor of PyTorch; float64 stays, all others become float32."""
    # Dense, on this machine, and without the history of a parameter.
    x = x.detach()
    if x.is_quantized:
        x = x.dequantize()
    x = x.to_dense().cpu()
    # NumPy has no bfloat16, and knows nothing of a sign that is to be applied later.
    if x.element_size() < 8:
        x = x.float()
    return x.resolve_neg().numpy()
