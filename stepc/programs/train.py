"""The program behind `stepc train`: a small GPT and a compiled step, with everything there is to see of them."""

import io
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import stepc as sc
from stepc.processes.alarm import ending_all
from stepc.processes.start import is_launched
from stepc.programs import gpt, text
from stepc.programs.curve import Curve
from stepc.programs.job import Job
from stepc.runner.console import Console
from stepc.runner.jsonl import JSONL

METRICS, PICTURE = "metrics.jsonl", "loss.png"
LOGS = 150  # how often a whole run is logged
VALIDATIONS = 5  # how often it is judged, besides at its beginning
VALIDATION_ROWS = 32
PROMPT = b"def "
TEMPERATURE = 0.9


def train(job: Job) -> None:
    """Train, and print the pipeline, the plan, the collectives, the progress, a sample, and where the files are.

    Errors: those of stepc, before the first step; sc.Interrupted on Ctrl-C, after the curve so far is drawn.
    """
    if job.distributed or is_launched():
        sc.init_distributed()
    mesh = _mesh(job.devices)
    with ending_all(), nullcontext() if jax.process_index() == 0 else redirect_stdout(io.StringIO()):
        _train(job, mesh)


def _train(job: Job, mesh: Mesh) -> None:
    source = text.read(text.standard_library(), max_bytes=job.text_bytes)
    data = _mine(text.batches(source.train, rows=job.batch, context=job.context, seed=job.seed), job.batch)
    exam = _exam(job, source) if jax.process_index() == 0 else None
    params = gpt.init(jax.random.key(job.seed), job.size)
    print(f"{len(source.train):,} bytes to learn from, {len(source.held_out):,} bytes of other files held out")
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters", end="\n\n")

    pipeline = pipeline_of(job)
    print(pipeline, end="\n\n", flush=True)
    step = sc.compile(pipeline, mesh=mesh)
    state = step.init(params, seed=job.seed)
    lowered = step.lower(state, step.put(next(data)))
    folder = _folder(job.out) if exam is not None else Path()
    print(lowered.plan, end="\n\n", flush=True)
    print("as compiled", lowered.compile().collectives(), sep="\n\n", end="\n\n", flush=True)
    if exam is None:
        _followed(job, step, state, data)
        return
    try:
        state = _trained(job, step, state, data, exam, folder)
        print(f"\na sample\n\n{_sample(job, state)}\n")
    finally:
        print(f"metrics  {folder / METRICS}\ncurve    {folder / PICTURE}")


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


def _mine(data: Iterator[text.Windows], rows: int) -> Iterator[text.Windows]:
    """The rows of this process: all draw the same batch, and each takes its part."""
    num, me = jax.process_count(), jax.process_index()
    if rows % num:
        raise sc.ConfigError(f"{rows} rows do not divide by {num} processes.")
    mine = slice(me * rows // num, (me + 1) * rows // num)
    return ({name: leaf[mine] for name, leaf in batch.items()} for batch in data)


def _folder(wanted: Path | None) -> Path:
    """A folder that holds no other run."""
    if wanted is not None:
        if wanted.exists() and not (wanted.is_dir() and not any(wanted.iterdir())):
            raise sc.ConfigError(
                f"{wanted} exists and is not an empty folder; a run never overwrites what is there.",
                suggestion="Name another folder, or none for one named after the date and time.",
            )
        try:
            wanted.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise sc.ConfigError(f"The folder {wanted} cannot be made: {error.strerror}.") from error
        return wanted
    now = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    names = (now if number == 1 else f"{now}-{number}" for number in count(1))
    return next(folder for name in names if _was_made(folder := Path("runs", name)))


def _was_made(folder: Path) -> bool:
    """Whether this call made the folder; to ask whether it exists, and then to make it, would be a race."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


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
    curve: Curve

    def judge(self, state: sc.State, step: int) -> None:
        """Judge a state, and put the result where the losses go."""
        jax.block_until_ready(state)  # so that the pause holds no training
        with self.console.paused():
            loss = self.exam.judge(state.params)
        self.console.say(f"step {step}: validation {loss:.3f} nats per byte (bigram {self.exam.bigram:.3f})")
        self.lines.log({"validation_loss": loss, "bigram_loss": self.exam.bigram}, step)
        self.curve.validated(loss, step=step)


class _Judged:
    """A step, judged now and then: `run` calls it as it calls any step, and the loop need not know."""

    def __init__(self, step: sc.Step, record: _Record | None, *, every: int) -> None:
        self.step, self.record, self.every = step, record, every
        self.num_calls = 0  # `state.step` would have to be waited for

    def __call__(self, state: sc.State, batch: text.Windows) -> tuple[sc.State, dict[str, jax.Array]]:
        if self.record is not None and self.num_calls % self.every == 0:
            self.record.judge(state, self.num_calls)
        self.num_calls += 1
        return self.step(state, batch)

    def put(self, batch: text.Windows) -> text.Windows:
        return self.step.put(batch)


def _followed(job: Job, step: sc.Step, state: sc.State, data: Iterator[text.Windows]) -> None:
    """The part of a process that is not the first: the same steps, and nobody to tell."""
    sc.run(_Judged(step, None, every=1), state, data, steps=job.steps)


def _trained(
    job: Job, step: sc.Step, state: sc.State, data: Iterator[text.Windows], exam: _Exam, folder: Path
) -> sc.State:
    """Run the steps; draw the curve whatever ends them."""
    tokens_per_step = job.batch * job.context
    with (
        Console(steps=job.steps, tokens_per_step=tokens_per_step) as console,
        JSONL(folder / METRICS) as lines,
    ):
        record = _Record(exam, console, lines, Curve())
        judged = _Judged(step, record, every=-(-job.steps // VALIDATIONS))
        try:
            run = sc.run(
                judged,
                state,
                data,
                steps=job.steps,
                loggers=(console, lines, record.curve),
                log_every=max(1, job.steps // LOGS),
            )
            record.judge(run.state, run.steps)
        finally:
            record.curve.draw(folder / PICTURE, bigram=exam.bigram)
    return run.state


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
