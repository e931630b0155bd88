"""tests/benchmarks/eval_workers.py: what it makes of a journal. The run itself needs minutes and two cores."""

import pytest
from benchmarks.eval_workers import BLOCKS, block_of, cycles, report, typical

STEPS = 5
PACE = {"beside": 1.1, "busy": 1.05, "alone": 1.0}


def journal(number_of_cycles: int) -> list[dict]:
    """A run whose steps take as long as `PACE` says of their block, the first one of an evaluation 0.2 s longer.

    The checkpoint is written within the first, the result comes after 4.4 s.
    """
    records, now = [], 0.0
    for step in range(number_of_cycles * len(BLOCKS) * STEPS):
        if step and step % (len(BLOCKS) * STEPS) == 0:
            records.append({"event": "checkpoint", "step": step, "stall_s": 0.01, "total_s": 1.2, "time": now})
            records.append({"event": "evaluated", "step": step, "time": now + 4.4})
        now += PACE[block_of(step, STEPS)] + (0.2 if step and step % (len(BLOCKS) * STEPS) == 0 else 0.0)
        records.append({"step": step, "train/dt": PACE[block_of(step, STEPS)], "time": now})
    return records


def test_blocks_of_a_cycle_are_told_apart_and_the_first_two_cycles_left_out():
    found = cycles(journal(5), STEPS)
    assert len(found) == 3
    for cycle in found:
        assert (cycle.beside, cycle.alone, cycle.busy) == pytest.approx((5.7, 5.0, 5.25))
        assert cycle.lost == pytest.approx(100 * (1 - 5 / 5.7))
        assert cycle.shared == pytest.approx(100 * (1 - 1 / 1.05))
        assert (cycle.handed_over, cycle.saving) == pytest.approx((0.45, 1.3 - 1.05))
        assert cycle.evaluation == pytest.approx(4.4)
    assert "lost beside an evaluation: median 12.28%, from 12.28% to 12.28%" in report(found, STEPS)


def test_an_evaluation_that_does_not_fill_its_block_is_pointed_out():
    records = [r | {"time": r["time"] - 2.2} if r.get("event") == "evaluated" else r for r in journal(3)]
    assert any("--eval-tokens" in line for line in report(cycles(records, STEPS), STEPS))
    assert not any("--eval-tokens" in line for line in report(cycles(journal(3), STEPS), STEPS))


def test_the_typical_step_is_told_apart_from_those_during_which_the_checkpoint_is_written():
    records = journal(5)
    records[-2] |= {"train/dt": 99.0}  # held up by something else
    found = typical(records, STEPS)
    assert found == {"beside, first fifth": 1.1, "beside": 1.1, "alone": 1.0, "busy": 1.05}
    later = [
        r | {"train/dt": 1.3} if r.get("step", 0) % (len(BLOCKS) * STEPS) == 0 and "train/dt" in r else r
        for r in records
    ]
    assert typical(later, STEPS) == found | {"beside, first fifth": 1.3}
