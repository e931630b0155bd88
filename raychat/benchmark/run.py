"""Runs the steps: the training loop as it is, fed with batches, and with nothing to evaluate or save."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from raychat.benchmark.fixed_rows import batches_of, load_rows, load_weights
from raychat.benchmark.options import Options
from raychat.benchmark.samples import Sample, figures
from raychat.config import Config
from raychat.data.batches import Batch
from raychat.data.order import lanes_for
from raychat.data.prepare import make_in_process, prepare
from raychat.data.tokenizer import Tokenizer, byte_tokenizer
from raychat.model import GPT
from raychat.optim import MuonAdamW
from raychat.planning import model_shape, recipe
from raychat.planning.scaling import causal_flops_per_token
from raychat.storage import Store
from raychat.training.attention_choice import with_attention
from raychat.training.build import build_training, device_of, settle_device_batch
from raychat.training.compile_cache import CompileCache
from raychat.training.device import Resolved, peak_memory_bytes, resolve
from raychat.training.events import Event, Line, Metrics
from raychat.training.job import BatchPlan
from raychat.training.loop import Trainer
from raychat.training.reading import read_here
from raychat.training.state import Clock, LoopState, Signal, Surroundings
from raychat.training.world import World

Echo = Callable[[str], None]


class Profiler(Protocol):
    """What takes steps apart."""

    def attach(self, trainer: Trainer) -> None:
        """Name the parts of `trainer`."""
        ...

    def watch(self, step: int, steps: int) -> AbstractContextManager[object]:
        """What step `step` (from 0) of `steps` runs in."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model that is ready to train, on the rows it will train on."""

    config: Config
    resolved: Resolved
    world: World
    model: GPT
    optimizer: MuonAdamW
    tokenizer: Tokenizer
    open_batches: Callable[[LoopState], Iterator[Batch]]

    @staticmethod
    def make(config: Config, options: Options, world: World, echo: Echo) -> "Bench":
        """Prepare everything that a first step needs. Raises ConfigError for what cannot be."""
        resolved = resolve(config, local_world_size=world.local_world_size)
        if world.rank == 0:
            resolved = with_attention(resolved, config, device_of(resolved, world), echo)
        resolved = world.broadcast(resolved)
        torch.set_num_threads(resolved.threads)
        if resolved.compile:
            CompileCache(config.base_dir, Store.of(config.run_uri), resolved.device_name).use()
        run, tokenizer = recipe(config), byte_tokenizer()
        config, resolved = settle_device_batch(config, run, resolved, world, echo)
        per_batch = run.total_batch_size // config.model.max_seq_len
        ranks = {"rank": world.rank, "world_size": world.world_size}
        if options.rows:
            rows = load_rows(options.rows, config.model)

            def open_batches(state: LoopState) -> Iterator[Batch]:
                return batches_of(rows, rows_per_batch=per_batch, step=state.step, **ranks)
        else:
            if world.rank == 0:
                prepare(config, with_gpus=resolved.device_type == "cuda", maker=make_in_process, echo=echo)
            world.sum([0.0], device_of(resolved, world))  # the others wait for the shards
            data = prepare(
                config, with_gpus=resolved.device_type == "cuda", maker=make_in_process, echo=lambda line: None
            )

            def open_batches(state: LoopState) -> Iterator[Batch]:
                return read_here(
                    BatchPlan(
                        tokens_dir=data.manifest.store.uri,
                        seed=config.run.seed,
                        lanes=lanes_for(per_batch),
                        cursor=state.rows_consumed,
                        num_batches=run.num_iterations,
                        rows_per_batch=per_batch,
                        **ranks,
                    )
                )

        made = build_training(config, run, resolved, device_of(resolved, world))
        if options.init:
            load_weights(options.init, made.model)
        return Bench(
            config=config,
            resolved=resolved,
            world=world,
            model=made.model,
            optimizer=made.optimizer,
            tokenizer=tokenizer,
            open_batches=open_batches,
        )

    def run(self, steps: int, echo: Echo, profiler: Profiler | None = None) -> list[Sample]:
        """Train so many steps; what each of them took. A line for every step goes to `echo`."""
        heard: list[Event] = []
        with tempfile.TemporaryDirectory(prefix="raychat-benchmark-") as folder:
            trainer = self._trainer(Store.of(folder), heard.append)
            if profiler:
                profiler.attach(trainer)
            samples = []
            for step in range(steps):
                cpu, wall = time.process_time(), time.perf_counter()
                with profiler.watch(step, steps) if profiler else nullcontext():
                    trainer.train_step()
                took, cpu = time.perf_counter() - wall, time.process_time() - cpu
                told = [event for event in heard if isinstance(event, Metrics)]
                loss = told[-1].values["train/loss"] if told else float("nan")  # ranks other than 0 tell nothing
                samples.append(Sample(loss, took, cpu, seconds_since_start()))
                rate = recipe(self.config).total_batch_size / took
                echo(f"step {step + 1}/{steps} | loss {loss:.6f} | {1000 * took:.1f} ms | {rate:,.0f} tok/s")
                for event in heard:
                    if isinstance(event, Line) and event.text.startswith("warning"):
                        echo(event.text)
                heard.clear()
            trainer.close()
        return samples

    def report(self, samples: list[Sample]) -> dict[str, Any]:
        """The figures, what was measured, and with which versions."""
        shape, resolved = model_shape(self.config.model), self.resolved
        run = recipe(self.config)
        found = figures(
            samples,
            tokens=run.total_batch_size,
            world_size=self.world.world_size,
            flops_per_token=run.flops_per_token,
            causal_flops_per_token=causal_flops_per_token(shape),
            peak_flops=resolved.peak.flops if resolved.peak else None,
        )
        memory = "peak_gpu_mb" if resolved.device_type == "cuda" else "peak_rss_mb"
        device = next(self.model.parameters()).device
        return found | {
            memory: peak_memory_bytes(device) / 2**20,
            "world_size": self.world.world_size,
            "tokens_per_step": run.total_batch_size,
            "parameters": self.model.num_params()["total"],
            "resolved": asdict(resolved),
            "config": self.config.public(),
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        }

    def _trainer(self, checkpoints: Store, sink: Callable[[Event], None]) -> Trainer:
        return Trainer(
            self.config,
            recipe(self.config),
            model=self.model,
            optimizer=self.optimizer,
            tokenizer=self.tokenizer,
            resolved=self.resolved,
            world=self.world,
            surroundings=Surroundings(
                open_batches=self.open_batches,
                validation=lambda: iter(()),
                validation_rounds=0,
                sink=sink,
                poll=lambda: Signal.NONE,
                clock=Clock(attempt_started=time.time(), before_s=0.0, price_per_hour=None),
                checkpoints=checkpoints,
                fence=lambda: False,
                after_warm_up=lambda: None,
                meta={"val_tokens": 0},
            ),
            state=LoopState(),
        )


def seconds_since_start() -> float | None:
    """Seconds since this process was started, its imports included; None where the system does not tell."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None
