"""A seventh system, as docs/extending.md adds it."""

import dataclasses
import pathlib
import re
import runpy
import sys

import jax
import jax.numpy as jnp
import pytest
from tiny import CONFIG, init_params, make_batch, tiny_run_config, to_device

from dilbert_jax import run
from dilbert_jax.config import check_config
from dilbert_jax.models import find_system, make_network
from dilbert_jax.reproduce import grid
from dilbert_jax.training import objectives

EXTENDING = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def two_tower(tmp_path, monkeypatch):
    """The module of docs/extending.md, saved as it says."""
    (code,) = re.findall(r"```python\n(.*?)```", EXTENDING.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "two_tower.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_lab.two_tower"
    for name in ("my_lab", "my_lab.two_tower"):
        sys.modules.pop(name, None)


def documented_config():
    """What the documented command trains."""
    ((path, system),) = re.findall(
        r"python train\.py --config=([\w/]+\.py):(\S+)", EXTENDING.read_text(encoding="utf-8")
    )
    return runpy.run_path(str(EXTENDING.parents[1] / path))["get_config"](system)


@pytest.mark.numerics
def test_a_seventh_system_is_a_file_and_a_line_of_configuration(two_tower):
    config = documented_config()
    check_config(config)
    assert config.model.name == two_tower
    assert config.data.guided_masking == 0 and config.train.single_network  # as its `System` says
    assert grid.parse_cell(f"phantom/{two_tower}/matched/0").system == two_tower
    model_config = dataclasses.replace(CONFIG, name=two_tower, dropout=0.0)
    params, batch = init_params(config=model_config), to_device(make_batch())
    model, own_losses = make_network(model_config), find_system(two_tower).own_losses

    def objective(params):
        return objectives.pretraining_objective(
            model,
            objectives.LossConfig(),
            {"student": params},
            None,
            batch,
            jax.random.key(0),
            own_losses=own_losses,
        )

    (_, metrics), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    assert metrics["student/contrast"] > 0
    for tower in ("text_0", "clip_0"):
        assert float(jnp.abs(gradient[tower]["query"]["dense"]["kernel"]).max()) > 0


@pytest.mark.slow
def test_the_seventh_system_trains_as_documented(two_tower, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "use_compilation_cache", lambda: None)
    config = tiny_run_config(name="phantom/small", data_dir=str(tmp_path / "data"))
    documented = documented_config()
    config.model.name = documented.model.name
    config.data.guided_masking = documented.data.guided_masking
    config.train.single_network = documented.train.single_network
    assert run.train_and_report(config, tmp_path / "run").exists()
