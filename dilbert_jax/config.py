"""The experiment configuration: every field, its default and its meaning."""

from __future__ import annotations

import json
import pathlib

import ml_collections

REVISION = 3  # of the method: raised when the same configuration gives another network or trains otherwise
# Presets of the fusion encoder and the 3-D CNN. "base" is the paper's size (12 blocks, 768 hidden, 12 heads).
MODEL_PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128, "channels": (16, 32), "blocks": (1, 1),
    },
    "small": {
        "hidden_size": 128, "num_layers": 3, "num_heads": 4, "ffn_size": 512, "channels": (48, 96), "blocks": (1, 1),
    },
    "medium": {
        "hidden_size": 256, "num_layers": 4, "num_heads": 8, "ffn_size": 1024,
        "channels": (64, 128, 256), "blocks": (1, 1, 1),
    },
    "base": {
        "hidden_size": 768, "num_layers": 12, "num_heads": 12, "ffn_size": 3072,
        "channels": (64, 128, 256), "blocks": (1, 2, 2),
    },
}  # fmt: skip


def default_config(preset: str = "small") -> ml_collections.ConfigDict:
    """Returns the configuration with all fields set; experiment files change what they need.

    Args:
      preset: a key of `MODEL_PRESETS`.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.data = data = ml_collections.ConfigDict()
    data.name = "phantom"  # 480 generated clips; "phantom/large" has 1,920, "phantom/small" 84
    data.manual_dir = ""  # the set's own folder; "" = $DILBERT_DATA_DIR/<name>
    data.data_dir = ""  # where prepared data go; "" = the user's cache
    data.folds = 0  # 0: the set's train/validation/test; k >= 3: k-fold cross-validation by group
    data.fold = 0  # the fold under test
    data.split_seed = 0
    data.size = 64  # side of the square input, pixels
    data.num_frames = 12  # frames a clip is sampled to
    data.frame_buckets = ()  # lengths to pad shorter clips to, ascending, e.g. (4,); num_frames is one anyway
    data.stored_frames = 48  # frames kept a clip at this size (random sampling draws from them)
    data.grid_scales = (1, 3)  # region grid: boxes per side of each scale
    data.grid_steps = 2  # times across the clip at which the grid is laid
    data.max_annotated_regions = 6
    data.max_tokens = 64  # report length, word pieces
    data.vocab_size = 1500
    data.vocab_file = ""  # a BERT vocab.txt; "" = train WordPiece on the training reports
    data.graph_file = ""  # extension of the knowledge graph
    data.min_entity_count = 3
    # Share of examples whose masked words the knowledge graph chooses (D8), whatever the system; 0 for all but DILBERT.
    data.guided_masking = 0.5
    data.leak_iou = 0.4  # regions that overlap a masked one by more are masked too (D10); 1 = none
    data.any_mismatch = (
        False  # True: a mismatched report may be the same patient's or have the same text (D11)
    )
    data.report_dropout = 0.25  # share of pre-training examples shown without their report
    data.augment = True

    config.model = model = ml_collections.ConfigDict(MODEL_PRESETS[preset])
    # Systems to compare with need train.single_network and data.guided_masking = 0 too: configs/systems.py sets them.
    model.name = "dilbert"
    model.visual_words = (8, 8)  # branching of the levels of VideoBERT's hierarchical k-means
    model.dropout = 0.1
    model.video = "small"  # the 3-D CNN (D1); "r3d_18": PyTorch's, ignores channels, blocks and stem_patch
    model.stem_patch = (2, 4, 4)
    model.temporal_position = (
        True  # False: description tokens without their place in time, as public ActBERT (D3)
    )
    model.region_bins = 2
    model.tnt_mode = "stack"  # or "add_resized", as the public ActBERT code (D5)
    model.remat = (
        "none"  # "dots" or "full": compute again in the backward pass instead of keeping (less memory)
    )
    model.unroll = 0  # blocks a step of the loop over blocks; 0 = all on CPU without remat, one elsewhere
    model.dtype = "float32"

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.name = "adamw"
    optimizer.learning_rate = 1e-3
    optimizer.weight_decay = 1e-4
    optimizer.momentum = 0.9
    optimizer.warmup_fraction = 0.05
    optimizer.clip_norm = 1.0
    optimizer.video_rate_scale = (
        1.0  # learning rate of the 3-D CNN relative to all else's, before fine-tuning
    )

    config.loss = loss = ml_collections.ConfigDict()
    # The paper weighs the four tasks 1 each and has no summary task (0). Small sets need other weights: MDC and
    # summary are means over many classes, and without summary matching learns late.
    loss.mlm, loss.mdc, loss.moc, loss.cmm, loss.summary = 2.0, 5.0, 1.0, 3.0, 15.0
    loss.order = (
        0.0  # > 0: a fifth task, are the description tokens shuffled? (D9); not beside CBT's and HERO's own
    )
    loss.own = 1.0  # weight of a comparison system's own tasks, relative to MLM's
    loss.mdc_target = "description"  # or "entity": MDC classifies masked words by their entity (D9)
    loss.organ, loss.condition, loss.findings, loss.match, loss.grounding = (
        1.0,
        4.0,
        1.0,
        0.5,
        1.0,
    )  # fine-tuning
    loss.alpha, loss.beta, loss.gamma = 0.2, 1.0, 0.6
    loss.beta1, loss.beta2 = 2.0, 1.0
    loss.temperature = 1.0
    loss.scale_by_square = False
    loss.reduction = "mean"
    loss.relational_layer = "fused"
    loss.all_pairs = False

    config.train = train = ml_collections.ConfigDict()
    train.batch_size = 32
    train.num_micro_batches = 1  # > 1: a batch goes through the networks in so many parts (less memory)
    train.relate_micro_batches = True  # relational losses over the whole batch, at one more forward pass
    train.teacher_epochs = 10.0
    train.student_epochs = 10.0
    train.entity_weights = (
        ""  # a Hugging Face BERT folder for the entity stream; data.vocab_file is its vocab.txt
    )
    train.video_weights = ""  # R3D-18 as .safetensors to start the 3-D CNN from (model.video = "r3d_18")
    train.single_network = False  # True: the student alone, without teacher and mutual terms (ablation)
    train.independent_student = False  # True: the student pre-trains without the teacher's soft labels (D19)
    train.mutual_epochs = 4.0
    train.finetune_epochs = 10.0
    train.mutual_rate_scale = 1.0  # learning rate of each stage relative to optimizer.learning_rate
    train.finetune_rate_scale = 1.0
    train.finetune_video_rate_scale = 1.0  # of the 3-D CNN relative to all else's, in fine-tuning
    train.log_every_steps = 10
    train.weight_points = 0  # how often a stage writes the spread of its weights to weights.jsonl; 0 = never
    train.checkpoint_every_seconds = 30.0
    train.evaluate_after = True

    # How a run is spread over a machine; it may continue on another.
    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.fsdp = 1  # devices that share parameters and optimizer state
    mesh.tensor = 1  # devices that share heads and feed-forward layers; all others split the batch
    mesh.num_workers = 0  # processes that prepare batches; 0 = a thread

    config.evaluate = evaluate = ml_collections.ConfigDict()
    evaluate.mask_repeats = 3  # masked copies of each test clip for the pre-training tasks
    evaluate.num_resamples = 2000
    evaluate.num_examples = 6  # example annotations in the report
    return config


def save_config(config: ml_collections.ConfigDict, path: pathlib.Path) -> None:
    """Writes a configuration, and the revision of the method that it configures."""
    path.write_text(json.dumps({"revision": REVISION, **config.to_dict()}, indent=1), encoding="utf-8")


def load_config(path: pathlib.Path) -> ml_collections.ConfigDict:
    """Reads a configuration that `save_config` wrote: today's defaults, with every saved field on top.

    Raises:
      ValueError: another revision of the method, or a saved field is unknown to this version.
    """
    config = default_config()
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not a JSON file in UTF-8 ({error}); restore it or use a new workdir"
        ) from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: expected an object with the sections {', '.join(config)}")
    revision = saved.pop("revision", 1)
    if revision != REVISION:
        raise ValueError(
            f"{path}: field 'revision' is {revision!r}, and this version is revision {REVISION} of the method "
            "(CHANGELOG.md says what changed); train again in a new workdir, or use the version that wrote this one"
        )
    for section, value in saved.items():
        if section not in config:
            raise ValueError(
                f"{path}: unknown field {section!r}; this workdir was written by another version"
            )
        fields = value.items() if isinstance(value, dict) else [(None, value)]
        for field, item in fields:
            name = section if field is None else f"{section}.{field}"
            if field is not None and (not hasattr(config[section], "keys") or field not in config[section]):
                raise ValueError(
                    f"{path}: unknown field {name!r}; this workdir was written by another version"
                )
            target, key = (config, section) if field is None else (config[section], field)
            try:
                target[key] = tuple(item) if isinstance(item, list) else item
            except TypeError:
                wanted = type(target[key]).__name__
                raise ValueError(f"{path}: field {name!r} is {item!r}; expected {wanted}") from None
    return config


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises `ValueError` naming the first field whose value cannot work."""
    # Here, not above: flags are checked against the defaults before anything heavy is imported.
    from dilbert_jax.models import find_system
    from dilbert_jax.models.network import MDC_TARGETS, REMAT_POLICIES, VIDEO_ENCODERS, frames_per_step

    data, model, train = config.data, config.model, config.train

    def need(condition: bool, field: str, wanted: str) -> None:
        if not condition:
            value: object = config
            for part in field.split("."):
                value = value[part]  # type: ignore[index]
            raise ValueError(f"config.{field} is {value!r}; {wanted}")

    def positive(*names: str) -> None:
        for name in names:
            section, field = name.split(".")
            value = config[section][field]
            values = value if isinstance(value, (tuple, list)) else (value,)
            need(len(values) > 0 and all(v > 0 for v in values), name, "must be positive")

    positive("data.size", "data.num_frames", "data.stored_frames", "data.grid_scales", "data.grid_steps")
    positive(
        "data.min_entity_count", "model.hidden_size", "model.num_layers", "model.num_heads", "model.ffn_size"
    )
    positive("model.channels", "model.blocks", "model.stem_patch", "model.region_bins", "model.visual_words")
    positive("optimizer.learning_rate", "optimizer.video_rate_scale")
    positive("train.log_every_steps", "train.checkpoint_every_seconds")
    positive(
        "train.mutual_rate_scale",
        "train.finetune_rate_scale",
        "train.finetune_video_rate_scale",
        "evaluate.num_resamples",
        "evaluate.mask_repeats",
    )
    need(
        find_system(model.name).distilled or train.single_network,
        "train.single_network",
        f"the system {model.name} has no distillation: set it to True",
    )
    need(len(model.stem_patch) == 3, "model.stem_patch", "three numbers: frames, rows, columns")
    need(0 <= model.dropout < 1, "model.dropout", "must lie in [0, 1)")
    need(model.tnt_mode in ("stack", "add_resized"), "model.tnt_mode", "choose 'stack' or 'add_resized'")
    need(model.dtype in ("float32", "bfloat16"), "model.dtype", "choose 'float32' or 'bfloat16'")
    need(0 <= data.guided_masking <= 1, "data.guided_masking", "a share of the examples: must lie in [0, 1]")
    need(0 <= data.report_dropout < 1, "data.report_dropout", "must lie in [0, 1)")
    need(0 <= config.optimizer.warmup_fraction <= 1, "optimizer.warmup_fraction", "must lie in [0, 1]")
    layers = ("fused", "description", "entity", "region", "none")
    need(
        config.loss.relational_layer in layers, "loss.relational_layer", f"choose one of {', '.join(layers)}"
    )
    annotation = ("organ", "condition", "findings", "match", "grounding")
    for term in (
        "mlm",
        "mdc",
        "moc",
        "cmm",
        "summary",
        "order",
        "own",
        *annotation,
        "alpha",
        "beta",
        "gamma",
        "beta1",
        "beta2",
    ):
        need(config.loss[term] >= 0, f"loss.{term}", "must not be negative")
    need(
        not (config.loss.order and config.loss.own and find_system(model.name).ordered_steps),
        "loss.order",
        f"it shuffles the steps whose order the own tasks of {model.name} need: set it, or loss.own, to 0",
    )
    need(0 <= data.leak_iou <= 1, "data.leak_iou", "must lie in [0, 1]")
    need(model.video in VIDEO_ENCODERS, "model.video", f"choose one of {', '.join(VIDEO_ENCODERS)}")
    need(config.loss.mdc_target in MDC_TARGETS, "loss.mdc_target", f"choose one of {', '.join(MDC_TARGETS)}")
    frames = frames_per_step(model.video, model.stem_patch)
    need(data.num_frames % frames == 0, "data.num_frames", f"must be divisible by {frames}, frames a step")
    need(
        list(data.frame_buckets) == sorted({b for b in data.frame_buckets if 0 < b <= data.num_frames})
        and all(b % frames == 0 for b in data.frame_buckets),
        "data.frame_buckets",
        f"lengths in ascending order, divisible by {frames}, at most data.num_frames",
    )
    need(
        len({*data.frame_buckets, data.num_frames}) <= 3,
        "data.frame_buckets",
        "each length is compiled by itself: at most 3 with data.num_frames",
    )
    if model.video == "small":
        patch = model.stem_patch
        cells = 2 ** (len(model.channels) - 1)
        need(patch[1] == patch[2], "model.stem_patch", "rows and columns must be equal on a square input")
        need(
            data.size % (patch[1] * cells) == 0 and data.size >= 2 * patch[1] * cells,
            "data.size",
            f"must be a multiple of {patch[1] * cells}, model.stem_patch times 2 for each of "
            f"{len(model.channels)} stages but the first, and at least twice that",
        )
    else:
        need(data.size >= 32, "data.size", "r3d_18 divides height and width by 16: need at least 32")
    need(
        model.hidden_size % model.num_heads == 0,
        "model.hidden_size",
        f"must be divisible by {model.num_heads} heads",
    )
    need(len(model.blocks) == len(model.channels), "model.blocks", "one entry for each of model.channels")
    need(data.max_tokens >= 4, "data.max_tokens", "need at least 4")
    need(data.folds == 0 or data.folds >= 3, "data.folds", "0 (the set's own splits) or at least 3")
    need(data.folds == 0 or 0 <= data.fold < data.folds, "data.fold", f"must lie in [0, {data.folds})")
    need(train.batch_size >= 2, "train.batch_size", "relations between samples need at least 2")
    need(
        train.num_micro_batches > 0 and train.batch_size % train.num_micro_batches == 0,
        "train.num_micro_batches",
        f"must divide train.batch_size, {train.batch_size}",
    )
    need(model.remat in REMAT_POLICIES, "model.remat", f"choose one of {', '.join(REMAT_POLICIES)}")
    need(0 <= model.unroll <= model.num_layers, "model.unroll", f"must lie in [0, {model.num_layers}]")
    positive("mesh.fsdp", "mesh.tensor")
    need(train.weight_points >= 0, "train.weight_points", "must not be negative")
    need(config.mesh.num_workers >= 0, "mesh.num_workers", "must not be negative")
    need(model.num_heads % config.mesh.tensor == 0, "mesh.tensor", f"must divide {model.num_heads} heads")
    need(config.optimizer.name in ("sgd", "adamw"), "optimizer.name", "choose 'sgd' or 'adamw'")
    need(
        config.loss.reduction in ("mean", "mean_valid", "sum"),
        "loss.reduction",
        "choose mean, mean_valid or sum",
    )
    need(config.loss.temperature > 0, "loss.temperature", "must be positive")
    for stage in ("teacher", "student", "mutual", "finetune"):
        need(
            train[f"{stage}_epochs"] > 0,
            f"train.{stage}_epochs",
            "every stage needs a positive number of epochs",
        )
