"""The loss curve draws what the journal holds, whatever is missing from it, and touches no global state."""

import subprocess
import sys

import pytest

from raychat.tracking.figures import loss_curve, moving_average

PNG = b"\x89PNG\r\n\x1a\n"


def records(losses, bpbs=()):
    return [{"step": step, "time": 0.0, "train/loss": loss} for step, loss in losses] + [
        {"step": step, "time": 0.0, "val/bpb": bpb} for step, bpb in bpbs
    ]


def test_the_average_of_a_constant_is_that_constant_from_the_first_step_on():
    assert moving_average([3.0] * 20) == pytest.approx([3.0] * 20)


def test_the_average_weighs_each_older_value_by_another_beta():
    values = [5.0, 1.0, 4.0]
    expected = (0.81 * 5.0 + 0.9 * 1.0 + 4.0) / (0.81 + 0.9 + 1)
    assert moving_average(values, beta=0.9)[-1] == pytest.approx(expected)


@pytest.mark.parametrize(
    "rows",
    [
        records([(s, 10 - s / 10) for s in range(50)], [(0, 3.0), (25, 2.0), (50, 1.5)]),
        records([(1, 10.0)]),
        records([(1, 10.0)], [(1, 3.0)]),
        records([(1, None), (2, float("nan")), (3, 4.0)]),
        records([], [(0, 3.0)]),
        [],
    ],
    ids=["usual", "one point", "one of each", "holes", "validation only", "nothing"],
)
def test_a_picture_comes_out_of_any_journal(tmp_path, rows):
    path = tmp_path / "loss_curve.png"
    loss_curve(rows, path, title="d2")
    assert path.read_bytes().startswith(PNG)
    assert list(tmp_path.iterdir()) == [path]


def test_the_picture_does_not_depend_on_the_order_of_records(tmp_path):
    rows = records([(s, 10 - s) for s in range(5)], [(0, 3.0), (4, 2.0)])
    loss_curve(rows, tmp_path / "a.png", title="d2")
    loss_curve(rows[::-1], tmp_path / "b.png", title="d2")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_drawing_chooses_no_backend_for_the_process(tmp_path):
    code = (
        "import sys, pathlib, raychat.tracking.figures as f; assert 'matplotlib' not in sys.modules;"
        f"f.loss_curve([], pathlib.Path({str(tmp_path / 'x.png')!r}), title='t'); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
