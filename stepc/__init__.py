"""stepc: a compiler for training steps in JAX.

update(optax.adamw(3e-4)) @ clip(1.0) @ accumulate(4) @ shard(dp("data")) @ grad(loss)
"""

from importlib import metadata as _metadata

from stepc import errors, inspect, nodes, report, testing
from stepc._compiler.stages import Compiled, Lowered
from stepc._compiler.step import Step, compile
from stepc._compiler.tune import Tuning, tune
from stepc._distributed.start import init_distributed
from stepc._language.kinds import Kind
from stepc._language.padding import pad_batch
from stepc._language.pipeline import Pipeline, Transform
from stepc._language.reference import Reference, reference
from stepc._language.semantics import Fn, Gradient, Microbatch, StepResult
from stepc._language.sharding import dp, logical, tp
from stepc._language.state import State
from stepc._language.terms import Last, Max, Mean, Min, Sum
from stepc._language.transforms.accumulate import accumulate
from stepc._language.transforms.across import across
from stepc._language.transforms.alternate import alternate
from stepc._language.transforms.cast import cast
from stepc._language.transforms.clip import clip
from stepc._language.transforms.ema import ema
from stepc._language.transforms.epochs import epochs
from stepc._language.transforms.grad import grad
from stepc._language.transforms.loss_scale import loss_scale
from stepc._language.transforms.measure import measure
from stepc._language.transforms.noise import noise
from stepc._language.transforms.remat import remat
from stepc._language.transforms.repeat import repeat
from stepc._language.transforms.rows import rows
from stepc._language.transforms.sam import sam
from stepc._language.transforms.scale import scale
from stepc._language.transforms.shard import shard
from stepc._language.transforms.skip_nonfinite import skip_nonfinite
from stepc._language.transforms.update import update
from stepc._runner.callbacks import EarlyStopping, Eval, Profile, Stop
from stepc._runner.checkpoint import Checkpoints, restore
from stepc._runner.evaluation import evaluate
from stepc._runner.loggers.console import Console
from stepc._runner.loggers.files import CSV, JSONL
from stepc._runner.loggers.picture import Picture
from stepc._runner.loggers.tensorboard import TensorBoard
from stepc._runner.policies import Raise, Retry, Rollback, Skip
from stepc._runner.run import Buffers, Data, run
from stepc._runner.throughput import Throughput
from stepc._runner.trainer import Run
from stepc._runner.watchdog import Watchdog
from stepc.errors import (
    BatchError,
    BudgetError,
    BuildError,
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    EquivalenceError,
    FieldTypeError,
    FieldValueError,
    Interrupted,
    LossError,
    NonFiniteError,
    PeerError,
    PipelineTypeError,
    Preempted,
    RejectedError,
    ResumeError,
    ShardingError,
    StepcError,
    StepError,
)
from stepc.inspect.budget import Budget
from stepc.inspect.topology import topology

try:
    __version__ = _metadata.version("stepc")
except _metadata.PackageNotFoundError:
    __version__ = "0+not.installed"  # imported from a checkout that pip does not know

__all__ = [
    "BatchError",
    "Budget",
    "BudgetError",
    "Buffers",
    "BuildError",
    "CSV",
    "CheckpointError",
    "Checkpoints",
    "Compiled",
    "ConfigError",
    "Console",
    "Data",
    "DataError",
    "DeviceError",
    "EarlyStopping",
    "EquivalenceError",
    "Eval",
    "FieldTypeError",
    "FieldValueError",
    "Fn",
    "Gradient",
    "Interrupted",
    "JSONL",
    "Kind",
    "Last",
    "LossError",
    "Lowered",
    "Max",
    "Mean",
    "Microbatch",
    "Min",
    "NonFiniteError",
    "PeerError",
    "Picture",
    "Pipeline",
    "PipelineTypeError",
    "Preempted",
    "Profile",
    "Raise",
    "Reference",
    "RejectedError",
    "ResumeError",
    "Retry",
    "Rollback",
    "Run",
    "ShardingError",
    "Skip",
    "State",
    "Step",
    "StepError",
    "StepResult",
    "StepcError",
    "Stop",
    "Sum",
    "TensorBoard",
    "Throughput",
    "Transform",
    "Tuning",
    "Watchdog",
    "accumulate",
    "across",
    "alternate",
    "cast",
    "clip",
    "compile",
    "dp",
    "ema",
    "epochs",
    "errors",
    "evaluate",
    "grad",
    "init_distributed",
    "inspect",
    "logical",
    "loss_scale",
    "measure",
    "nodes",
    "noise",
    "pad_batch",
    "reference",
    "remat",
    "repeat",
    "report",
    "restore",
    "rows",
    "run",
    "sam",
    "scale",
    "shard",
    "skip_nonfinite",
    "testing",
    "topology",
    "tp",
    "tune",
    "update",
]
