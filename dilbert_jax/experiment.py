"""Everything a run needs besides its weights: data, splits, vocabulary, label space and the model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from dilbert_jax import datasets, splits
from dilbert_jax.clips import ClipStore, open_clip_store
from dilbert_jax.config import load_config, save_config
from dilbert_jax.data.record import EncodedFrames, decode_png
from dilbert_jax.examples import ExampleBuilder, InputSpec, entity_statuses
from dilbert_jax.knowledge import KnowledgeGraph, ReportTokenizer, load_graph
from dilbert_jax.labels import LabelSpace, build_label_space
from dilbert_jax.models import init_params, make_network
from dilbert_jax.models.network import Network, NetworkConfig, frames_per_step
from dilbert_jax.training.objectives import LossConfig

MAX_NAME_PIECES = 8
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ModelContext:
    """What turns a clip into an annotation, without any data set: all of it is read from a workdir."""

    config: ml_collections.ConfigDict
    graph: KnowledgeGraph
    tokenizer: ReportTokenizer
    labels: LabelSpace
    spec: InputSpec
    model: Network
    entity_names: tuple[np.ndarray, np.ndarray]
    entity_of_region: np.ndarray

    @property
    def loss(self) -> LossConfig:
        return LossConfig(**self.config.loss)

    def init_params(self, key: jax.Array) -> Any:
        """Freshly initialised parameters of one network (`models.init_params`)."""
        return init_params(self.model, key)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model context together with its data set."""

    context: ModelContext
    store: ClipStore
    builder: ExampleBuilder
    indices: dict[str, np.ndarray]  # train, validation, test
    dataset: dict[str, Any]  # what preparation.json says of the data


def make_context(
    config: ml_collections.ConfigDict, graph: KnowledgeGraph, tokenizer: ReportTokenizer, labels: LabelSpace
) -> ModelContext:
    """Assembles the model for a configuration, vocabulary and label space."""
    data = config.data
    spec = InputSpec(
        num_frames=data.num_frames,
        frames_per_step=frames_per_step(config.model.video, config.model.stem_patch),
        grid_scales=tuple(data.grid_scales),
        grid_steps=data.grid_steps,
        max_annotated_regions=data.max_annotated_regions,
        max_tokens=data.max_tokens,
        guided_masking=data.guided_masking,
        leak_iou=data.leak_iou,
        any_mismatch=data.any_mismatch,
        shuffle=config.loss.order > 0,
        report_dropout=data.report_dropout,
        augment=data.augment,
        frame_buckets=tuple(data.frame_buckets),
    )
    fields: dict[str, Any] = {
        name: tuple(v) if isinstance(v, (list, tuple)) else v for name, v in config.model.items()
    }
    model = make_network(
        NetworkConfig(
            vocab_size=tokenizer.vocab_size,
            # A softmax over an empty space keeps one output whose loss never counts.
            num_organs=max(1, len(labels.organs)),
            num_conditions=max(1, len(labels.conditions)),
            num_findings=len(labels.findings),
            num_classes=len(labels.classes),
            num_region_classes=max(1, len(labels.regions)),
            num_entities=len(labels.entities),
            mdc_target=config.loss.mdc_target,
            order=config.loss.order > 0,
            max_tokens=data.max_tokens,
            max_steps=spec.num_steps,
            **fields,
        )
    )
    names = np.zeros((max(1, len(labels.entities)), MAX_NAME_PIECES), np.int32)
    mask = np.zeros(names.shape, bool)
    for row, concept in enumerate(labels.entities):
        # The names in both languages; an empty graph keeps the tokenizer from marking entities.
        pieces: list[int] = []
        for language in ("en", "zh"):
            encoded = tokenizer.encode(graph.name(concept, language), language, graph, MAX_NAME_PIECES)
            pieces += [int(i) for i in encoded.token_ids[encoded.token_mask][1:-1] if i != tokenizer.unk_id]
        pieces = pieces[:MAX_NAME_PIECES]
        names[row, : len(pieces)], mask[row, : len(pieces)] = pieces, True
    entity = {concept: i for i, concept in enumerate(labels.entities)}
    entity_of_region = np.asarray([entity.get(r, -1) for r in labels.regions] or [-1], np.int32)
    return ModelContext(config, graph, tokenizer, labels, spec, model, (names, mask), entity_of_region)


