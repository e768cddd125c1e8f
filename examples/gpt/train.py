"""Train a small GPT with a compiled step, and print everything there is to see of the step."""

import io
import logging
import os
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import stepc as sc
from examples.gpt import model as gpt
from examples.gpt import text
from examples.gpt.job import Job
from examples.gpt.run_directory import RunDirectory, open_run

NUM_LOGS = 150
NUM_VALIDATIONS = 5  # besides the one before the first step
SAVE_EVERY = 50
VALIDATION_ROWS = 32
PROMPT = b"def "
TEMPERATURE = 0.9


def train(job: Job) -> None:
    """Train, and print the pipeline, the plan, the collectives, the progress, a sample and the paths of the files.

    Meaning: the run is saved every 50 steps; a second call with the same job resumes it, bitwise.
    Errors: those of stepc, before the first step; sc.Interrupted on Ctrl-C, after the curve so far is drawn.
    """
    if job.distributed or "STEPC_COORDINATOR" in os.environ:  # set by `stepc launch`
        sc.init_distributed()
    mesh = _mesh(job.devices)
    with nullcontext() if jax.process_index() == 0 else redirect_stdout(io.StringIO()):
        source = text.read(text.standard_library(), max_bytes=job.text_bytes)
        step = sc.compile(pipeline_of(job), mesh=mesh)
        state = step.init(gpt.init(jax.random.key(job.seed), job.size), seed=job.seed)
        if jax.process_index() == 0:
            _lead(job, step, state, source)
        elif job.fresh or job.out is None or not RunDirectory(job.out).is_finished():
            _follow(job, step, state, source)


def pipeline_of(job: Job) -> sc.Pipeline:
    """The step of a job."""
    warm_up = min(job.steps // 10, 100)
    schedule = optax.warmup_cosine_decay_schedule(0.0, job.learning_rate, warm_up, job.steps)
    return (
        sc.skip_nonfinite()
        @ sc.update(optax.adamw(schedule, b2=0.99, weight_decay=0.01))
        @ sc.clip(1.0)
        @ sc.accumulate(job.k)
        @ sc.shard(sc.dp("data"))
        @ _gradient(job)
    )


def _gradient(job: Job) -> sc.Transform:
    """The gradient of the loss in the job's precision; with one key per row if there is dropout."""
    if job.dropout:
        loss = gpt.make_dropout_loss(job.size, dropout=job.dropout)
        return sc.grad(sc.cast(jnp.bfloat16) @ loss, rng="example") if job.bf16 else sc.grad(loss, rng="example")
    loss = gpt.make_loss(job.size)
    return sc.grad(sc.cast(jnp.bfloat16) @ loss) if job.bf16 else sc.grad(loss)


def _mesh(num_devices: int) -> Mesh:
    """Simulated devices if there is only a CPU, else at most those that exist; in a job, the devices of all."""
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)  # has no effect on accelerators
    except RuntimeError:
        pass  # a backend is running already; its devices are counted below
    if jax.process_count() > 1:
        return jax.make_mesh((jax.device_count(),), ("data",))
    devices = jax.devices()
    if devices[0].platform == "cpu" and len(devices) < num_devices:
        raise sc.ConfigError(
            f"Cannot simulate {num_devices} devices: jax is running already, with {len(devices)}.",
            suggestion="Call this before anything else uses jax.",
        )
    devices = devices[:num_devices]
    return jax.make_mesh((len(devices),), ("data",), devices=devices)


def _lead(job: Job, step: sc.Step, state: sc.State, source: text.Text) -> None:
    """The part of the first process, or of the only one."""
    digest = f"{len(source.train)} bytes, CRC-32 {zlib.crc32(source.train.tobytes()):08x}"
    identity = {**job.identity, "text": digest}
    directory = open_run(job.out, identity, fresh=job.fresh)
    if directory.is_finished():
        print(f"{directory.path} holds a finished run of {job.steps:,} steps. --fresh starts over.")
    else:
        _describe(job, step, state, source)
        _run(job, step, state, source, directory, identity)
    print(f"metrics  {directory.metrics}\ncurve    {directory.curve}")


def _describe(job: Job, step: sc.Step, state: sc.State, source: text.Text) -> None:
    batch = next(_data(job, source))
    lowered = step.lower(state, batch if jax.process_count() == 1 else step.put(batch))
    print(f"{len(source.train):,} bytes to learn from, {len(source.held_out):,} bytes of other files held out")
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters", end="\n\n")
    print(lowered.plan.pipeline, end="\n\n")
    print(lowered.plan, end="\n\n", flush=True)
    print("as compiled", lowered.compile().collectives(), sep="\n\n", end="\n\n", flush=True)


def _data(job: Job, source: text.Text) -> text.Batches:
    """The rows of this process: every process draws the same batch and takes its part."""
    part = (jax.process_index(), jax.process_count())
    return text.Batches(source.train, rows=job.batch, context=job.context, seed=job.seed, part=part)


