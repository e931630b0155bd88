"""`python -m raychat.training`: the run without Ray, and what it leaves for MLflow."""

import pytest

from raychat.tracking.shipping_state import ShippingState
from raychat.training import __main__ as module


@pytest.fixture
def flags(tiny_flags, prepared_base, tmp_path):
    own = {"base_dir": str(prepared_base), "storage_path": str(tmp_path / "runs"), "run": "told"}
    return [f"--{name.replace('_', '-')}={value}" for name, value in (tiny_flags | own).items()]


def test_run_without_ray_leaves_what_mlflow_will_be_told(flags, tmp_path, capsys):
    assert module.main(flags) == 0
    assert "finished: step 4 of 4" in capsys.readouterr().out
    state = ShippingState.load(tmp_path / "runs" / "d2")
    assert (state.run_name, state.end.status, state.end.delivered) == ("told", "FINISHED", False)
    assert state.params["matrix_lr"] == 0.02
    assert [path.rsplit("/")[-1] for path in state.end.artifacts] == [
        "config.json", "plan.json", "summary.json", "loss_curve.png",
    ]  # fmt: skip
    assert module.main(flags) == 0
    assert "reached its horizon of 4 steps" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_makes_nothing(flags, tmp_path, capsys):
    assert module.main([*flags, "--dry-run"]) == 0
    assert "4 iterations" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
