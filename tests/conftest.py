"""Shared fixtures: real data and reference vectors where the environment names them; a seeded generator."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from dilbert_jax.quick_compile import quick_compilation

# Before jax is imported anywhere: the tests are written for the CPU unless the caller names another platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = quick_compilation(os.environ.get("XLA_FLAGS", ""))

import numpy as np
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs beside pytest's own cache: many tests compile the same ones, and so does the next run."""
    cache = getattr(config, "cache", None)
    if cache is None:  # -p no:cacheprovider
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("compilation")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.0")


def _folder_from_environment(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    folder = Path(value)
    if not folder.is_dir():
        raise ValueError(f"{variable}={value} is not a folder; point it at the data or unset it")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty folder for source files, where `preparing.prepare` looks for them."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder that holds the real data sets (busi/, pocus/, ...); skips when DILBERT_DATA_DIR is unset."""
    return _folder_from_environment("DILBERT_DATA_DIR")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The folder of reference vectors (*.npz); skips when DILBERT_REFERENCE_DIR is unset."""
    return _folder_from_environment("DILBERT_REFERENCE_DIR")


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator, the same in every test and every run."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An untrained run on the small export: an `Experiment`, not to be changed in place."""
    from small_export import shared_experiment  # of no use to tests without it, and slow to import

    return shared_experiment(tmp_path_factory)


@pytest.fixture(scope="session")
def params(experiment: Any) -> Any:
    """Fresh parameters of one network of `experiment`."""
    import jax

    return experiment.context.init_params(jax.random.key(0))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished reproduction in which DILBERT is clearly best and BERT is no better than chance."""
    from cell_samples import finish

    finish(tmp_path)
    return tmp_path


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs the shared run of two networks; skips marked tests whose precondition is absent."""
    for item in items:
        if "trained" in getattr(item, "fixturenames", ()):  # minutes of compiling
            item.add_marker(pytest.mark.numerics)
    absent = {
        "real_data": "" if os.environ.get("DILBERT_DATA_DIR") else "DILBERT_DATA_DIR is not set",
        "torch": "" if importlib.util.find_spec("torch") else "the extra 'torch' is not installed",
    }
    for item in items:
        for name, reason in absent.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
