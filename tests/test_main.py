"""`python -m raychat.training`: the run without Ray, and what it leaves for MLflow."""

import pytest

from raychat.tracking.shipping_state import ShippingState
from raychat.tracking.summary import Summary
from raychat.training import __main__ as module
from raychat.training.lease import LeaseLostError


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


def test_driver_that_slept_too_long_saves_and_says_that_the_same_command_goes_on(flags, tmp_path, monkeypatch, capsys):
    read_here = module.read_here

    def read_and_sleep(plan):
        for number, batch in enumerate(read_here(plan)):
            if number == 2:
                monkeypatch.setattr("raychat.training.lease.FENCE_S", -1.0)  # as if no beat had been for so long
            yield batch

    monkeypatch.setattr(module, "read_here", read_and_sleep)
    with pytest.raises(LeaseLostError, match="Run the same command again"):
        module.main(flags)
    assert "finished" not in capsys.readouterr().out
    assert (tmp_path / "runs" / "d2" / "checkpoints" / "step_00000003").is_dir()
    monkeypatch.undo()
    assert module.main(flags) == 0
    assert "finished: step 4 of 4" in capsys.readouterr().out


def test_price_of_a_named_machine_reaches_the_ledger(flags, tmp_path):
    assert module.main([*flags, "--machine", "p5.4xlarge"]) == 0
    summary = Summary.read(tmp_path / "runs" / "d2" / "summary.json")
    assert summary.cost_usd == pytest.approx(6.88 * summary.wall_time_s / 3600, rel=0.01)
