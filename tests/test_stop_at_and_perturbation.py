"""What a search asks of a run: to stop in the middle of its schedule, and to differ by rounding alone."""

import pytest
from runs import run_here

from raychat.config import Config
from raychat.errors import CheckpointError
from raychat.on_ray.forking import fork
from raychat.search.drafts import draft
from raychat.search.spec_file import read_spec
from raychat.search.strategy import make_strategy


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


def test_a_fork_of_a_search_is_the_run_that_trains_whole(own_config):
    """Trunk to the middle, then each end of the decay from its checkpoint: the losses of whole runs, to the last bit."""
    same = {"num_iterations": 8, "warmup_steps": -1, "warmup_ratio": 0.25, "warmdown_ratio": 0.5}
    base = {name: value for name, value in own_config(**same).flat().items() if value != Config().flat()[name]}
    made = read_spec({"name": "f", "base": base, "space": {"final_lr_frac": [0.05, 0.5]}, "fork_at": 0.5})
    trials = make_strategy(made).propose({}, [])
    trunk = made.config(next(trial for trial in trials if trial.role == "trunk"))
    run_here(trunk)
    for number, arm in enumerate(made.arms()):
        forked = made.config(draft(arm, 42, role="fork", fork_of=trunk.model_tag, fork_step=4))
        forked = Config.from_flat({"model_tag": f"forked-{number}"}, forked)
        fork(trunk, forked, 4, echo=lambda line: None)
        whole = run_here(own_config(model_tag=f"whole-{number}", **same, **arm.settings))
        assert run_here(forked).losses[-4:] == whole.losses[4:]
