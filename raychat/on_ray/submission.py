"""Jobs that are submitted to a cluster from outside, followed, and submitted again until their run is done.

A run goes on by itself wherever its job is started again, so that keeping it alive takes no more than another
submission. `resubmission.decide` says whether there is to be one.
"""

import asyncio
import dataclasses
import re
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import aiohttp
import ray.exceptions
import requests
from ray.dashboard.modules.job.common import JobErrorType
from ray.job_submission import JobStatus, JobSubmissionClient

from raychat.errors import ConfigError, RaychatError
from raychat.on_ray.resubmission import TAIL, JobEnd, decide, read_log, read_run
from raychat.progress import format_duration

Echo = Callable[[str], None]
T = TypeVar("T")

AGAIN_S = 5.0
LOOK_S = 1.0
TELL_S = 30.0
SILENCE_S = 20.0
"""without a line of log before the job server is asked whether the job is still there"""
REQUEST_S = 60.0
# The job ended because something ended of the cluster that carried it.
CLUSTERS_FAULT = (
    JobErrorType.JOB_SUPERVISOR_ACTOR_DIED,
    JobErrorType.JOB_SUPERVISOR_ACTOR_START_FAILURE,
    JobErrorType.JOB_SUPERVISOR_ACTOR_START_TIMEOUT,
    JobErrorType.JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE,
    JobErrorType.JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE,
)


class SubmissionError(RaychatError):
    """The cluster does not do what was asked of it."""

    exit_code = 1


class _Client(JobSubmissionClient):
    """Ray's own would wait for an answer without end."""

    def _do_request(self, *args: Any, **options: Any) -> requests.Response:
        options.setdefault("timeout", REQUEST_S)
        return super()._do_request(*args, **options)


