"""Where checkpoints may be: paths that Orbax cannot read back are refused before the first step."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import stepc as sc
from stepc._runner import checkpoint_store
from stepc.testing.probes import over_rows, probe_batch, probe_params


def trained(directory: str | Path, *, steps: int = 2) -> sc.Run:
    step = sc.compile(sc.update(optax.sgd(0.25)) @ sc.grad(over_rows))
    batches = [probe_batch(8, seed=number) for number in range(steps)]
    return sc.run(step, step.init(probe_params()), batches, checkpoint=sc.Checkpoints(directory, every=1))


@pytest.mark.parametrize("name", ["[shared]", "a[b", "back\\slash", "[!x]"])
def test_path_that_orbax_cannot_read_back_is_refused(name: str, tmp_path: Path) -> None:
    directory = tmp_path / name / "run"
    with pytest.raises(sc.CheckpointError, match="Orbax could not read them back") as raised:
        trained(directory)
    assert str(directory) in str(raised.value)
    assert not directory.exists()


def test_working_directory_that_orbax_cannot_read_back_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "[shared]").mkdir()
    monkeypatch.chdir(tmp_path / "[shared]")
    with pytest.raises(sc.CheckpointError, match="Orbax could not read them back"):
        trained("run")


@pytest.mark.parametrize("name", ["a]b", "a*b", "a?b", "a{b,c}", "a b", "ü", "a%20b", "a#b"])
def test_any_other_path_is_read_back(name: str, tmp_path: Path) -> None:
    first = trained(tmp_path / name)
    again = trained(tmp_path / name)
    assert (first.steps, again.steps) == (2, 4)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = trained("~/run")
    assert (tmp_path / "run" / "2").is_dir()
    assert not (tmp_path / "~").exists()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.state.params))


@pytest.mark.parametrize("directory", ["s3://bucket/run", "gs://bucket/run", Path("s3://bucket/run"), "file:///run"])
def test_url_is_refused(directory: str | Path) -> None:
    with pytest.raises(sc.ConfigError, match="expected a directory of this machine's file systems, not a URL"):
        sc.Checkpoints(directory, every=1)


def test_empty_directory_is_refused() -> None:
    with pytest.raises(sc.ConfigError, match="directory  expected a path, got ''"):
        sc.Checkpoints("", every=1)


def test_checkpoint_without_a_manifest_is_not_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_store, "MANIFEST", "no such file")
    with pytest.raises(sc.CheckpointError, match="it was written, and is not there"):
        trained(tmp_path / "run")


def test_timeout_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sc.ConfigError, match="timeout_seconds  expected a positive number, got inf"):
        sc.Checkpoints(tmp_path, every=1, timeout_seconds=float("inf"))
