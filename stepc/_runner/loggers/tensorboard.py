"""A logger for TensorBoard, by way of tensorboardX."""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stepc._language.kinds import HostMetrics
from stepc._runner.loggers import AbstractLogger
from stepc.errors import ConfigError


class TensorBoard(AbstractLogger):
    """Write event files for TensorBoard: a scalar as a curve, an array as a histogram, an event as a text.

    Args:
      directory: created if it is missing.
    Errors: ConfigError without the extra "tensorboard".
    A run that resumes from a checkpoint marks the steps after it as purged, and TensorBoard leaves them out.
    Example:
      >>> with TensorBoard("runs/first") as logger: logger.log({"loss": 2.5}, step=1)  # doctest: +SKIP
    """

    shows_arrays = True

    def __init__(self, directory: str | Path) -> None:
        if importlib.util.find_spec("tensorboardX") is None:
            remedy = "Install it with: pip install 'stepc[tensorboard]'"
            raise ConfigError("`TensorBoard` needs tensorboardX.", suggestion=remedy)
        self.directory = Path(directory)
        # Imported by name, here and not at the top: `import stepc` must not need it.
        self._new_writer = importlib.import_module("tensorboardX").SummaryWriter
        self._num_trims = 0
        self._writer = self._new_writer(str(self.directory))

    def log(self, metrics: HostMetrics, step: int) -> None:
        """Write the metrics of one step."""
        for name, value in metrics.items():
            finite = np.asarray(value)[np.isfinite(value)]
            if np.ndim(value) == 0:
                self._writer.add_scalar(name, value, step)
            elif finite.size:  # tensorboardX cannot place what is not finite
                self._writer.add_histogram(name, finite, step)

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None:
        """Write an event."""
        self._writer.add_text(name, "\n\n".join(f"{key}: {value}" for key, value in facts.items()), step)

    def trim(self, step: int) -> None:
        """Mark later steps as purged."""
        self._writer.close()
        # With a suffix: the writer names its files by the second, and would overwrite the one before.
        self._num_trims += 1
        suffix = f".{self._num_trims}"
        self._writer = self._new_writer(str(self.directory), purge_step=step + 1, filename_suffix=suffix)

    def close(self) -> None:
        self._writer.close()
