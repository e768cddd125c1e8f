"""The program behind `stepc train`: a small GPT and a compiled step, with everything there is to see of them."""

import io
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import stepc as sc
from stepc._distributed.coordination import ending_all
from stepc._distributed.start import is_launched
from stepc._runner.loggers.console import Console
from stepc._runner.loggers.files import JSONL
from stepc.programs import curve, gpt, text
from stepc.programs.folder import Folder, found
from stepc.programs.job import Job

LOGS = 150  # how often a whole run is logged
VALIDATIONS = 5  # how often it is judged, besides at its beginning
SAVE_EVERY = 50
VALIDATION_ROWS = 32
PROMPT = b"def "
TEMPERATURE = 0.9


def train(job: Job) -> None:
    """Train, and print the pipeline, the plan, the collectives, the progress, a sample, and where the files are.

    Meaning: every 50 steps the run is saved; a second call with the same job goes on from there, to the same bits.
    Errors: those of stepc, before the first step; sc.Interrupted on Ctrl-C, after the curve so far is drawn.
    """
    if job.distributed or is_launched():
        sc.init_distributed()
    mesh = _mesh(job.devices)
    with ending_all(), nullcontext() if jax.process_index() == 0 else redirect_stdout(io.StringIO()):
        _train(job, mesh)


def _train(job: Job, mesh: Mesh) -> None:
    source = text.read(text.standard_library(), max_bytes=job.text_bytes)
    about = {**job.identity, "text": f"{len(source.train)} bytes, CRC-32 {zlib.crc32(source.train.tobytes()):08x}"}
    step = sc.compile(pipeline_of(job), mesh=mesh)
    state = step.init(gpt.init(jax.random.key(job.seed), job.size), seed=job.seed)
    data, other = _data(job, source), _data(job, source)
    if jax.process_index() > 0:
        if job.fresh or job.out is None or not Folder(job.out).is_finished():
            _followed(job, step, state, data)
        return
    folder = found(job.out, about, fresh=job.fresh)
    if folder.is_finished():
        print(f"{folder.path} holds a finished run of {job.steps:,} steps: nothing is left to do. --fresh begins anew.")
    else:
        _say(source, state, step.lower(state, next(other) if jax.process_count() == 1 else step.put(next(other))))
        _trained(job, step, state, data, _exam(job, source), folder, about)
    print(f"metrics  {folder.metrics}\ncurve    {folder.picture}")


def _data(job: Job, source: text.Text) -> text.Batches:
    """The rows of this process: all draw the same batch, and each takes its part."""
    part = (jax.process_index(), jax.process_count())
    return text.Batches(source.train, rows=job.batch, context=job.context, seed=job.seed, part=part)


def _checkpoints(job: Job, folder: Folder) -> sc.Checkpoints | None:
    """Several processes save where all of them were told to."""
    if jax.process_count() > 1 and job.out is None:
        return None
    return sc.Checkpoints(folder.checkpoints, every=SAVE_EVERY)


def _say(source: text.Text, state: sc.State, lowered: sc.Lowered) -> None:
    print(f"{len(source.train):,} bytes to learn from, {len(source.held_out):,} bytes of other files held out")
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters", end="\n\n")
    print(lowered.plan.pipeline, end="\n\n")
    print(lowered.plan, end="\n\n", flush=True)
    print("as compiled", lowered.compile().collectives(), sep="\n\n", end="\n\n", flush=True)


def pipeline_of(job: Job) -> sc.Pipeline:
    """The step of a job: what it prints first."""
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
    """The gradient of the loss in the job's precision; with one key a row if anything is drawn."""
    if job.dropout:
        loss = gpt.make_dropout_loss(job.size, dropout=job.dropout)
        return sc.grad(sc.cast(jnp.bfloat16) @ loss, rng="example") if job.bf16 else sc.grad(loss, rng="example")
    loss = gpt.make_loss(job.size)
    return sc.grad(sc.cast(jnp.bfloat16) @ loss) if job.bf16 else sc.grad(loss)


def _mesh(wanted: int) -> Mesh:
    """As many simulated devices as wanted if there is only a CPU; else at most those that there are."""
    try:
        jax.config.update("jax_num_cpu_devices", wanted)  # has no effect on accelerators
    except RuntimeError:
        pass  # some backend runs already; what it has is seen below
    if jax.process_count() > 1:
        return jax.make_mesh((jax.device_count(),), ("data",))
    devices = jax.devices()
    if devices[0].platform == "cpu" and len(devices) < wanted:
        raise sc.ConfigError(
            f"{wanted} devices cannot be simulated: jax is running already, with {len(devices)}.",
            suggestion="Call this before anything else uses jax.",
        )
    devices = devices[:wanted]
    return jax.make_mesh((len(devices),), ("data",), devices=devices)


