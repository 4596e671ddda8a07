"""The training stream: the wrap rule, purity, rows, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest

from allattn.data import Stream, stream
from allattn.errors import UserError

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "traj_adagrad_wrap.npz"
WRAP_POSITIONS = [0, 8, 16, 24, 32, 40, 48, 4, 12, 20, 28, 36, 44, 5, 13, 21, 29, 37, 45, 0, 8]


class GivenOffsets(Stream):
    """A stream whose passes begin at the recorded offsets."""

    def _offsets(self, draw: int) -> np.ndarray:
        return np.array([0, 4, 5, 0])


def test_recorded_positions() -> None:
    """The authors' positions: 60 tokens a row, blocks of 8, four passes."""
    tokens = np.arange(240)
    given = GivenOffsets(tokens, 4, 8)
    assert [given.position(step)[1] for step in range(21)] == WRAP_POSITIONS
    before = [
        8 * (step - max(first for first in (0, 7, 13, 19) if first <= step)) for step in range(21)
    ]
    assert [given.block(step).before for step in range(21)] == before
    for step, position in enumerate(WRAP_POSITIONS):
        inputs_BT, targets_BT, _ = given.block(step)
        np.testing.assert_array_equal(inputs_BT, tokens.reshape(4, 60)[:, position : position + 8])
        np.testing.assert_array_equal(targets_BT, inputs_BT + 1)


def test_recorded_positions_are_the_golden_ones() -> None:
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not on this machine")
    golden = np.load(GOLDEN)
    assert [*golden["data_pos"], golden["data_pos_end"]] == WRAP_POSITIONS
    given = GivenOffsets(golden["data"].reshape(-1), 4, int(golden["block"]))
    np.testing.assert_array_equal(given.block(7).inputs_BT, golden["data"][:, 4:12])


@pytest.mark.parametrize(("row", "block"), [(9, 8), (15, 8), (16, 8), (17, 8), (100, 7), (3, 1)])
def test_pass_rules(row: int, block: int) -> None:
    """Written out step by step: blocks follow each other while they and their last target fit."""
    tested = Stream(np.arange(2 * row), 2, block, seed=3)
    expected_pass = 0
    expected = 0
    for step in range(300):
        number, offset = tested.position(step)
        if expected + block + 1 > row:
            expected_pass += 1
            assert (
                number == expected_pass and 0 <= offset < block and tested.block(step).before == 0
            )
            expected = offset
        assert (number, offset) == (expected_pass, expected)
        assert tested.block(step).targets_BT[:, -1].tolist() == [
            offset + block,
            row + offset + block,
        ]
        expected += block
    assert tested.position(0) == (0, 0) and tested.block(0).before == 0


def test_a_block_depends_on_its_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_WINDOW_TOKENS", 64)
    tokens = np.random.default_rng(0).integers(0, 99, 5003)
    in_order = Stream(tokens, 3, 16, seed=5)
    jumping = Stream(tokens, 3, 16, seed=5)
    expected = [in_order.block(step) for step in range(400)]
    for step in np.random.default_rng(1).permutation(400).tolist():
        inputs_BT, targets_BT, before = jumping.block(step)
        np.testing.assert_array_equal(inputs_BT, expected[step].inputs_BT)
        np.testing.assert_array_equal(targets_BT, expected[step].targets_BT)
        assert before == expected[step].before


def test_memory_of_blocks() -> None:
    """Blocks are contiguous, int32, and share no memory."""
    tested = Stream(np.arange(1000, dtype=np.uint16), 4, 10)
    first = tested.block(0)
    for array in first[:2]:
        assert array.dtype == np.int32 and array.flags.c_contiguous and array.shape == (4, 10)
    first.inputs_BT[:] = -1
    assert tested.block(0).inputs_BT[0, 0] == 0


def test_rows_of_a_process() -> None:
    tokens = np.arange(10_000)
    whole = Stream(tokens, 8, 32, seed=1)
    part = Stream(tokens, 8, 32, seed=1, rows=slice(2, 5))
    for step in (0, 1, 38, 39, 500):
        np.testing.assert_array_equal(part.block(step).inputs_BT, whole.block(step).inputs_BT[2:5])


def test_a_process_reads_only_its_rows() -> None:
    class Recorder:
        seen: set[int] = set()

        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, window: slice) -> np.ndarray:
            ids = np.arange(window.start, window.stop)
            self.seen.update((ids // 1250).tolist())
            return ids

    Stream(Recorder(), 8, 32, rows=slice(2, 5)).block(0)
    assert Recorder.seen == {2, 3, 4}


def test_late_steps_and_seeds() -> None:
    """A late step is found quickly, and seeds differ."""
    tokens = np.arange(4000)
    tested = Stream(tokens, 4, 128, seed=1)
    number, offset = tested.position(5_000_000)
    assert number > 600_000 and 0 <= offset <= 1000 - 129
    assert tested.position(7) == Stream(tokens, 4, 128, seed=1).position(7)
    positions = {
        tuple(Stream(tokens, 4, 128, seed=s).position(step) for step in (8, 16, 24))
        for s in range(5)
    }
    assert len(positions) == 5


def test_offsets_cover_a_block() -> None:
    tested = Stream(np.arange(100), 1, 8)
    starts = {tested.position(step)[1] for step in range(5000) if not tested.block(step).before}
    assert starts == set(range(8))


@pytest.mark.parametrize(("batch", "block"), [(10, 10), (101, 1), (1, 100)])
def test_too_short(batch: int, block: int) -> None:
    with pytest.raises(
        UserError, match=f"batch {batch} and block {block} leave no block in 100 tokens"
    ):
        Stream(np.arange(100), batch, block)


@pytest.mark.parametrize("bad", [{"batch": 0}, {"block": 0}, {"seed": -1}])
def test_bad_arguments(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        Stream(np.arange(100), **({"batch": 2, "block": 2, "seed": 0} | bad))
    with pytest.raises(ValueError, match="step must not be negative"):
        Stream(np.arange(100), 2, 2).block(-1)
