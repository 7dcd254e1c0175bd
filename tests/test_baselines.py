"""The systems that DILBERT is compared with: what each is known for, and that the same commands train them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIG, A, B, L, init_params, make_batch, tiny_run_config, to_device

from dilbert_jax.config import check_config
from dilbert_jax.losses import hinge_loss, noise_contrastive_loss
from dilbert_jax.models import SYSTEMS, make_network
from dilbert_jax.models.baselines import cbt, hero, mmft_bert, videobert
from dilbert_jax.models.baselines.contrast import frame_contrast
from dilbert_jax.models.tangled import resize_nearest, resize_valid
from dilbert_jax.training import objectives
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer

# One worker: what a test has traced and compiled, the next one uses.
pytestmark = [pytest.mark.numerics, pytest.mark.xdist_group("baselines")]
BASELINES = [name for name in SYSTEMS if name != "dilbert"]
STREAMS = {"entity": 3, "description": 2, "region": 4}


def system(name, **fields):
    """A network, its parameters, and streams of random hidden states with their masks."""
    config = dataclasses.replace(CONFIG, **{"dropout": 0.0, "name": name, **fields})
    rng = np.random.default_rng(0)
    hidden = {s: jnp.asarray(rng.standard_normal((1, n, 16)), jnp.float32) for s, n in STREAMS.items()}
    return (
        make_network(config),
        init_params(config=config),
        hidden,
        {s: jnp.ones((1, n), bool) for s, n in STREAMS.items()},
    )


def gradients(total, hidden, names):
    """Gradients of `total(hidden, name)` for each name, in one program."""
    return jax.jit(lambda hidden: {name: jax.grad(total)(hidden, name) for name in names})(hidden)


def own_outputs(name, batch):
    """What the own tasks of a system say of a batch, without dropout."""
    config = dataclasses.replace(CONFIG, name=name, dropout=0.0)
    return _own_forward(config)(init_params(config=config), to_device(batch))


@functools.cache
def _own_forward(config):
    def forward(params, batch):
        key = jax.random.key(0)
        return objectives._pretraining_forward(make_network(config), params, batch, key, own_tasks=True)[2]

    return jax.jit(forward)


# -- BERT ------------------------------------------------------------------------------------------------------


def test_every_token_of_bert_looks_at_all_streams_from_the_first_block():
    model, params, hidden, masks = system("bert", num_layers=1)

    def total(hidden, stream):
        fused, looks, _ = model.apply({"params": params}, hidden, masks, True, method=type(model).fuse)
        assert looks["entity"].shape == (1, 2, 2, 3) and looks["region"].shape == (1, 2, 2, 4)
        return jnp.sin(fused[stream]).sum()

    for gradient in gradients(total, hidden, STREAMS).values():
        assert all(float(jnp.abs(gradient[other]).max()) > 1e-4 for other in STREAMS)


def test_segments_tell_streams_of_bert_apart():
    assert system("bert")[1]["segment"]["embedding"].shape == (3, 16)


# -- contrast --------------------------------------------------------------------------------------------------


def test_noise_contrastive_loss_equals_its_formula(rng):
    positive, negatives = rng.standard_normal(5), rng.standard_normal((5, 7))
    valid = rng.random((5, 7)) < 0.6
    valid[3] = False
    expected = -np.log(np.exp(positive) / (np.exp(positive) + (np.exp(negatives) * valid).sum(1)))
    loss = noise_contrastive_loss(jnp.asarray(positive), jnp.asarray(negatives), jnp.asarray(valid))
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    assert loss[3] == 0


def test_hinge_loss_is_zero_beyond_the_margin():
    loss = hinge_loss(jnp.asarray([0.5, 0.5, 0.5]), jnp.asarray([0.3, 0.45, 0.9]), 0.1)
    np.testing.assert_allclose(loss, [0.0, 0.05, 0.5], atol=1e-6)


def test_frame_contrast_falls_when_a_prediction_comes_closer_to_what_is_shown(rng):
    shown = rng.standard_normal((3, 4, 8)).astype(np.float32)
    steps = np.ones((3, 4), bool)
    steps[2, 2:] = False
    zeroed = np.zeros((3, 4), bool)
    zeroed[0, 1] = zeroed[2, 3] = True  # the second is no valid step
    other = rng.standard_normal(shown.shape).astype(np.float32)

    def loss(share):
        predicted = share * shown + (1 - share) * other
        outputs = {
            "predicted": jnp.asarray(predicted),
            "shown": jnp.asarray(shown),
            "steps": jnp.asarray(steps),
        }
        return float(frame_contrast(outputs, {"description_zeroed": jnp.asarray(zeroed)}))

    assert loss(1.0) < loss(0.5) < loss(0.0)
    # By hand: the one masked step against the nine other valid ones.
    scores = other[0, 1] @ shown[steps].T / np.sqrt(8)
    assert loss(0.0) == pytest.approx(np.log(np.exp(scores).sum()) - scores[1], rel=1e-5)


# -- CBT -------------------------------------------------------------------------------------------------------


def test_cbt_holds_each_clip_against_other_reports_than_its_own():
    scores = jnp.asarray([[0.0, 1.0, 2.0, 3.0]] * 4)
    outputs = {"scores": scores, **{k: jnp.zeros((4, 2, 3)) for k in ("predicted", "shown")}}
    outputs["steps"] = jnp.ones((4, 2), bool)
    # Rows 0 and 2 show their own report. Row 1 shows that of row 0: no negative for row 0. Row 3 shows none.
    batch = {
        "report": jnp.asarray([7, 7, 8, -1]),
        "own_report": jnp.asarray([7, 5, 8, 6]),
        "description_zeroed": jnp.zeros((4, 2), bool),
    }
    loss = cbt.own_losses(outputs, batch)["report_contrast"]
    # Row 0 meets 7 (own text), 8, none; row 2 meets none, 7, 7.
    expected = [np.log(1 + np.exp(2.0)), np.log(1 + np.exp(2.0) + np.exp(3.0))]
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_first_score_of_cbt_is_of_the_clips_own_report():
    batch = make_batch()
    scores = own_outputs("cbt", batch)["scores"]
    rolled = {
        **batch,
        **{k: np.roll(batch[k], -1, axis=0) for k in ("token_ids", "token_types", "token_mask")},
    }
    np.testing.assert_allclose(own_outputs("cbt", rolled)["scores"][:, 0], scores[:, 1], atol=1e-5)


def test_the_unimodal_transformers_of_cbt_do_not_meet():
    model, params, hidden, masks = system("cbt")

    def total(hidden, stream):
        return jnp.sin(
            model.apply({"params": params}, hidden, masks, True, method=type(model).fuse)[2][stream]
        ).sum()

    found = gradients(total, hidden, ("entity", "description"))
    assert float(jnp.abs(found["entity"]["description"]).max()) == 0
    assert float(jnp.abs(found["description"]["entity"]).max()) == 0
    assert float(jnp.abs(found["description"]["region"]).max()) > 0


# -- HERO ------------------------------------------------------------------------------------------------------


def test_hero_moves_a_few_valid_steps_and_knows_where_they_come_from():
    valid = jnp.arange(20) < jnp.asarray([[20], [6], [1]])
    order, moved = (np.asarray(x) for x in hero.shuffle_some(jax.random.key(3), valid))
    assert moved.sum(1).tolist() == [3, 2, 0]
    for row in range(3):
        assert sorted(order[row]) == list(range(20))
        np.testing.assert_array_equal(order[row] != np.arange(20), moved[row])
        assert not moved[row][~np.asarray(valid[row])].any()
    assert (np.asarray(hero.shuffle_some(jax.random.key(4), valid)[0]) != order).any()


def test_hero_frames_know_their_place_in_the_temporal_transformer_alone():
    model, params, _, _ = system("hero")
    assert "position" not in params["description_embedding"]
    batch = to_device(make_batch())

    def run(module, order):
        return module.encode(**{k: batch[k] for k in objectives.VISUAL}, description_order=order)

    forward = jax.jit(nn.apply(run, model))
    encoded = [forward({"params": params}, jnp.asarray([order] * B)) for order in ([0, 1], [1, 0])]
    swapped = encoded[1].own["frames"][:, ::-1]
    np.testing.assert_allclose(encoded[0].own["frames"], swapped, atol=1e-5)
    difference = encoded[0].streams["description"] - encoded[1].streams["description"][:, ::-1]
    assert float(jnp.abs(difference).max()) > 1e-3


def test_a_query_of_hero_sees_no_clip_and_a_clip_no_query():
    batch = make_batch()
    similar = own_outputs("hero", batch)["similar"]
    other = {**batch, "token_ids": batch["token_ids"].copy(), "frames": batch["frames"].copy()}
    other["token_ids"][0] = 5 + np.arange(L)
    other["frames"][1] = 255 - other["frames"][1]
    changed = np.abs(np.asarray(own_outputs("hero", other)["similar"] - similar)) > 1e-5
    expected = np.zeros((B, B), bool)
    expected[0], expected[:, 1] = True, True
    np.testing.assert_array_equal(changed, expected)


def test_hero_asks_for_the_clip_of_a_report_among_those_of_other_texts():
    similar = jnp.asarray([[0.5, 0.45, 0.9], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]])
    outputs = {
        "similar": similar,
        **{k: jnp.zeros((3, 2, 3)) for k in ("predicted", "shown")},
        "steps": jnp.ones((3, 2), bool),
        "place": jnp.zeros((3, 2, 2)),
        "order": jnp.zeros((3, 2), int),
        "moved": jnp.zeros((3, 2), bool),
    }
    # Row 0 alone shows its own report; clip 2 has a report of the same text.
    batch = {
        "report": jnp.asarray([1, 1, -1]),
        "own_report": jnp.asarray([1, 2, 1]),
        "description_zeroed": jnp.zeros((3, 2), bool),
    }
    losses = hero.own_losses(outputs, batch)
    # Report 0 against clip 1: 0.1 + 0.45 - 0.5; clip 0 has no report that is not its own.
    assert float(losses["report_to_clip"]) == pytest.approx(0.05, abs=1e-6)
    assert float(losses["frame_order"]) == 0


# -- MMFT-BERT -------------------------------------------------------------------------------------------------


def test_the_fusion_vector_of_mmft_bert_is_zero_and_learns():
    model, params, hidden, masks = system("mmft_bert")
    assert not params["fusion_vector"].any()

    def total(params):
        *_, own = model.apply({"params": params}, hidden, masks, True, method=type(model).fuse)
        return jnp.sin(own["fusion"]).sum()

    assert float(jnp.abs(jax.jit(jax.grad(total))(params)["fusion_vector"]).max()) > 0


def test_each_bert_of_mmft_reads_the_report_and_its_own_modality():
    model, params, hidden, masks = system("mmft_bert")

    def total(hidden, name):
        return jnp.sin(
            model.apply({"params": params}, hidden, masks, True, method=type(model).fuse)[2][name]
        ).sum()

    read = {**mmft_bert.READERS, "fusion": tuple(STREAMS)}
    for name, gradient in gradients(total, hidden, read).items():
        assert {s for s in STREAMS if float(jnp.abs(gradient[s]).max()) > 0} == set(read[name])


def test_every_bert_of_mmft_has_losses_of_its_own():
    batch = to_device(make_batch())
    outputs = own_outputs("mmft_bert", make_batch())
    losses = mmft_bert.own_losses(outputs, batch)
    assert set(losses) == set(mmft_bert.READERS)
    better = {**outputs, "visual/match": 20.0 * jax.nn.one_hot(batch["matched"].astype(int), 2)}
    changed = mmft_bert.own_losses(better, batch)
    assert changed["visual"] < losses["visual"] and changed["text"] == losses["text"]


# -- ActBERT ---------------------------------------------------------------------------------------------------


def test_actbert_tangles_the_streams_before_the_last_two_layers_of_text():
    params = system("actbert", num_layers=4)[1]
    counts = {
        name: sum(key.startswith(f"{name}_") for key in params)
        for name in ("text", "regions", "actions", "tangled")
    }
    assert counts == {"text": 4, "regions": 2, "actions": 3, "tangled": 2}
    assert "cross_entity_query" not in params["tangled_0"]  # one query for both, as the public code
    with pytest.raises(ValueError, match="at least 2 layers of text"):
        init_params(config=dataclasses.replace(CONFIG, name="actbert", num_layers=1))


def test_resizing_counts_valid_positions_alone():
    x = jnp.arange(5)[None, :, None].repeat(2, 0)
    shown = jnp.asarray([[True] * 4 + [False], [True] * 5])
    mask = jnp.asarray([[False, True, True, False, True], [True] * 5])
    resized = resize_valid(x, shown, mask)[..., 0]
    assert resized[0][mask[0]].tolist() == [0, 1, 2]  # floor(m 4 / 3)
    np.testing.assert_array_equal(resized[1], resize_nearest(x, 5)[1, :, 0])


def test_matching_of_actbert_adds_the_action_to_the_product_of_text_and_region(rng):
    model = make_network(dataclasses.replace(CONFIG, name="actbert"))
    w, r, a = rng.standard_normal((3, 2, 16))
    joined = model.join({"entity": w, "region": r, "description": a}, {})
    np.testing.assert_allclose(joined, w * r + a)


# -- VideoBERT -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def centres():
    points = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    points /= np.abs(points).max(1, keepdims=True)
    return points, videobert.learn_visual_words(points, (4, 3))


def test_visual_words_are_the_nearest_centre_of_each_level(centres):
    points, learned = centres
    assert {k: v.shape for k, v in learned.items()} == {"centres_0": (1, 4, 64), "centres_1": (4, 3, 64)}
    words = videobert.VisualWords((4, 3)).apply({"params": learned}, jnp.asarray(points))
    first = ((points[:, None] - learned["centres_0"][0]) ** 2).sum(-1).argmin(1)
    second = ((points[:, None] - learned["centres_1"][first]) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(words, 3 * first + second)
    assert len(np.unique(words)) == 12
    # Centres are means of the points that they gather, a fixed point of k-means.
    for i in range(4):
        np.testing.assert_allclose(learned["centres_0"][0, i], points[first == i].mean(0), atol=1e-3)


def test_visual_words_are_stable(centres, rng):
    points, learned = centres
    again = videobert.learn_visual_words(points, (4, 3))
    assert all((again[name] == learned[name]).all() for name in learned)
    frames = rng.integers(20, 100, (2, 4, 16, 16)).astype(np.uint8)
    mask = np.ones((2, 4), bool)
    described = videobert.describe_steps(jnp.asarray(frames), jnp.asarray(mask), 2)
    brighter = videobert.describe_steps(jnp.asarray(2 * frames + 10), jnp.asarray(mask), 2)
    np.testing.assert_allclose(described, brighter, atol=1e-4)  # gain and offset change nothing


def test_fewer_different_clips_than_words_still_make_words():
    points = np.repeat(np.eye(3, 64, dtype=np.float32), 5, axis=0)
    learned = videobert.learn_visual_words(points, (2, 4))
    words = videobert.VisualWords((2, 4)).apply({"params": learned}, jnp.asarray(points))
    assert len(np.unique(words)) == 3


def test_the_optimizer_leaves_visual_words_alone():
    params = {"visual_words": {"centres_0": jnp.ones((1, 2, 3))}, "other": jnp.ones(3)}
    optimizer = make_optimizer(OptimizerConfig("adamw", 0.1, weight_decay=0.5), 10)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert (params["visual_words"]["centres_0"] == 1).all() and (params["other"] < 1).all()


def test_videobert_sees_words_for_steps_and_a_mask_for_hidden_ones():
    config = dataclasses.replace(CONFIG, name="videobert", dropout=0.0)
    model, params = make_network(config), init_params(config=config)
    batch = to_device(make_batch())
    features = jnp.zeros((B, A, 32))

    def describe(zeroed, key=None):
        rngs = None if key is None else {"dropout": key}
        arguments = features, batch["frames"], batch["frame_mask"], None, zeroed, key is None
        return model.apply({"params": params}, *arguments, rngs=rngs, method=type(model).describe)

    shown, own = describe(jnp.zeros((B, A), bool))
    assert own["visual_words"].shape == (B, A) and int(own["visual_words"].max()) < 64
    hidden, _ = describe(jnp.ones((B, A), bool))
    np.testing.assert_allclose(hidden[0], hidden[1], atol=1e-6)  # the same, whatever they hide
    assert float(jnp.abs(shown - hidden).max()) > 1e-3
    swapped = [describe(jnp.ones((B, A), bool), jax.random.key(i))[0] for i in range(12)]
    changed = jnp.stack([jnp.abs(s - hidden).max(-1) > 1e-4 for s in swapped])
    assert 0 < float(changed.mean()) < 0.4  # one in nine shows another word


def test_the_regimes_of_videobert_see_what_they_are_named_after():
    batch = make_batch()
    outputs = own_outputs("videobert", batch)
    assert outputs["joint"].shape == (B, A, 40 + 64)
    other = {**batch, "token_ids": 5 + (batch["token_ids"] + 3) % 30}
    changed = own_outputs("videobert", other)
    np.testing.assert_allclose(changed["clip"], outputs["clip"], atol=1e-5)
    assert float(jnp.abs(changed["joint"] - outputs["joint"]).max()) > 1e-3
    other = {**batch, "frames": 255 - batch["frames"]}
    changed = own_outputs("videobert", other)
    np.testing.assert_allclose(changed["text"], outputs["text"], atol=1e-5)
    assert float(jnp.abs(changed["clip"] - outputs["clip"]).max()) > 1e-3


# -- all of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_published_size_builds(name):
    fields = dict(hidden_size=768, num_layers=12, num_heads=12, ffn_size=3072, vocab_size=30522)
    if name == "videobert":
        fields |= dict(hidden_size=1024, num_layers=24, num_heads=16, ffn_size=4096, visual_words=(12,) * 4)
    elif name == "mmft_bert":
        fields |= dict(num_layers=9)
    config = dataclasses.replace(CONFIG, name=name, **fields)
    shapes = jax.eval_shape(lambda: _initialise(config))
    count = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    low, high = PUBLISHED_MILLIONS[name]
    assert low < count < high


# The streams of ActBERT share one width here.
PUBLISHED_MILLIONS = {
    "bert": (105, 130), "videobert": (330, 400), "cbt": (150, 190), "hero": (145, 190), "mmft_bert": (210, 250),
    "actbert": (165, 230), "dilbert": (330, 420),
}  # fmt: skip


def _initialise(config):
    batch = make_batch(batch_size=1)
    arguments = [batch[name] for name in objectives.VISUAL]
    names = np.zeros((6, 3), np.int32), np.ones((6, 3), bool)
    return make_network(config).init(jax.random.key(0), *arguments, batch["mlm_positions"], *names)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_a_few_clips_are_learned_by_heart(name):
    config = dataclasses.replace(CONFIG, name=name, dropout=0.0)
    model, loss, own_losses = make_network(config), objectives.LossConfig(), SYSTEMS[name].own_losses
    batch = to_device(make_batch())
    params, optimizer = init_params(config=config), optax.adam(3e-3)

    @jax.jit
    def update(params, state):
        def objective(p):
            return objectives.pretraining_objective(
                model, loss, {"student": p}, None, batch, jax.random.key(0), own_losses=own_losses
            )

        (value, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, metrics

    state, values = optimizer.init(params), []
    for _ in range(150):
        params, state, value, metrics = update(params, state)
        values.append({k: float(v) for k, v in metrics.items()})
        assert np.isfinite(float(value))
    common = [sum(v[f"student/{task}"] for task in loss.tasks) for v in values]
    assert common[-1] < 0.1 * common[0]
    own = set(values[0]) - {f"student/{task}" for task in (*loss.tasks, "loss")}
    assert bool(own) == (own_losses is not None)
    for task in own:
        assert values[-1][task] < 0.5 * values[0][task], task


def test_an_unknown_system_is_named():
    with pytest.raises(ValueError, match="'gpt'; choose one of bert, videobert"):
        make_network(dataclasses.replace(CONFIG, name="gpt"))
    config = tiny_run_config()
    config.model.name = "gpt"
    with pytest.raises(ValueError, match="name is 'gpt'"):
        check_config(config)


@pytest.mark.parametrize("name", SYSTEMS)
def test_shuffled_steps_are_refused_where_own_tasks_need_their_order(name):
    config = tiny_run_config()
    config.model.name = name
    config.train.single_network = True
    config.loss.order = 1.0
    if name in ("cbt", "hero"):
        with pytest.raises(ValueError, match=rf"config\.loss\.order is 1\.0; .* {name} .*loss\.own"):
            check_config(config)
        config.loss.own = 0.0
    check_config(config)
