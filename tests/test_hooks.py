"""`--on-event`: the command sees how the run ended, and can neither stop nor delay it for long."""

import time

import pytest

from raychat.training.hooks import run_hook


@pytest.fixture
def said():
    return []


def test_command_gets_the_variables_and_its_output_reaches_the_console(said):
    assert run_hook('echo "$RAYCHAT_EVENT of $RAYCHAT_MODEL_TAG"; echo two >&2', VARIABLES, echo=said.append)
    assert said == ["on-event: finished of d4 & more", "on-event: two"]


VARIABLES = {"RAYCHAT_EVENT": "finished", "RAYCHAT_MODEL_TAG": "d4 & more"}  # no quoting is needed: it is environment


@pytest.mark.parametrize("command", ["echo s3cret; exit 3", "no-such-command-s3cret"])
def test_failing_command_is_a_warning_that_does_not_repeat_it(said, command):
    assert not run_hook(command, VARIABLES, echo=said.append)
    assert "warning: the command of --on-event ended with exit code" in said[-1]
    assert "s3cret" not in said[-1]


def test_command_that_hangs_is_ended_with_all_that_it_started(said, tmp_path):
    started = time.monotonic()
    command = f"echo begun; (sleep 1; touch {tmp_path}/late) & sleep 30"
    assert not run_hook(command, {}, echo=said.append, timeout_s=0.3)
    assert time.monotonic() - started < 5
    assert said == ["on-event: begun", "warning: the command of --on-event took longer than 0.3s and was ended"]
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()


def test_what_a_command_leaves_in_the_background_does_not_keep_the_run_waiting(said):
    started = time.monotonic()
    assert run_hook("sleep 3 & echo left", {}, echo=said.append)
    assert time.monotonic() - started < 2
    assert said == ["on-event: left"]


def test_command_that_reads_finds_nothing_to_read(said):
    assert run_hook("cat; echo done", {}, echo=said.append)
    assert said == ["on-event: done"]


def test_output_that_is_no_text_is_shown_as_well_as_it_can_be(said):
    assert run_hook(r"printf '\377ok\n'", {}, echo=said.append)
    assert said == ["on-event: \ufffdok"]
