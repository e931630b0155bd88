"""Puts a run together on one rank: model, optimizer, data, state, loop. All callers of the loop go through `train`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from raychat.checks import require
from raychat.config import Config
from raychat.data.batches import Batch, leave_out, left_out, validation_passes, validation_rows
from raychat.data.order import lanes_for
from raychat.data.shards import Manifest, RowReader, needed_manifest
from raychat.data.tokenizer import TOKENIZER_FOLDER, Tokenizer
from raychat.model import GPT, GPTConfig, attention, fp8
from raychat.optim import MuonAdamW, build_optimizer
from raychat.planning import Recipe, model_shape, param_counts, recipe
from raychat.storage import Store
from raychat.training import checkpoint
from raychat.training.attention_choice import with_attention
from raychat.training.compile_cache import CompileCache
from raychat.training.device import Resolved, device_type, resolve
from raychat.training.device_batch import Fit, with_device_batch
from raychat.training.events import Line, Note, Sink
from raychat.training.fence import Fence
from raychat.training.heap import give_back_freed_memory, keep_freed_memory
from raychat.training.initial import put_initial
from raychat.training.job import BatchPlan, BatchSource, Job
from raychat.training.loop import Trainer
from raychat.training.pass_trial import CudaMeter, Training, measured
from raychat.training.perturbation import perturb
from raychat.training.state import Clock, LoopState, Signal, Surroundings
from raychat.training.world import World


def train(
    job: Job, *, world: World, batches: BatchSource, sink: Sink, poll: Callable[[], Signal] = lambda: Signal.NONE
) -> bool:
    """Train `job` on this rank to its end; True when it reached its horizon.

    A process group must be there when the world has more than one rank.
    """
    config = Config.from_flat(job.config)
    run = recipe(config)
    if device_type(config.precision.device_type) == "cuda":
        torch.cuda.set_device(world.device_index)  # before the first collective, which nccl runs on the device
    resolved = _agree_on_machine(config, job, world, sink)
    torch.set_num_threads(resolved.threads)
    after_warm_up = _compile_cache(config, resolved, world, sink) if resolved.compile else _nothing
    manifest = needed_manifest(job.tokens_dir)
    rows, world_size = run.total_batch_size // config.model.max_seq_len, world.world_size
    require(
        world_size <= rows, f"{world_size} ranks are more than the {rows} sequences of a batch: use at most {rows}."
    )
    config, resolved = settle_device_batch(config, run, resolved, world, lambda line: sink(Line(line)))
    made = build_training(config, run, resolved, device_of(resolved, world))
    model, optimizer = made.model, made.optimizer
    state, lanes = LoopState(), lanes_for(rows)
    if job.checkpoint:
        found = checkpoint.trusted(job.checkpoint)
        found.load(model, optimizer, world=world)
        state, lanes = LoopState.restore(found.meta["state"]), found.meta["lanes"]

    def open_batches(state: LoopState) -> Iterator[Batch]:
        if state.step == 0:  # at the beginning, and after going back to it
            if config.run.init_from:
                put_initial(config, model, world)
            if config.run.perturbation:
                perturb(model, config.run.perturbation)
        cursor, skipped = state.rows_consumed, state.skipped
        plan = BatchPlan(
            tokens_dir=job.tokens_dir,
            seed=config.run.seed,
            lanes=lanes,
            cursor=cursor,
            num_batches=run.num_iterations - state.step + left_out(skipped, cursor=cursor, rows_per_batch=rows),
            rows_per_batch=rows,
            rank=world.rank,
            world_size=world_size,
        )
        return leave_out(batches(plan), skipped, rows_per_batch=rows)

    tokenizer = Tokenizer.load(job.tokenizer_dir)
    if world.rank == 0:
        _keep_tokenizer(tokenizer, Store.of(config.run_uri).child(TOKENIZER_FOLDER), sink)
        sink(Note("resolved", dataclasses.asdict(resolved)))
        for line in describe(config, run, resolved, manifest, world, state):
            sink(Line(line))
    trainer = Trainer(
        config,
        run,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        resolved=resolved,
        world=world,
        surroundings=_surroundings(
            job,
            config,
            resolved,
            manifest,
            world,
            open_batches=open_batches,
            lanes=lanes,
            sink=sink,
            poll=poll,
            after_warm_up=after_warm_up,
        ),
        state=state,
    )
    return trainer.fit()


def _surroundings(
    job: Job,
    config: Config,
    resolved: Resolved,
    manifest: Manifest,
    world: World,
    *,
    open_batches: Callable[[LoopState], Iterator[Batch]],
    lanes: int,
    sink: Sink,
    poll: Callable[[], Signal],
    after_warm_up: Callable[[], None],
) -> Surroundings:
    """The seams of one rank, and what its checkpoints record besides weights, moments and the loop's state."""
    reader, price = RowReader(manifest, "val"), config.money.price_per_hour
    eval_rows = min(reader.num_rows, config.eval.eval_tokens // config.model.max_seq_len)
    passes = {"device_batch_size": config.batch.sequences, "world_size": world.world_size}
    store = Store.of(config.run_uri)
    return Surroundings(
        open_batches=open_batches,
        validation=lambda: validation_rows(reader, rows=eval_rows, rank=world.rank, **passes),
        validation_rounds=validation_passes(eval_rows, **passes),
        sink=sink,
        poll=poll,
        clock=Clock(
            attempt_started=job.attempt_started,
            before_s=job.wall_before_s,
            price_per_hour=None if price == -1 else price,
            nodes=job.nodes,
            before_usd=job.cost_before_usd,
        ),
        checkpoints=store.child("checkpoints"),
        fence=_fence(job, store, world, sink),
        after_warm_up=after_warm_up,
        meta={
            "config": config.public(),
            "fingerprint": manifest.fingerprint,
            "tokenizer_sha256": manifest.spec.tokenizer_sha256,
            "lanes": lanes,
            "seed": config.run.seed,
            "attempt": job.attempt,
            "journal_offset": job.journal_offset,
            "resolved": dataclasses.asdict(resolved),
            "val_tokens": eval_rows * config.model.max_seq_len,
        },
    )


def _compile_cache(config: Config, resolved: Resolved, world: World, sink: Sink) -> Callable[[], None]:
    """Begin with what was compiled before, here or on a machine of the same kind; what is to be called after a step."""
    cache = CompileCache(config.base_dir, Store.of(config.run_uri), resolved.device_name)
    cache.use()
    try:
        if world.local_rank == 0 and cache.fetch() and world.rank == 0:
            sink(Line("compile: begins with what the run compiled before"))
    except OSError as error:  # then it compiles again
        sink(Line(f"warning: what the run compiled before is of no use here: {error}"))
    world.gather(None)  # ranks of one machine share its folder

    def ship() -> None:
        try:
            if world.rank == 0:
                cache.ship()
        except OSError as error:
            sink(Line(f"warning: what was compiled is not kept with the run: {error}"))

    return ship


def _nothing() -> None:
    """What follows the first step of a run that compiles nothing."""


def _fence(job: Job, store: Store, world: World, sink: Sink) -> Fence:
    """The fence of this attempt in the run's folder `store`, begun by rank 0."""
    fence = Fence(store, job.lease_holder, job.attempt)
    if world.rank == 0:
        try:
            fence.begin()
        except OSError as error:  # it keeps earlier attempts out, and is no reason to end this one
            sink(Line(f"warning: {store.uri} does not take the number of this attempt: {error}"))
    return fence


def _keep_tokenizer(tokenizer: Tokenizer, folder: Store, sink: Sink) -> None:
    """A copy in the run's directory: with it, what reads the run's checkpoints needs nothing else."""
    try:
        tokenizer.put(folder)
    except OSError as error:  # it is found by its digest too, and no reason to end the run
        sink(Line(f"warning: {folder.uri} does not take a copy of the tokenizer: {error}"))


def gpt_config(config: Config) -> GPTConfig:
    """The model's own configuration: where `depth` becomes `n_layer` and `model_dim` becomes `n_embd`."""
    shape = model_shape(config.model)
    return GPTConfig(
        sequence_len=shape.sequence_len,
        vocab_size=shape.vocab_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_kv_head=shape.n_kv_head,
        n_embd=shape.n_embd,
        window_pattern=config.model.window_pattern.upper(),
        short_window_ratio=config.model.short_window_ratio,
    )


def build_model(config: Config, resolved: Resolved, device: torch.device) -> GPT:
    """The seeded initial model on `device`, without a copy in host memory on the way."""
    if device.type == "cpu":
        give_back_freed_memory() if config.precision.grad_checkpoint else keep_freed_memory()
    with torch.device("meta"):
        model = GPT(gpt_config(config))
    model.set_compute_dtype(resolved.torch_dtype)
    model.to_empty(device=device)
    model.init_weights(config.run.seed)
    model.loss_impl = resolved.loss
    model.attention_backend = resolved.attention
    model.grad_checkpoint = config.precision.grad_checkpoint
    attention.prepare(resolved.attention, device, T=config.model.max_seq_len, windows=set(model.config.windows()))
    return model


def build_training(config: Config, run: Recipe, resolved: Resolved, device: torch.device) -> Training:
    """The initial model and its optimizer, as a run trains them. All ranks build theirs together."""
    model = build_model(config, resolved, device)
    optimizer = build_optimizer_of(config, run, model)
    if config.precision.fp8:
        fp8.fp8_training(model, config.precision.fp8_recipe)
    return Training(model, optimizer, resolved.compile)


def settle_device_batch(
    config: Config, run: Recipe, resolved: Resolved, world: World, echo: Callable[[str], None]
) -> tuple[Config, Resolved]:
    """Both with the sequences of a pass as a number, where `auto` left them open. Every rank calls this.

    Raises:
        OutOfMemoryError: not even one sequence fits.
    """
    device = device_of(resolved, world)
    rank_rows = -(-run.total_batch_size // config.model.max_seq_len // world.world_size)

    def measure(sizes: Sequence[int], guess: int) -> Fit:
        make = partial(build_training, config, run, resolved, device)
        return measured(config, make, sizes, guess, rank_rows=rank_rows, meter=CudaMeter(device))

    resolved = with_device_batch(resolved, config, world, measure, echo)
    return Config.from_flat({"device_batch_size": resolved.device_batch_size}, base=config), resolved


def describe(
    config: Config, run: Recipe, resolved: Resolved, manifest: Manifest, world: World, state: LoopState
) -> list[str]:
    """What a run says about itself when it starts, one fact a line."""
    counts = param_counts(model_shape(config.model))
    T, peak = config.model.max_seq_len, resolved.peak
    rows = run.total_batch_size // T
    devices = f"{world.world_size} x {resolved.device_name}, {resolved.threads} threads each"
    rate = f"peak {peak.flops / 1e12:.0f} TFLOP/s bf16" if peak else "peak not known, so no mfu"
    passes = -(-rows // (config.batch.sequences * world.world_size))
    train_rows = manifest.rows("train")
    ratio = run.tokens / counts.scaling
    lines = [
        f"device: {devices} ({rate})",
        f"precision: {resolved.dtype} ({resolved.dtype_reason})" + (", fp8 linears" if config.precision.fp8 else ""),
        f"attention: {resolved.attention} ({resolved.attention_reason}) | loss: {resolved.loss}"
        f" | compile: {'on' if resolved.compile else 'off'} ({resolved.compile_reason})"
        + (" | activations: computed again in backward" if config.precision.grad_checkpoint else ""),
        f"vocabulary: {config.model.vocab_size:,} tokens",
        f"model: d{config.model.depth}, {counts.total:,} parameters ({counts.scaling:,} scaling), "
        f"{run.flops_per_token:.3g} FLOPs per token",
        f"batch: {run.total_batch_size:,} tokens = {rows:,} sequences of {T:,}, over {world.world_size} ranks in {passes} "
        f"passes of up to {config.batch.sequences}",
        f"rates: scaled by {run.lr_scale:.4g}, weight decay {run.weight_decay:.4g}",
        f"horizon: {run.num_iterations:,} iterations, {run.tokens:,} tokens ({ratio:.1f} per scaling parameter), "
        f"{run.flops:.3g} FLOPs, {run.num_iterations * rows / train_rows:.2f} epochs of {train_rows:,} rows",
    ]
    if resolved.device_batch_reason:
        lines.append(f"device batch: {resolved.device_batch_size} sequences ({resolved.device_batch_reason})")
    if resolved.attention_warning:
        lines.append(f"warning: {resolved.attention_warning}")
    if resolved.device_type == "mps":
        lines.append("warning: training on mps is untested")
    if state.step:
        lines.append(f"resuming at step {state.step:,}, {state.rows_consumed:,} rows consumed")
    return lines


def _agree_on_machine(config: Config, job: Job, world: World, sink: Sink) -> Resolved:
    """Rank 0's choices, for all ranks; those of the checkpoint when it was written on the same hardware."""
    mine = resolve(config, local_world_size=world.local_world_size)
    if world.rank == 0:
        kept, device = _kept(config, job, mine, sink), device_of(mine, world)
        mine = kept or mine
        gone = attention.refusals(attention.parts(mine.attention), device, mine.torch_dtype)
        if gone:
            why = attention.in_words(gone)
            sink(Line(f"the checkpoint was trained with attention {mine.attention} ({why}): it is chosen anew"))
        if gone or not kept:
            mine = with_attention(mine, config, device, lambda line: sink(Line(line)))
    return world.broadcast(mine)


def _kept(config: Config, job: Job, mine: Resolved, sink: Sink) -> Resolved | None:
    """The choices of the checkpoint, if there is one from the same hardware and nothing else is asked for now."""
    if not job.checkpoint:
        return None
    stored = Resolved(**checkpoint.read_meta(job.checkpoint)["resolved"])
    if stored.hardware != mine.hardware:
        sink(Line(f"hardware changed from {stored.hardware} to {mine.hardware}: choices are made anew"))
        return None
    return None if _asked_otherwise(config, stored) else stored


def _asked_otherwise(config: Config, stored: Resolved) -> bool:
    """Whether the user now asks for something else than what the checkpoint was trained with."""
    asked = config.precision
    return (
        asked.dtype not in ("auto", stored.dtype)
        or asked.loss not in ("auto", stored.loss)
        or asked.compile not in ("auto", "on" if stored.compile else "off")
        or (asked.attention != "auto" and not attention.admits(asked.attention, stored.attention))
    )


def device_of(resolved: Resolved, world: World) -> torch.device:
    """The device that this rank trains on."""
    if resolved.device_type == "cuda":
        return torch.device("cuda", world.device_index)
    return torch.device(resolved.device_type)


def build_optimizer_of(config: Config, run: Recipe, model: GPT) -> MuonAdamW:
    """The optimizer of a run, with the rates that its batch scales."""
    optim = config.optim
    optimizer = build_optimizer(
        model,
        embedding_lr=optim.embedding_lr * run.lr_scale,
        unembedding_lr=optim.unembedding_lr * run.lr_scale,
        matrix_lr=optim.matrix_lr * run.lr_scale,
        scalar_lr=optim.scalar_lr * run.lr_scale,
        weight_decay=run.weight_decay,
        adam_beta1=None if optim.adam_beta1 == -1 else optim.adam_beta1,
        adam_beta2=None if optim.adam_beta2 == -1 else optim.adam_beta2,
    )
    optimizer.grad_clip = optim.grad_clip
    return optimizer