class JobServer:
    """The job server of a cluster's head. A head that is away for a while is waited for, up to `patience_s`."""

    def __init__(self, address: str, *, patience_s: float, echo: Echo, show: Echo) -> None:
        """`show` gets the logs of jobs, which are pieces of text and not lines."""
        self.address, self.patience_s, self.echo, self.show = address, patience_s, echo, show
        self._client: _Client | None = None
        self._shown = 0

    def submit(self, entrypoint: str, *, working_dir: str, stop_wait_s: int) -> str:
        """Submit a job that gets `stop_wait_s` seconds for its save when it is stopped; its id.

        The files in `working_dir` are packed and uploaded each time, for the head may have forgotten them.
        """
        job = f"raychat-{uuid.uuid4().hex[:12]}"
        environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s)}, "working_dir": working_dir}

        def submit_once(client: JobSubmissionClient) -> str:
            if _info(client, job) is not None:  # an earlier try arrived, and only its answer did not
                return job
            try:
                return client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=environment)
            except ValueError as error:  # too large to be uploaded, for one
                raise ConfigError(f"--working-dir {working_dir}: {error}") from error

        return self._ask(submit_once)

    def follow(self, job: str) -> tuple[JobEnd, float]:
        """Show the log of a job until it ends: how it did, and the unix time (of the head) when it had begun."""
        self._shown, began_s = 0, time.time()
        while True:
            info = self._ask(lambda client: _info(client, job))
            if info is None:
                return JobEnd(status="lost"), began_s
            began_s = (info.start_time or began_s * 1000) / 1000
            if info.status.is_terminal():
                break
            try:
                asyncio.run(self._tail(job))
            except (aiohttp.ClientError, RuntimeError, OSError):
                time.sleep(LOOK_S)
        log = self._ask(lambda client: _logs(client, job))
        self.show(log[self._shown :])
        return _end(info, log[-TAIL:]), began_s

    def stop(self, job: str) -> None:
        """Stop a job and wait until it has saved and ended; say how it did.

        Raises:
            ConfigError: the cluster knows no such job.
        """
        if self._ask(lambda client: _info(client, job)) is None:
            raise ConfigError(
                f"--stop {job}: the cluster at {self.address} knows no such job. `ray job list` shows them."
            )
        if not self._ask(lambda client: client.stop_job(job)):
            self.echo(f"{job} is not running")
        begun = told = time.monotonic()
        while (info := self._ask(lambda client: _info(client, job))) is not None and not info.status.is_terminal():
            if time.monotonic() - told >= TELL_S:
                told = time.monotonic()
                self.echo(f"{job} has been saving and stopping for {format_duration(told - begun)}")
            time.sleep(LOOK_S)
        closing = re.findall(
            r"^(?:finished|stopped|failed): step .*", self._ask(lambda client: _logs(client, job)), re.M
        )
        self.echo(f"{job}: {closing[-1] if closing else 'ended'}")

    async def _tail(self, job: str) -> None:
        """Show what comes after the characters that were shown, until the log or the job ends."""
        client = self._client
        if client is None:
            return
        passed, parts = 0, client.tail_job_logs(job)
        part = asyncio.ensure_future(anext(parts))
        while True:
            done, _ = await asyncio.wait({part}, timeout=SILENCE_S)
            if not done:
                info = await asyncio.to_thread(lambda: _info(client, job))
                if info is None or info.status.is_terminal():
                    part.cancel()
                    return
                continue
            try:
                text = part.result()
            except StopAsyncIteration:
                return
            self.show(text[max(0, self._shown - passed) :])
            passed += len(text)
            self._shown = max(self._shown, passed)
            part = asyncio.ensure_future(anext(parts))

    def _ask(self, question: Callable[[JobSubmissionClient], T]) -> T:
        """The answer of the job server, however long it is away.

        Raises:
            ConfigError: it will not answer like this.
            SubmissionError: it has been away for longer than `patience_s`.
        """
        since = time.monotonic()
        told = since - TELL_S
        while True:
            try:
                self._client = self._client or _Client(self.address)
                return question(self._client)
            except ray.exceptions.AuthenticationError as error:
                raise ConfigError(
                    f"The cluster at {self.address} asks for a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
                ) from error
            except (OSError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and (_http_status(error) or 0) < 500:
                    raise ConfigError(f"The cluster at {self.address} refuses: {error}") from error
                self._client, problem = None, error
            away = time.monotonic() - since
            if away > self.patience_s:
                raise SubmissionError(
                    f"The job server at {self.address} has not answered for {format_duration(away)} ({problem}). Correct "
                    "--address (the dashboard of the head, port 8265 as a rule), or use --keep-alive, which waits for it."
                )
            if time.monotonic() - told >= TELL_S:
                told = time.monotonic()
                self.echo(f"waiting for the job server at {self.address}, for {format_duration(away)} now: {problem}")
            time.sleep(LOOK_S)


def _info(client: JobSubmissionClient, job: str) -> Any:
    """What the cluster knows about the job; None when it knows none such."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if _http_status(error) == 404:
            return None
        raise


def _logs(client: JobSubmissionClient, job: str) -> str:
    """The log of a job, empty where it went with the machine that had it."""
    try:
        return client.get_job_logs(job)
    except RuntimeError:
        return ""


def _http_status(error: Exception) -> int | None:
    found = re.search(r"status code (\d+)", str(error))
    return int(found[1]) if found else None


def _end(info: Any, log: str) -> JobEnd:
    """The end of a job that has ended, from what the cluster keeps of it."""
    end = read_log(log or info.message or "")
    if info.error_type in CLUSTERS_FAULT:
        return dataclasses.replace(end, status="lost", error=info.message or "")
    statuses: dict[JobStatus, Literal["succeeded", "stopped"]] = {
        JobStatus.SUCCEEDED: "succeeded",
        JobStatus.STOPPED: "stopped",
    }
    return dataclasses.replace(end, status=statuses.get(info.status, "failed"), exit_code=info.driver_exit_code)


def see_to_end(
    server: JobServer, submit: Callable[[], str], *, job: str = "", place: str, keep_alive: bool, echo: Echo
) -> int:
    """Follow `job`, or what `submit` gives, to its end and, to keep it alive, through others after it: the exit code.

    `place` is the run directory or its URI.
    """
    ends: list[JobEnd] = []
    while True:
        job = job or submit()
        echo(f"following {job}; Ctrl-C leaves it running")
        end, began_s = server.follow(job)
        if run := read_run(place, began_s):
            end = dataclasses.replace(end, run_status=run.status, step=run.step, hopeless=run.hopeless)
        ends.append(end)
        verdict = decide(ends)
        echo(f"{job} {end.status}: {verdict.why}")
        if not (keep_alive and verdict.again):
            return verdict.exit_code
        wait_s = max(AGAIN_S, verdict.after_s)
        echo(f"submitting it again in {wait_s:g}s")
        time.sleep(wait_s)
        job = ""