def load_context(workdir: pathlib.Path) -> ModelContext:
    """Reads what training wrote to a workdir: configuration, vocabulary and label space.

    Raises:
      FileNotFoundError: the folder holds no run.
    """
    for name in ("config.json", "vocab.txt", "labels.json"):
        if not (workdir / name).is_file():
            raise FileNotFoundError(
                f"{workdir / name} is missing: {workdir} holds no run; train one with train.py"
            )
    config = load_config(workdir / "config.json")
    graph = load_graph(config.data.graph_file or None)
    return make_context(
        config, graph, ReportTokenizer.load(workdir / "vocab.txt"), LabelSpace.load(workdir / "labels.json")
    )


def open_experiment(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Experiment:
    """Prepares the data set when needed, and creates or reopens a run in `workdir`.

    Raises:
      ValueError: the workdir holds a run with another configuration, or of data that were split otherwise.
    """
    data = config.data
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / "config.json").exists():
        check_same_config(config, workdir)
    graph = load_graph(data.graph_file or None)
    tfds_builder = datasets.prepare(
        data.name,
        manual_dir=data.manual_dir or None,
        data_dir=data.data_dir or None,
        graph_file=data.graph_file or None,
    )
    if not (workdir / "config.json").exists():  # only now: a mistyped folder must not bind the workdir
        _save_whole(functools.partial(save_config, config), workdir / "config.json")
    folder = pathlib.Path(tfds_builder.data_path)
    preparation = json.loads((folder / "preparation.json").read_text(encoding="utf-8"))

    def examples() -> Iterator[tuple[str, dict[str, Any]]]:
        for split in tfds_builder.info.splits:
            for example in tfds_builder.as_data_source(split, decoders={"frames": EncodedFrames()}):
                yield split, example

    store = open_clip_store(
        examples(),
        decode_png,
        folder=folder,
        fingerprint=preparation["fingerprint"],
        size=data.size,
        stored_frames=data.stored_frames,
    )
    indices = _split(store, data)
    _check_same_split(store, indices, workdir)
    tokenizer = _open_tokenizer(config, workdir, [store.studies[i].report for i in indices["train"]])
    _warn_of_untaught_classes(store, indices["train"], data)
    _warn_of_cut_reports(store, indices["train"], tokenizer, data)
    if (workdir / "labels.json").exists():
        labels = LabelSpace.load(workdir / "labels.json")
    else:
        statuses = [entity_statuses(store.studies[i], graph) for i in indices["train"]]
        labels = build_label_space(
            organs=[s.organ for s in store.studies],
            conditions=[s.condition for s in store.studies],
            findings=[s.findings for s in store.studies],
            regions=[label for s in store.studies for label in s.region_labels],
            entities=[[c for c, status in held.items() if status == "present"] for held in statuses],
            graph=graph,
            min_count=data.min_entity_count,
        )
        _save_whole(labels.save, workdir / "labels.json")
    context = make_context(config, graph, tokenizer, labels)
    builder = ExampleBuilder(store, labels, context.spec, tokenizer, graph, indices)
    return Experiment(context, store, builder, indices, preparation)


def check_same_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raises `ValueError`, naming every differing field, when the workdir's run has another configuration."""
    old = load_config(workdir / "config.json").to_dict()
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(config.to_dict()))
    differences = []
    for section in sorted({*old, *new} - {"mesh"}):
        a, b = old.get(section), new.get(section)
        if isinstance(a, dict) and isinstance(b, dict):
            differences += [f"{section}.{f}: {a.get(f)!r} -> {b.get(f)!r}" for f in a if a.get(f) != b.get(f)]
        elif a != b:
            differences.append(f"{section}: {a!r} -> {b!r}")
    if differences:
        raise ValueError(
            f"{workdir} holds a run with another configuration ({'; '.join(differences)}); "
            "name another --workdir, or delete this one"
        )


