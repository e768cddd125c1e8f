"""stepc: a compiler for training steps in JAX.

update(optax.adamw(3e-4)) @ clip(1.0) @ accumulate(4) @ shard(dp("data")) @ grad(loss)
"""

from stepc import inspect as inspect
from stepc import testing as testing
from stepc.compiler.stages import Compiled as Compiled
from stepc.compiler.stages import Lowered as Lowered
from stepc.compiler.step import Step as Step
from stepc.compiler.step import compile as compile
from stepc.core import nodes as nodes
from stepc.errors import BatchError as BatchError
from stepc.errors import BuildError as BuildError
from stepc.errors import CheckpointError as CheckpointError
from stepc.errors import ConfigError as ConfigError
from stepc.errors import DataError as DataError
from stepc.errors import DeviceError as DeviceError
from stepc.errors import EquivalenceError as EquivalenceError
from stepc.errors import FieldTypeError as FieldTypeError
from stepc.errors import FieldValueError as FieldValueError
from stepc.errors import Interrupted as Interrupted
from stepc.errors import LossError as LossError
from stepc.errors import NonFiniteError as NonFiniteError
from stepc.errors import PipelineTypeError as PipelineTypeError
from stepc.errors import Preempted as Preempted
from stepc.errors import ResumeError as ResumeError
from stepc.errors import ShardingError as ShardingError
from stepc.errors import StepcError as StepcError
from stepc.errors import StepError as StepError
from stepc.language.kinds import Kind as Kind
from stepc.language.meaning import Fn as Fn
from stepc.language.meaning import Gradient as Gradient
from stepc.language.pipeline import Pipeline as Pipeline
from stepc.language.pipeline import Transform as Transform
from stepc.language.reference import Reference as Reference
from stepc.language.reference import reference as reference
from stepc.language.sharding import dp as dp
from stepc.language.state import State as State
from stepc.language.words.accumulate import accumulate as accumulate
from stepc.language.words.clip import clip as clip
from stepc.language.words.grad import grad as grad
from stepc.language.words.scale import scale as scale
from stepc.language.words.shard import shard as shard
from stepc.language.words.update import update as update
from stepc.runner.checkpoints import Checkpoints as Checkpoints
from stepc.runner.console import Console as Console
from stepc.runner.jsonl import JSONL as JSONL
from stepc.runner.loop import Run as Run
from stepc.runner.loop import run as run
from stepc.runner.picture import Picture as Picture
from stepc.runner.policies import Raise as Raise
from stepc.runner.policies import Retry as Retry
from stepc.runner.policies import Rollback as Rollback
from stepc.runner.policies import Skip as Skip
from stepc.runner.table import CSV as CSV
from stepc.runner.tensorboard import TensorBoard as TensorBoard
