"""What a search asks of a run: to stop in the middle of its schedule, and to differ by rounding alone."""

import pytest
from runs import run_here

from raychat.errors import CheckpointError


@pytest.fixture
def config(own_config):
    return lambda **changes: own_config(dtype="bfloat16", eval_every=-1, **changes)


def test_run_that_stops_at_a_step_and_goes_on_is_the_run_that_never_stopped(config):
    whole = run_here(config(model_tag="whole"))
    part = run_here(config(model_tag="part", stop_at=2))
    assert part.summary.status == "stopped"
    assert part.losses == whole.losses[:2]
    assert (part.run_dir / "checkpoints" / "step_00000002").is_dir()
    rest = run_here(config(model_tag="part"))
    assert rest.summary.status == "finished"
    assert rest.losses == whole.losses


def test_stop_at_the_horizon_or_beyond_it_is_the_end(config):
    assert run_here(config(stop_at=4)).summary.status == "finished"


def test_perturbed_repeat_differs_by_little_and_each_number_in_its_own_way(config):
    runs = [run_here(config(model_tag=f"p{number}", perturbation=number)) for number in (0, 1, 2)]
    plain, first, second = (ran.losses for ran in runs)
    assert plain != first != second != plain
    assert first == pytest.approx(plain, rel=2**-8)  # the last bit of bfloat16, in one of 32 channels
    again = run_here(config(model_tag="p1-again", perturbation=1))
    assert again.losses == first


def test_perturbation_of_a_run_cannot_change(config):
    run_here(config(stop_at=2))
    with pytest.raises(CheckpointError, match="perturbation"):
        run_here(config(perturbation=1))