def _save_whole(save: Callable[[pathlib.Path], None], path: pathlib.Path) -> None:
    """The file gets its name only when complete: a kill leaves none that a later run would read half of."""
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    temporary.replace(path)


def _split(store: ClipStore, data: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """Indices of train, validation and test studies: the set's own splits or one fold of k, both by group."""
    studies = store.studies
    if data.folds:
        folds = splits.k_folds(
            [s.group_id for s in studies],
            [s.condition or s.organ for s in studies],
            data.folds,
            data.split_seed,
            study_ids=[s.study_id for s in studies],
        )
        return dict(zip(splits.SPLITS, folds[data.fold], strict=True))
    return {
        name: np.asarray([i for i, s in enumerate(studies) if s.split == name], np.int64)
        for name in splits.SPLITS
    }


def _check_same_split(store: ClipStore, indices: dict[str, np.ndarray], workdir: pathlib.Path) -> None:
    """Keeps a digest of which studies are in which split; refuses a run that began with others.

    Data that were prepared anew may be split otherwise, and then a run would be tested on what it was trained on.
    """
    path = workdir / "splits.json"
    found = {}
    for name, part in indices.items():
        ids = "\n".join(sorted(store.studies[i].study_id for i in part))
        found[name] = {"studies": len(part), "sha256": hashlib.sha256(ids.encode()).hexdigest()}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name in found if kept.get(name) != found[name]]
        if differ:
            raise ValueError(
                f"{path}: this run began with other studies for {', '.join(differ)}, and would be tested on what it "
                "was trained on; name another --workdir, or prepare the data as they were"
            )
        return
    if (workdir / "labels.json").exists():
        _log.warning(
            "%s holds a run without splits.json (it came from an earlier version or from elsewhere): whether the "
            "splits are those that it was trained with cannot be told",
            workdir,
        )
        return

    def save(to: pathlib.Path) -> None:
        to.write_text(json.dumps(found, indent=1), encoding="utf-8")

    _save_whole(save, path)


def _warn_of_untaught_classes(
    store: ClipStore, training: np.ndarray, data: ml_collections.ConfigDict
) -> None:
    """Tells of organs and conditions that validation or test studies have and no training study has."""
    for field in ("organ", "condition"):
        known = {getattr(study, field) for study in store.studies} - {""}
        untaught = known - {getattr(store.studies[i], field) for i in training}
        if untaught:
            _log.warning(
                "%s: no training study has the %s %s, which others have: no network can learn it%s",
                data.name,
                field,
                ", ".join(sorted(untaught)),
                "" if data.folds else "; with data.folds every study serves in turn",
            )


def _warn_of_cut_reports(
    store: ClipStore, training: np.ndarray, tokenizer: ReportTokenizer, data: ml_collections.ConfigDict
) -> None:
    """Tells how many training reports lose their end, which often holds the conclusion."""
    room = data.max_tokens - 2  # [CLS] and [SEP]
    cut = sum(len(tokenizer.tokenize(store.studies[i].report)) > room for i in training)
    if cut:
        _log.warning(
            "%s: %d of %d training reports are longer than data.max_tokens (%d): their ends are cut",
            data.name,
            cut,
            len(training),
            data.max_tokens,
        )


def _open_tokenizer(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, training_reports: list[str]
) -> ReportTokenizer:
    """The run's own vocabulary, the user's vocab.txt, or WordPiece trained on the training reports."""
    path = workdir / "vocab.txt"
    if not path.exists():
        if config.data.vocab_file:
            tokenizer = ReportTokenizer.load(config.data.vocab_file)
        else:
            tokenizer = ReportTokenizer.train(training_reports, config.data.vocab_size)
        _save_whole(tokenizer.save, path)
    return ReportTokenizer.load(path)