@dataclass(frozen=True)
class _Exam:
    """The windows that a run is judged by, and what to beat."""

    windows: tuple[gpt.Batch, ...]
    bigram: float
    loss: gpt.Loss

    def judge(self, params: gpt.GPT) -> float:
        """The mean loss, in nats per byte, computed on one device by a forward pass that stepc has no part in."""
        on_one = _on_one(params)
        return sum(float(self.loss(on_one, batch)) for batch in self.windows) / len(self.windows)


def _on_one(params: gpt.GPT) -> gpt.GPT:
    """As they lie whole on the first device of this process; a copy, as a step donates what it is given."""
    return jax.tree.map(lambda leaf: jnp.copy(leaf.addressable_data(0)), params)


def _exam(job: Job, source: text.Text) -> _Exam:
    windows = text.validation_batches(
        source.held_out, rows=VALIDATION_ROWS, context=job.context, num_batches=job.validation_batches
    )
    on_device = tuple({"tokens": jnp.asarray(batch["tokens"])} for batch in windows)
    return _Exam(on_device, text.bigram_loss(source.train, windows), jax.jit(gpt.make_loss(job.size)))


@dataclass(frozen=True)
class _Record:
    """What is told and kept of a run."""

    exam: _Exam
    console: Console
    lines: JSONL

    def judge(self, step: int, metrics: Mapping[str, float], snapshot: Callable[[], sc.State]) -> None:
        """Judge a state, and put the result where the losses go; a hook of `run`."""
        with self.console.paused():
            loss = self.exam.judge(snapshot().params)
        self.console.say(f"step {step}: validation {loss:.3f} nats per byte (bigram {self.exam.bigram:.3f})")
        self.lines.log({"validation_loss": loss, "bigram_loss": self.exam.bigram}, step)


def _followed(job: Job, step: sc.Step, state: sc.State, data: text.Batches) -> None:
    """The part of a process that is not the first: the same steps and copies, and nobody to tell."""
    checkpoint = None if job.out is None else _checkpoints(job, Folder(job.out))
    hooks = [(every, lambda step, metrics, snapshot: snapshot()) for every in _moments(job)]
    sc.run(step, state, data, steps=job.steps, checkpoint=checkpoint, log_every=_log_every(job), hooks=hooks)


def _moments(job: Job) -> list[int]:
    """How often, and at the end, a run is judged."""
    every = -(-job.steps // VALIDATIONS)
    return [every, *([job.steps] if job.steps % every else [])]


def _log_every(job: Job) -> int:
    return max(1, job.steps // LOGS)


def _trained(
    job: Job,
    step: sc.Step,
    state: sc.State,
    data: text.Batches,
    exam: _Exam,
    folder: Folder,
    about: Mapping[str, object],
) -> None:
    """Run the steps, from the last checkpoint if there is one; draw the curve whatever ends them."""
    folder.begin(about)
    with (
        _told_once(),
        Console(steps=job.steps, tokens_per_step=job.batch * job.context) as console,
        JSONL(folder.metrics) as lines,
    ):
        record = _Record(exam, console, lines)
        try:
            if not folder.has_checkpoint():
                record.judge(0, {}, lambda: state)
            run = sc.run(
                step,
                state,
                data,
                steps=job.steps,
                checkpoint=_checkpoints(job, folder),
                loggers=(console, lines),
                log_every=_log_every(job),
                hooks=[(every, record.judge) for every in _moments(job)],
            )
        except sc.Interrupted:
            console.close()
            print(f"\nTo go on, run this command again with --out {folder.path}")
            print(f"metrics  {folder.metrics}\ncurve    {folder.picture}")
            raise
        finally:
            curve.draw(folder.picture, folder.metrics, bigram=exam.bigram)
    sample = _sample(job, run.state)
    print(f"\na sample\n\n{sample}\n")
    folder.finish(sample)


@contextmanager
def _told_once() -> Iterator[None]:
    """The console shows every event: let the log of Python not print it a second time."""
    log = logging.getLogger("stepc")
    before, silent = log.propagate, logging.NullHandler()
    log.addHandler(silent)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(silent)
        log.propagate = before


def _sample(job: Job, state: sc.State) -> str:
    """Text in the model's own words; what a terminal could take for a command is shown as `?`."""
    drawn = gpt.sample(
        _on_one(state.params),
        PROMPT,
        length=job.sample_bytes,
        key=jax.random.key(job.seed),
        temperature=TEMPERATURE,
        size=job.size,
    )
    return "".join(chr(byte) if 32 <= byte < 127 or byte in b"\n\t" else "?" for byte in PROMPT + drawn)
