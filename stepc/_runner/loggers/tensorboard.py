"""A logger for TensorBoard; the only file that names its writer, which is loaded when a logger is made."""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from stepc.errors import ConfigError


class TensorBoard:
    """Write event files that TensorBoard reads: each metric a curve, each event a text.

    Args:
      directory: made if it is missing.
    Errors: ConfigError without the extra "tensorboard".
    A run that goes on from a checkpoint marks what came after it as void; TensorBoard then leaves it out.
    Example:
      >>> with TensorBoard("runs/first") as logger: logger.log({"loss": 2.5}, step=1)  # doctest: +SKIP
    """

    def __init__(self, directory: str | Path) -> None:
        if importlib.util.find_spec("tensorboardX") is None:
            remedy = "Install it with: pip install 'stepc[tensorboard]'"
            raise ConfigError("`TensorBoard` needs tensorboardX.", suggestion=remedy)
        self.directory = Path(directory)
        # By name, and not at the top: `import stepc` must not need it.
        self._make = importlib.import_module("tensorboardX").SummaryWriter
        self.num_trims = 0
        self._writer = self._make(str(self.directory))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None:
        """Write what happened."""
        self._writer.add_text(name, "\n\n".join(f"{key}: {value}" for key, value in facts.items()), step)

    def trim(self, step: int) -> None:
        """Mark later steps as void."""
        self._writer.close()
        # A name of its own: the writer names a file by the second, and would write over the one before.
        self.num_trims += 1
        self._writer = self._make(str(self.directory), purge_step=step + 1, filename_suffix=f".{self.num_trims}")

    def close(self) -> None:
        """Write what is left. Closing twice is harmless."""
        self._writer.close()

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
