"""The PyTorch counterpart: same outputs, gradients and training; the table of names; weights out and in; errors."""

# ruff: noqa: E402 (without PyTorch this file is skipped before it imports anything that needs it)

import dataclasses
import functools
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, NAMES, init_params, make_batch, tiny_run_config

torch = pytest.importorskip("torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

from flax import traverse_util

from dilbert_jax.config import save_config
from dilbert_jax.experiment import load_context
from dilbert_jax.knowledge import ReportTokenizer
from dilbert_jax.labels import LabelSpace
from dilbert_jax.models import Dilbert, NetworkConfig
from dilbert_jax.models.embeddings import sinusoids
from dilbert_jax.parity import compare, names, torch_losses
from dilbert_jax.parity.__main__ import main
from dilbert_jax.parity.agreement import Agreement, render, to_json
from dilbert_jax.parity.convert import import_network, read_tensors
from dilbert_jax.parity.setting import Setting
from dilbert_jax.parity.torch_layers import attend
from dilbert_jax.parity.torch_model import TorchDilbert
from dilbert_jax.parity.torch_training import Training, clip_global_norm, learning_rate
from dilbert_jax.relational import angle_loss, distance_loss
from dilbert_jax.training.checkpoints import StageCheckpoints
from dilbert_jax.training.objectives import VISUAL, LossConfig
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from dilbert_jax.training.stages import network_params
from dilbert_jax.training.step import TrainState

pytestmark = [pytest.mark.torch, pytest.mark.numerics]

# As little as compiles fast: two layers once, for the maps of the last one; one stage of the 3-D CNN for training.
DEEP = dataclasses.replace(CONFIG, dropout=0.0, channels=(8, 16), blocks=(1, 1))
FLAT = dataclasses.replace(DEEP, num_layers=1)
NARROW = dataclasses.replace(FLAT, channels=(8,), blocks=(1,))
WEIGHTED = {
    "summary": 2.0,
    "mdc": 5.0,
    "temperature": 4.0,
    "scale_by_square": True,
    "reduction": "mean_valid",
}
NETWORKS = ("teacher", "student")


def padded_batch(seed=0):
    """A batch with padded frames, tokens and regions; one clip has no region at all, one a temporal step no frame."""
    batch = make_batch(seed)
    batch["frame_mask"][1, 3:] = False
    batch["frame_mask"][2, 1:] = False
    batch["box_frames"] = np.minimum(batch["box_frames"], batch["frame_mask"].sum(1, keepdims=True) - 1)
    batch["token_mask"][1, 5:] = False
    batch["token_mask"][3, 2:] = False
    batch["region_mask"][0, 2:] = False
    batch["region_mask"][2] = False
    batch["region_labels"][0, 0] = -1
    batch["mlm_mask"][0, 1] = False
    batch["classes_mask"][2] = False
    batch["report_classes_mask"][0] = False
    return batch


def test_both_start_from_the_same_spread():
    config = dataclasses.replace(FLAT, hidden_size=64, ffn_size=128)
    found = TorchDilbert(config).state_dict()
    wanted = names.to_torch(init_params(config=config), config)
    matrices = {name: x for name, x in wanted.items() if x.ndim > 1 and x.size >= 500}
    assert len(matrices) > 20
    for name, x in matrices.items():
        spread = float(found[name].std())
        np.testing.assert_allclose(spread, x.std(), rtol=6 / np.sqrt(x.size), err_msg=name)


def shapes_of(config):
    batch = make_batch(batch_size=1)
    arguments = [batch[name] for name in (*VISUAL, "mlm_positions")]
    config = dataclasses.replace(config, dtype="float32")
    return jax.eval_shape(Dilbert(config).init, jax.random.key(0), *arguments, *NAMES)["params"]


def random_params(config, seed=0):
    """Random values in every leaf, biases and scales too, of the configuration's dtype; compiles nothing."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) * 0.2
        return np.asarray(values + (1.0 if path[-1].key == "scale" else 0.0), config.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(config))


def make_setting(config, num_steps=1, **loss):
    optimizer = OptimizerConfig("sgd", 0.1, warmup_fraction=0.4, video_rate_scale=0.5)
    batches = [padded_batch(i) for i in range(num_steps)]
    return Setting(config, LossConfig(**loss), optimizer, batches, padded_batch(9), NAMES, "test")


# --- both implementations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "mode", "dtype", "tolerance"),
    [
        (DEEP, "stack", "float64", 1e-9),
        (FLAT, "add_resized", "float64", 1e-9),
        (NARROW, "stack", "float32", 1e-4),
    ],
    ids=["stack", "add_resized", "float32"],
)
def test_every_output_agrees(base, mode, dtype, tolerance):
    config = dataclasses.replace(base, tnt_mode=mode, dtype=dtype, temporal_position=mode == "stack")
    with jax.enable_x64(dtype == "float64"):
        found = compare.compare_outputs(make_setting(config), config, random_params(config))
    assert {
        "hidden/region",
        "cross_weights/entity",
        "mlm",
        "summary",
        "match/clip",
        "findings",
    } <= found.keys()
    assert max(found.values()) < tolerance, found


def test_gradients_of_pretraining_agree_in_every_layer():
    config = dataclasses.replace(FLAT, tnt_mode="add_resized", dtype="float64")
    teacher, student = (random_params(config, seed) for seed in range(2))
    with jax.enable_x64(True):
        found = compare.compare_gradients(
            make_setting(config, **WEIGHTED),
            config,
            {"student": student},
            {"teacher": teacher},
            "pretraining",
        )
    assert found["video/stem"] > 0 and max(found.values()) < 1e-9, found


def test_the_mutual_stage_agrees_over_three_steps():
    """Without momentum in its past, the first step's change is the gradient: this compares gradients too."""
    config = dataclasses.replace(NARROW, dtype="float64")
    start = {name: random_params(config, seed) for seed, name in enumerate(NETWORKS)}
    setting = make_setting(config, num_steps=3, summary=2.0)
    with jax.enable_x64(True):
        trajectory, parameters = compare.compare_training(setting, config, start)
    agreement = Agreement("float64", {"x": 0.0}, {}, trajectory, parameters)
    assert agreement.largest()["loss trajectory"] < 1e-9 and agreement.missed() == []
    assert max(parameters.values()) < 1e-9
    ours, theirs = trajectory["loss"]
    assert len(ours) == 3 and abs(ours[2] - ours[0]) > 1e-3 and min(trajectory["student/angle"][0]) > 0
    text = render(setting, [agreement])
    assert "student/self" in text and "learning rate 0.1" in text
    record = json.loads(to_json(setting, [agreement]))
    assert record["agreements"][0]["trajectory"]["loss"]["torch"] == theirs.tolist()


def test_positions_start_alike():
    network = TorchDilbert(CONFIG)
    for table in (network.entity_embedding.position.weight, network.description_embedding.position):
        expected = sinusoids(jax.random.key(0), tuple(table.shape))
        np.testing.assert_allclose(table.detach().numpy(), expected, atol=1e-7)


def test_a_difference_is_noticed():
    values = np.asarray([[1.0, 2.0], [1.0, 2.0 + 1e-6]])
    trajectory = {"loss": values, "student/loss": values}
    agreement = Agreement("float64", {"a": 1e-12, "b": float("nan")}, {}, trajectory, {})
    assert agreement.missed() == ["forward pass", "loss trajectory"]
    assert dataclasses.replace(agreement, outputs={"a": 0.0}, dtype="float32").missed() == []
    assert compare.relative_difference([1.0, -4.0], [1.0, -4.4]) == pytest.approx(0.1)


@pytest.mark.parametrize("reduction", ["mean", "mean_valid", "sum"])
@pytest.mark.parametrize("number", [1, 7])
def test_relational_losses_agree(reduction, number):
    rng = np.random.default_rng(number)
    student, teacher = rng.normal(size=(number, 5)), rng.normal(size=(number, 3))
    if number > 2:
        student[1] = student[0] + 1e-8  # closer than the floor
    for ours, theirs in (
        (distance_loss, torch_losses.distance_loss),
        (angle_loss, torch_losses.angle_loss),
    ):
        x = torch.tensor(student, requires_grad=True)
        value = theirs(x, torch.tensor(teacher), reduction)
        value.backward()
        with jax.enable_x64(True):
            loss = functools.partial(ours, teacher=jnp.asarray(teacher), reduction=reduction)
            expected, gradient = jax.value_and_grad(loss)(jnp.asarray(student))
        np.testing.assert_allclose(value.item(), expected, rtol=1e-9, atol=1e-15)
        scale = max(1.0, float(np.abs(gradient).max()))
        np.testing.assert_allclose(x.grad, gradient, rtol=1e-6, atol=1e-9 * scale)


def test_rows_without_a_valid_key_attend_to_nothing():
    q, k, v = (torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out = attend(q, k, v, mask)
    assert out.shape == (2, 3, 8) and not out[1].any() and out[0].any()
    out.sum().backward()
    assert all(bool(x.grad.isfinite().all()) and not x.grad[1].any() for x in (q, k, v))


def test_clipping_and_rate_are_those_of_optax():
    config = OptimizerConfig("sgd", 0.24, warmup_fraction=0.1)
    schedule = make_schedule(config, 50)
    ours = [learning_rate(config, step, 50) for step in range(51)]
    np.testing.assert_allclose(ours, [float(schedule(step)) for step in range(51)], rtol=1e-5, atol=1e-8)
    for gradient, norm in (([3.0, 4.0], 5.0), ([0.3, 0.4], 0.5)):
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor(gradient)
        assert clip_global_norm([parameter], 1.0).item() == pytest.approx(norm)
        np.testing.assert_allclose(parameter.grad, np.asarray(gradient) / max(norm, 1.0), rtol=1e-6)


def test_adamw_trains_and_frozen_networks_stay():
    batch = {name: torch.from_numpy(value) for name, value in padded_batch().items()}
    networks = {name: TorchDilbert(FLAT) for name in NETWORKS}
    frozen = {name: TorchDilbert(FLAT) for name in NETWORKS}
    before = {name: value.clone() for name, value in frozen["student"].state_dict().items()}

    def objective(batch):
        return torch_losses.mutual_objective(networks, frozen, batch, LossConfig())

    training = Training(networks, objective, OptimizerConfig("adamw", 3e-3, warmup_fraction=0.1), 12)
    losses = [training.update(batch)["loss"].item() for _ in range(12)]
    assert losses[-1] < losses[0]
    assert all(bool((before[name] == value).all()) for name, value in frozen["student"].state_dict().items())
    with pytest.raises(ValueError, match="'lamb'"):
        Training(networks, objective, OptimizerConfig("lamb"), 12)


# --- options ----------------------------------------------------------------------------------------------


def test_missing_options_are_all_named():
    config = dataclasses.replace(CONFIG, mdc_target="entity", order=True, video="r3d_18", dtype="bfloat16")
    with pytest.raises(
        ValueError, match=r"video='r3d_18'.*mdc_target='entity'.*order=True.*dtype='bfloat16'"
    ):
        TorchDilbert(config)
    with pytest.raises(ValueError, match=r"mdc_target='entity'.*order=0.5"):
        torch_losses.check_supported(LossConfig(mdc_target="entity", order=0.5))


def test_the_comparison_knows_every_option():
    """A new option of the model needs an answer here: build it in PyTorch, or refuse it in `check_supported`."""
    known = (
        "vocab_size num_organs num_conditions num_findings num_classes num_region_classes num_entities hidden_size "
        "num_layers num_heads ffn_size dropout max_tokens max_steps video channels blocks stem_patch region_bins "
        "tnt_mode temporal_position mdc_target order dtype name "
        "visual_words remat unroll"  # another system's, or how it is compiled, not what
    )
    assert {field.name for field in dataclasses.fields(NetworkConfig)} == set(known.split())


# --- table of names ---------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "add_resized": {"tnt_mode": "add_resized", "temporal_position": False},
    "no_labels": {"num_classes": 0, "num_findings": 0},
    "deep": {"channels": (8, 16, 24), "blocks": (2, 1, 2), "stem_patch": (1, 2, 4), "num_layers": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_accounts_for_every_parameter_on_both_sides(variant):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    params = random_params(config)
    table = names.parameter_table(config)
    assert sorted(row.flax for row in table) == sorted(traverse_util.flatten_dict(params, sep="/"))
    tensors = names.to_torch(params, config)
    state = TorchDilbert(config).state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == {n: t.shape for n, t in tensors.items()}
    back = names.from_torch(tensors, config, params)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_all_wrong_tensors_are_listed():
    params = random_params(CONFIG)
    tensors = names.to_torch(params, CONFIG)
    del tensors["cmm.bias"]
    tensors["cmm.scale"] = np.zeros(2, np.float32)
    tensors["video.stem.weight"] = tensors["video.stem.weight"][:, :, :, :2]
    tensors["mlm_bias"] = tensors["mlm_bias"].astype(np.float16)
    with pytest.raises(ValueError) as caught:
        names.from_torch(tensors, CONFIG, params)
    for part in (
        "cmm.bias is missing",
        "cmm.scale is unknown",
        "video.stem.weight has shape (8, 1, 2, 2, 4), not (8, 1, 2, 4, 4)",
        "mlm_bias is float16, not float32",
    ):
        assert part in str(caught.value)


def test_all_wrong_leaves_are_listed():
    params = random_params(CONFIG)
    params["cmm"] = {"kernel": params["cmm"]["kernel"], "scale": np.zeros(2)}
    params["video"]["stem"]["kernel"] = np.zeros((31, 8), np.float32)
    with pytest.raises(
        ValueError, match=r"cmm/bias is missing; cmm/scale is unknown; video/stem/kernel .*31"
    ):
        names.to_torch(params, CONFIG)


# --- weights out and in -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def constructed(tmp_path_factory):
    """A run that was never trained: configuration, vocabulary, labels, and random weights after fine-tuning."""
    workdir = tmp_path_factory.mktemp("run")
    save_config(tiny_run_config(), workdir / "config.json")
    ReportTokenizer.train(["liver with a cyst", "normal kidney"], 400).save(workdir / "vocab.txt")
    LabelSpace(("liver", "kidney"), ("normal",), ("cyst",), ("liver",), ("cyst", "liver")).save(
        workdir / "labels.json"
    )
    (workdir / "thresholds.json").write_text('{"findings": {"cyst": 0.5}, "entities": {}}', encoding="utf-8")
    context = load_context(workdir)
    shapes = jax.eval_shape(context.init_params, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = {
        name: jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
        for name in NETWORKS
    }
    state = TrainState.create(params, make_optimizer(OptimizerConfig(**context.config.optimizer), 1))
    checkpoints = StageCheckpoints(workdir, "finetune")
    checkpoints.save(7, state)
    checkpoints.close()
    return workdir, params


@pytest.fixture(scope="module")
def exported(constructed, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "student.safetensors"
    assert main(["export", f"--workdir={constructed[0]}", f"--output={path}"]) == 0
    return path


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_network_returns_bit_by_bit(constructed, exported, tmp_path):
    workdir, params = constructed
    new = tmp_path / "new"
    arguments = ["import", f"--input={exported}", f"--like={workdir}", f"--workdir={new}"]
    assert main([*arguments, "--network=teacher"]) == 0
    for name in ("config.json", "vocab.txt", "labels.json", "thresholds.json"):
        assert (new / name).read_bytes() == (workdir / name).read_bytes()
    context = load_context(new)
    for network in NETWORKS:  # the student came as the teacher; the other is the run's own
        restored, step = network_params(context, new, "finetune", network)
        assert step == 7
        assert_same(restored, params["student"])
    assert_same(network_params(context, workdir, "finetune", "teacher")[0], params["teacher"])


def test_pytorch_reads_and_writes_the_file(constructed, exported, tmp_path):
    from safetensors.torch import load_file, save_file

    workdir, params = constructed
    _, metadata = read_tensors(exported)
    assert (metadata["stage"], metadata["network"], metadata["step"]) == ("finetune", "student", "7")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(metadata["config"]).items()}
    network = TorchDilbert(NetworkConfig(**fields))
    network.load_state_dict(load_file(exported))
    with torch.no_grad():
        network.cmm.bias += 1.0
    save_file(network.state_dict(), tmp_path / "changed.safetensors")  # without metadata
    import_network(tmp_path / "changed.safetensors", workdir, tmp_path / "new", "finetune", "student")
    restored, _ = network_params(load_context(workdir), tmp_path / "new", "finetune", "student")
    np.testing.assert_array_equal(restored["cmm"]["bias"], params["student"]["cmm"]["bias"] + 1.0)


def write_pickle(folder):
    torch.save({"cmm.bias": torch.zeros(2)}, folder / "network.pt")
    return folder / "network.pt"


def write_renamed_pickle(folder):
    return write_pickle(folder).rename(folder / "network.safetensors")


def write_text(folder):
    (folder / "x.safetensors").write_text("no tensors at all")
    return folder / "x.safetensors"


def write_part(folder):
    safetensors_numpy.save_file({"cmm.bias": np.zeros(3, np.float32)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def write_bfloat16(folder):
    from safetensors.torch import save_file

    save_file({"cmm.bias": torch.zeros(2, dtype=torch.bfloat16)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def write_other_architecture(folder):
    metadata = {"config": json.dumps(dataclasses.asdict(CONFIG))}
    safetensors_numpy.save_file({}, folder / "x.safetensors", metadata=metadata)
    return folder / "x.safetensors"


def test_no_length_of_a_header_makes_a_file_a_pickle(tmp_path):
    seen = set()
    for padding in range(0, 256, 8):  # headers are padded to 8 bytes
        path = tmp_path / f"{padding}.safetensors"
        safetensors_numpy.save_file({}, path, metadata={"dilbert_jax_format": "2", "note": "x" * padding})
        seen.add(path.read_bytes()[0])
        assert read_tensors(path)[0] == {}
    assert 0x80 in seen


def write_newer_format(folder):
    safetensors_numpy.save_file({}, folder / "x.safetensors", metadata={"dilbert_jax_format": "2"})
    return folder / "x.safetensors"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: folder / "absent.safetensors", "is missing"),
        (write_pickle, "pickle can run any code"),
        (write_renamed_pickle, "pickle can run any code"),
        (write_text, "not a safetensors file"),
        (write_part, r"cmm.bias has shape \(3,\), not \(2,\)"),
        (write_bfloat16, "bfloat16|dtype|float32"),
        (write_other_architecture, "another architecture: .*hidden_size: 16 in the file, 64 in the run"),
        (write_newer_format, "format version 2"),
    ],
)
def test_unusable_files_are_one_line_and_leave_no_run(constructed, tmp_path, capsys, write, message):
    new = tmp_path / "new"
    status = main(["import", f"--input={write(tmp_path)}", f"--like={constructed[0]}", f"--workdir={new}"])
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not new.exists()


def test_other_mistakes_are_one_line(constructed, exported, tmp_path, capsys):
    workdir = constructed[0]
    cases = [
        (["export", f"--workdir={tmp_path}", "--output=x.safetensors"], "holds no run"),
        (["export", f"--workdir={workdir}", "--output=x.pt"], "must end in .safetensors"),
        (
            ["export", f"--workdir={workdir}", "--stage=mutual", "--output=x.safetensors"],
            "no checkpoint of stage",
        ),
        (["import", f"--input={exported}", f"--like={workdir}", f"--workdir={workdir}"], "is in use"),
        (["compare", "--config=absent.py"], "absent.py is missing"),
    ]
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return nothing\n")
    cases.append((["compare", f"--config={broken}"], "NameError"))
    for arguments, message in cases:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (workdir / "checkpoints" / "mutual").exists()
    for arguments in (
        ["compare", "--config=x.py", "--steps=0"],
        ["compare", "--config=x.py", "--output=x.txt"],
        ["export"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


# --- the comparison as a command --------------------------------------------------------------------------

EXPERIMENT = """
from dilbert_jax.config import default_config

def get_config():
    config = default_config("tiny")
    config.data.update(size=32, num_frames=4, max_tokens=16, vocab_size=100, grid_scales=(1, 2), grid_steps=1)
    config.model.update(num_layers=1)
    config.train.batch_size = 4
    return config
"""


def test_the_exit_status_says_whether_both_agree(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    monkeypatch.setattr("dilbert_jax.run.use_compilation_cache", lambda: None)
    seen = []

    def measure(setting, dtype, seed):
        seen.append((len(setting.batches), dtype, setting.optimizer.learning_rate))
        values = np.asarray([[1.0, 2.0], [1.0, 2.0 + 1e-5]])
        return Agreement(dtype, {"mlm": 0.0}, {}, {"loss": values}, {})

    monkeypatch.setattr(compare, "measure", measure)
    common = ["compare", f"--config={tmp_path / 'experiment.py'}", "--batches=random", "--steps=2"]
    assert main([*common, "--dtype=float32", f"--output={tmp_path / 'x.md'}"]) == 0
    assert capsys.readouterr().out == (tmp_path / "x.md").read_text(encoding="utf-8")
    assert main([*common, f"--output={tmp_path / 'x.json'}"]) == 1
    assert "no agreement: float64 loss trajectory" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["steps"] == 2
    assert seen == [(2, "float32", 0.024), (2, "float64", 0.024), (2, "float32", 0.024)]


@pytest.mark.slow
def test_the_command_compares(tmp_path):
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "dilbert_jax.parity", "compare", "--batches=random", "--steps=3"]
    done = subprocess.run(
        [*command, f"--config={tmp_path / 'experiment.py'}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_else_imports_pytorch():
    """Asked in a fresh process, which hides PyTorch: every other module is importable, and the command says why not."""
    program = """
import importlib, pkgutil, sys
import dilbert_jax
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
for module in pkgutil.walk_packages(dilbert_jax.__path__, "dilbert_jax."):
    if "parity" not in module.name and "builder" not in module.name:
        importlib.import_module(module.name)
import dilbert_jax.parity.names
try:
    import dilbert_jax.parity.torch_model
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("pip install 'dilbert-jax[torch]'"), done.stdout + done.stderr
