"""The TFDS builder that every data set derives from: index, split by group, read, count, describe."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import logging
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from dilbert_jax.data import record as record_lib
from dilbert_jax.data.record import Record, StudyEntry
from dilbert_jax.knowledge import KnowledgeGraph, load_graph
from dilbert_jax.media import MediaError
from dilbert_jax.splits import DEFAULT_FRACTIONS, split_by_group

_log = logging.getLogger(__name__)
PREPARATION_FILE = "preparation.json"
CARD_FILE = "DATASET_CARD.md"
MAX_LISTED_SKIPS = 200
TRIAL_STUDIES = 8  # a split this small is read once beforehand, lest one bad file empty it


class UltrasoundBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of all builders; a subclass is named ``Builder`` in ``data/<name>/<name>_dataset_builder.py``.

    A subclass sets the class attributes below and yields its studies from ``_studies``. Studies whose media
    or record turn out bad are skipped with a reason, or stop the preparation when ``strict``.

    Attributes:
      TITLE, SOURCE, LICENCE: one line each, for the dataset card.
      LAYOUT: what ``manual_dir`` must hold, for messages; "" when the set needs no files.
      READS_REPORTS: whether the knowledge graph has a say in what is stored (labels read from reports).
      SPLIT_FRACTIONS, SPLIT_SEED: how groups without an official split are cut.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.0.0": "First version.",
        "2.0.0": "The split by group no longer depends on the kind of CPU.",
    }
    TITLE: ClassVar[str] = ""
    SOURCE: ClassVar[str] = ""
    LICENCE: ClassVar[str] = ""
    LAYOUT: ClassVar[str] = ""
    READS_REPORTS: ClassVar[bool] = False
    SPLIT_FRACTIONS: ClassVar[dict[str, float]] = DEFAULT_FRACTIONS
    SPLIT_SEED: ClassVar[int] = 0

    def __init__(
        self,
        *,
        manual_dir: str | os.PathLike[str] | None = None,
        strict: bool = False,
        progress: bool = True,
        file_format: str = "array_record",
        graph_file: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ):
        """See ``tfds.core.DatasetBuilder`` for further arguments (``data_dir``, ``config``, ...).

        Args:
          manual_dir: folder that holds the source's files; not needed by generated sets.
          strict: stop at the first bad study instead of skipping it.
          progress: show a progress bar.
          file_format: only "array_record" is read without TensorFlow.
          graph_file: your own terms (docs/knowledge.md); only sets that read reports use them.
        """
        super().__init__(file_format=file_format, **kwargs)
        self.manual_dir = None if manual_dir is None else Path(manual_dir)
        self.strict = strict
        self.progress = progress
        self.graph_file = Path(graph_file) if graph_file and self.READS_REPORTS else None
        self._graph: KnowledgeGraph | None = None
        self._skips: list[tuple[str, str]] = []
        self._tallies: dict[str, _Tally] = {}

    # -- for subclasses ------------------------------------------------------------------------------------

    @abstractmethod
    def _studies(self, manual_dir: Path | None) -> Iterable[StudyEntry]:
        """Lists the studies, decoding as little as possible; ``manual_dir`` exists if ``LAYOUT`` is set."""

    @property
    def graph(self) -> KnowledgeGraph:
        """The knowledge graph with the terms of ``graph_file``; ``ValueError`` when that is no such file."""
        if self.graph_file is None:
            return load_graph()
        if self._graph is None:
            self._graph = load_graph(self.graph_file)
        return self._graph

    def skip(self, source: str, reason: str, *, known_gap: bool = False) -> None:
        """Counts a study as skipped.

        Args:
          source: file (or file and line) to name.
          reason: a generic phrase, so that equal reasons are counted together.
          known_gap: True when a partial copy explains it (an index names an absent file): strict mode
            goes on.

        Raises:
          ValueError: in strict mode.
        """
        if self.strict and not known_gap:
            raise ValueError(f"{source}: {reason} (strict mode stops at the first bad study)")
        self._skips.append((source, reason))

    def layout_error(self, found: str) -> ValueError:
        """The error for a ``manual_dir`` that does not hold this data set."""
        return ValueError(f"{self.name}: {self.manual_dir} does not hold {self.LAYOUT}; found {found}")

    # -- TFDS ----------------------------------------------------------------------------------------------

    @classmethod
    def _get_pkg_dir_path(cls) -> Any:
        """Where README.md and CITATIONS.bib lie; TFDS's own guess fails for a mapped package folder."""
        if cls.pkg_dir_path is None:
            cls.pkg_dir_path = epath.Path(inspect.getfile(cls)).parent
        return cls.pkg_dir_path

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(record_lib.FEATURES), license=self.LICENCE
        )

    def check_manual_dir(self) -> None:
        """Raises ``ValueError`` unless the source's folder is there (or none is needed)."""
        if not self.LAYOUT:
            return
        if self.manual_dir is None:
            raise ValueError(f"{self.name}: no folder given; manual_dir must hold {self.LAYOUT}")
        if not self.manual_dir.is_dir():
            kind = "is not a folder" if self.manual_dir.exists() else "does not exist"
            raise ValueError(f"{self.name}: {self.manual_dir} {kind}; it must hold {self.LAYOUT}")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        self.check_manual_dir()
        self._skips, self._tallies = [], {}
        entries = sorted(self._studies(self.manual_dir), key=lambda e: e.study_id)
        if not entries:
            raise self.layout_error(f"no usable study ({_reasons_line(self._skips)})")
        for earlier, later in itertools.pairwise(entries):
            if earlier.study_id == later.study_id:
                raise ValueError(
                    f"{self.name}: study id {later.study_id!r} is used by {earlier.source} and "
                    f"{later.source}; study ids must be unique"
                )
        entries, splits = self._split(entries)
        self._bar = tqdm(
            total=len(entries), desc=f"prepare {self.name}", unit="study", disable=not self.progress
        )
        return {
            name: self._generate_examples(name, [entries[i] for i in indices])
            for name, indices in splits.items()
        }

    def _split(self, entries: list[StudyEntry]) -> tuple[list[StudyEntry], dict[str, np.ndarray]]:
        """Cuts by group; again without them when all studies of a small split turn out unreadable."""
        stated: dict[str, StudyEntry] = {}
        for entry in entries:
            earlier = stated.setdefault(entry.group_id, entry) if entry.official_split else entry
            if earlier.official_split != entry.official_split:
                raise ValueError(
                    f"{self.name}: {earlier.source} is in {earlier.official_split!r}, {entry.source} of the same "
                    f"patient or group in {entry.official_split!r}; drop one side or merge them"
                )
        while True:
            try:
                splits = split_by_group(
                    [e.group_id for e in entries],
                    [e.stratum for e in entries],
                    self.SPLIT_FRACTIONS,
                    self.SPLIT_SEED,
                    official_splits=[e.official_split for e in entries],
                    study_ids=[e.study_id for e in entries],
                )
            except ValueError as error:
                why = f" (skipped before: {_reasons_line(self._skips)})" if self._skips else ""
                raise ValueError(f"{self.name}: {error}{why}") from error
            bad: set[int] = set()
            for indices in splits.values():
                if len(indices) <= TRIAL_STUDIES and not any(self._is_readable(entries[i]) for i in indices):
                    bad.update(indices.tolist())
            if not bad:
                return entries, splits
            for i in sorted(bad):
                self._read(entries[i])  # counts the reason
            entries = [entry for i, entry in enumerate(entries) if i not in bad]

    def _is_readable(self, entry: StudyEntry) -> bool:
        try:
            record_lib.check(entry.read())
        except (MediaError, ValueError):
            return False
        return True

    def _read(self, entry: StudyEntry) -> tuple[Record, dict[str, Any]] | None:
        """The record and its example, or None after counting why not."""
        try:
            record = entry.read()
            _check_matches(entry, record)
            return record, record_lib.to_example(record)
        except (MediaError, ValueError) as error:
            if self.strict:
                raise ValueError(
                    f"{entry.source}: {error} (strict mode stops at the first bad study)"
                ) from error
            if isinstance(error, MediaError):
                self.skip(self._name_file(entry.source, error.path), error.reason)
            else:
                self.skip(entry.source, str(error))
            return None

    def _name_file(self, source: str, path: Path) -> str:
        """The source, and the file where the source does not name it: one of a study's many."""
        if path.name in source:
            return source
        if self.manual_dir is not None and path.is_relative_to(self.manual_dir):
            return f"{source}, {path.relative_to(self.manual_dir).as_posix()}"
        return f"{source}, {path.name}"

    def _generate_examples(
        self, split: str, entries: list[StudyEntry]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        tally = self._tallies[split] = _Tally()
        skipped_before = len(self._skips)
        for entry in entries:
            read = self._read(entry)
            if read is not None:
                tally.add(read[0])
                yield entry.study_id, read[1]
            self._bar.set_postfix(
                kept=sum(t.studies for t in self._tallies.values()), skipped=len(self._skips), refresh=False
            )
            self._bar.update()
        if not tally.studies:
            raise ValueError(
                f"{self.name}: every study of split {split!r} was skipped: "
                + _reasons_line(self._skips[skipped_before:])
            )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        tfds.display_progress_bar(False)  # one bar of our own instead of TFDS's four
        try:
            super()._download_and_prepare(dl_manager, download_config)
        finally:
            tfds.display_progress_bar(True)
            if hasattr(self, "_bar"):
                self._bar.close()
        # Still the temporary folder: data and description become visible together.
        preparation = self._preparation()
        folder = Path(self.data_dir)
        text = json.dumps(preparation, ensure_ascii=False, indent=2, sort_keys=True)
        (folder / PREPARATION_FILE).write_text(text + "\n", encoding="utf-8")
        (folder / CARD_FILE).write_text(self._card(preparation), encoding="utf-8")
        nameless = sum(tally.counts["organs"][""] for tally in self._tallies.values())
        if nameless:
            _log.warning(
                "%s: %d of %d studies have no organ: neither stated nor named in the report",
                self.name,
                nameless,
                preparation["kept"],
            )

    def _log_download_bytes(self) -> None:
        """TFDS would print a banner about download sizes; nothing is downloaded here."""

    def _log_download_done(self) -> None:
        """See ``_log_download_bytes``."""

    # -- what was prepared ---------------------------------------------------------------------------------

    def source_fingerprint(self) -> str:
        """SHA-256 over names, sizes and times of the source's files; "" for generated sets."""
        if not self.LAYOUT or self.manual_dir is None:
            return ""
        digest = hashlib.sha256()
        for path in sorted(p for p in self.manual_dir.rglob("*") if p.is_file()):
            stat = path.stat()
            line = f"{path.relative_to(self.manual_dir).as_posix()}\t{stat.st_size}\t{stat.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def graph_fingerprint(self) -> str:
        """SHA-256 of the user's own terms; "" where none are used."""
        if self.graph_file is None:
            return ""
        try:
            return hashlib.sha256(self.graph_file.read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(
                f"{self.graph_file}: cannot be read ({error.strerror}); give the path of a JSON file"
            ) from error

    def preparation(self) -> dict[str, Any] | None:
        """The contents of preparation.json, or None when the set is not prepared."""
        path = Path(self.data_dir) / PREPARATION_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _preparation(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for line in sorted(line for tally in self._tallies.values() for line in tally.hashes):
            digest.update(line.encode())
        reasons = Counter(reason for _, reason in self._skips)
        return {
            "schema": "dilbert-jax/preparation/1",
            "name": self.name,
            "version": str(self.version),
            "source": self.SOURCE,
            "licence": self.LICENCE,
            "source_fingerprint": self.source_fingerprint(),
            "graph_fingerprint": self.graph_fingerprint(),
            "fingerprint": digest.hexdigest(),
            "kept": sum(tally.studies for tally in self._tallies.values()),
            "skipped": len(self._skips),
            "skipped_by_reason": dict(reasons.most_common()),
            "skipped_studies": [
                {"source": source, "reason": reason}
                # Rare reasons first: thousands of files that a partial copy lacks must not hide a bad one.
                for source, reason in sorted(self._skips, key=lambda skip: (reasons[skip[1]], skip))[
                    :MAX_LISTED_SKIPS
                ]
            ],
            "kept_whole": sorted(source for tally in self._tallies.values() for source in tally.kept_whole),
            "splits": {name: tally.summary() for name, tally in self._tallies.items()},
        }

    def _card(self, preparation: dict[str, Any]) -> str:
        lines = [
            f"# {self.TITLE or self.name}",
            "",
            f"Prepared as `{self.name}` {self.version}. Research use only; not for clinical use.",
            "",
            f"- Source: {self.SOURCE}",
            f"- Licence: {self.LICENCE}",
            f"- Kept {preparation['kept']} studies, skipped {preparation['skipped']}.",
            *[
                f"- {len(preparation['kept_whole'])} of them were not blanked, as no scan sector stood out: text "
                f"burned in may be left (`kept_whole` in {PREPARATION_FILE})."
            ]
            * bool(self.LAYOUT),  # a generated set never showed a screen
            f"- Fingerprint of the prepared studies: `{preparation['fingerprint']}`",
            "",
            "| split | studies | groups | frames | synthetic reports |",
            "|---|---|---|---|---|",
        ]
        for name, split in preparation["splits"].items():
            counts = (split["studies"], split["groups"], split["frames"], split["synthetic_reports"])
            lines.append(f"| {name} | " + " | ".join(str(c) for c in counts) + " |")
        for title, key in (
            ("Organs", "organs"),
            ("Conditions", "conditions"),
            ("Findings", "findings"),
            ("Regions", "regions"),
            ("Languages", "languages"),
            ("Decoders", "decoders"),
        ):
            total: Counter[str] = Counter()
            for split in preparation["splits"].values():
                total.update(split[key])
            lines += [
                "",
                f"## {title}",
                "",
                "| value | studies |" if key != "regions" else "| label | boxes |",
                "|---|---|",
            ]
            lines += [f"| {value or '(none stated)'} | {count} |" for value, count in total.most_common()]
        if preparation["skipped_by_reason"]:
            lines += ["", "## Skipped", "", "| reason | studies |", "|---|---|"]
            lines += [f"| {reason} | {count} |" for reason, count in preparation["skipped_by_reason"].items()]
        return "\n".join(lines) + "\n"


class _Tally:
    """Counts of one split while it is written."""

    def __init__(self) -> None:
        self.studies = 0
        self.frames = 0
        self.synthetic_reports = 0
        self.groups: set[str] = set()
        self.kept_whole: list[str] = []
        self.hashes: list[str] = []
        self.counts: dict[str, Counter[str]] = {
            key: Counter() for key in ("organs", "conditions", "findings", "regions", "languages", "decoders")
        }

    def add(self, record: Record) -> None:
        self.studies += 1
        self.frames += len(record.frames)
        self.synthetic_reports += record.report_is_synthetic
        self.groups.add(record.group_id)
        if record.kept_whole:
            self.kept_whole.append(record.source)
        self.hashes.append(f"{record.study_id}\t{hash_frames(record.frames)}\n")
        self.counts["organs"][record.organ] += 1
        self.counts["conditions"][record.condition] += 1
        self.counts["findings"].update(record.findings)
        self.counts["regions"].update(r.label for r in record.regions)
        self.counts["languages"][record.language] += 1
        self.counts["decoders"][record.decoder] += 1

    def summary(self) -> dict[str, Any]:
        return {
            "studies": self.studies,
            "groups": len(self.groups),
            "frames": self.frames,
            "synthetic_reports": self.synthetic_reports,
            **{key: dict(counter.most_common()) for key, counter in self.counts.items()},
        }


def hash_frames(frames: np.ndarray) -> str:
    """SHA-256 over shape and pixels of uint8 [T, H, W]."""
    digest = hashlib.sha256(repr(frames.shape).encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


def _check_matches(entry: StudyEntry, record: Record) -> None:
    """The index pass and the reading pass must speak of the same study: splits were cut by the former."""
    for field in ("study_id", "group_id", "official_split"):
        indexed, read = getattr(entry, field), getattr(record, field)
        if indexed != read:
            raise ValueError(
                f"study {entry.study_id!r}: field {field!r} was indexed as {indexed!r}, read as {read!r}"
            )


def _reasons_line(skips: list[tuple[str, str]]) -> str:
    reasons = Counter(reason for _, reason in skips).most_common(3)
    return "; ".join(f"{count} x {reason}" for reason, count in reasons) or "nothing was skipped"