@dataclass(frozen=True)
class _Validation:
    """Held-out windows, and the bigram's loss on them."""

    windows: tuple[gpt.Batch, ...]
    bigram: float
    loss: gpt.Loss

    def __call__(self, params: gpt.GPT) -> float:
        """The mean loss in nats per byte, by a plain forward pass on one device, so that it checks the step too."""
        on_one_device = _on_one_device(params)
        return sum(float(self.loss(on_one_device, batch)) for batch in self.windows) / len(self.windows)


def _validation(job: Job, source: text.Text) -> _Validation:
    windows = text.validation_batches(
        source.held_out, rows=VALIDATION_ROWS, context=job.context, num_batches=job.validation_batches
    )
    on_device = tuple({"tokens": jnp.asarray(batch["tokens"])} for batch in windows)
    return _Validation(on_device, text.bigram_loss(source.train, windows), jax.jit(gpt.make_loss(job.size)))


def _on_one_device(params: gpt.GPT) -> gpt.GPT:
    """A copy of the replicated parameters on the first device of this process: a step donates its own."""
    return jax.tree.map(lambda leaf: jnp.copy(leaf.addressable_data(0)), params)


def _run(
    job: Job,
    step: sc.Step,
    state: sc.State,
    source: text.Text,
    directory: RunDirectory,
    identity: Mapping[str, object],
) -> None:
    """Run the steps, from the last checkpoint if there is one; draw the curve however they end; write a sample."""
    validation = _validation(job, source)
    directory.begin(identity)
    with (
        _only_the_console_shows_events(),
        sc.Console(steps=job.steps, tokens_per_step=job.batch * job.context) as console,
        sc.JSONL(directory.metrics) as lines,
    ):

        def validate(step: int, metrics: Mapping[str, float], snapshot: Callable[[], sc.State]) -> None:
            with console.paused():
                loss = validation(snapshot().params)
            console.say(f"step {step}: validation {loss:.3f} nats per byte (bigram {validation.bigram:.3f})")
            lines.log({"validation_loss": loss, "bigram_loss": validation.bigram}, step)

        try:
            if not directory.has_checkpoint():
                validate(0, {}, lambda: state)
            run = sc.run(
                step,
                state,
                _data(job, source),
                steps=job.steps,
                checkpoint=_checkpoints(job, directory),
                loggers=(console, lines),
                log_every=_log_every(job),
                hooks=[(every, validate) for every in _validate_every(job)],
            )
        except sc.Interrupted:
            console.close()
            print(f"\nTo resume, run this command again with --out {directory.path}")
            print(f"metrics  {directory.metrics}\ncurve    {directory.curve}")
            raise
        finally:
            directory.draw_curve(bigram=validation.bigram)
    sample = _sample(job, run.state)
    print(f"\na sample\n\n{sample}\n")
    directory.finish(sample)


def _follow(job: Job, step: sc.Step, state: sc.State, source: text.Text) -> None:
    """The part of the other processes: the same steps and the same snapshots, and nothing to print."""
    checkpoint = None if job.out is None else _checkpoints(job, RunDirectory(job.out))
    hooks = [(every, lambda step, metrics, snapshot: snapshot()) for every in _validate_every(job)]
    data = _data(job, source)
    sc.run(step, state, data, steps=job.steps, checkpoint=checkpoint, log_every=_log_every(job), hooks=hooks)


def _checkpoints(job: Job, directory: RunDirectory) -> sc.Checkpoints | None:
    """Several processes save only in a directory that all of them were given."""
    if jax.process_count() > 1 and job.out is None:
        return None
    return sc.Checkpoints(directory.checkpoints, every=SAVE_EVERY)


def _log_every(job: Job) -> int:
    return max(1, job.steps // NUM_LOGS)


def _validate_every(job: Job) -> list[int]:
    """At regular steps, and at the last one."""
    every = -(-job.steps // NUM_VALIDATIONS)
    return [every, *([job.steps] if job.steps % every else [])]


@contextmanager
def _only_the_console_shows_events() -> Generator[None]:
    """Python's log would print every event a second time."""
    log = logging.getLogger("stepc")
    propagated, silent = log.propagate, logging.NullHandler()
    log.addHandler(silent)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(silent)
        log.propagate = propagated


def _sample(job: Job, state: sc.State) -> str:
    """Generated text; bytes that a terminal could take for a command are shown as `?`."""
    drawn = gpt.sample(
        _on_one_device(state.params),
        PROMPT,
        length=job.sample_bytes,
        key=jax.random.key(job.seed),
        temperature=TEMPERATURE,
        size=job.size,
    )
    return "".join(chr(byte) if 32 <= byte < 127 or byte in b"\n\t" else "?" for byte in PROMPT + drawn)
