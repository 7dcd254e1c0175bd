"""WordPiece over reports, and the word pieces that belong to each named entity."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from dilbert_jax.knowledge.entities import Entity, extract_entities
from dilbert_jax.knowledge.graph import CONCEPT_TYPES, KnowledgeGraph

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKEN_TYPES = {name: index for index, name in enumerate(CONCEPT_TYPES, start=1)}
# Numbers, placeholders such as _2DS_ and Latin words that training never saw must not end as [UNK].
_PIECES = string.ascii_lowercase + string.digits
_SINGLES = string.punctuation + "×°±≤≥。，、；：？！（）“”"


@dataclasses.dataclass(frozen=True)
class EncodedReport:
    """A report as word pieces; L = max_tokens.

    Attributes:
      token_ids: int32 [L], [CLS] first, [SEP] last, then padding.
      token_mask: bool [L], True for [CLS], word pieces and [SEP].
      token_types: int32 [L], 0 outside an entity, else 1..5 = organ, region, finding, descriptor, condition.
      entity_index: int32 [L], -1 outside an entity, else the index into ``entities``.
      entities: every entity of the report, also those beyond L.
    """

    token_ids: np.ndarray
    token_mask: np.ndarray
    token_types: np.ndarray
    entity_index: np.ndarray
    entities: tuple[Entity, ...]


class ReportTokenizer:
    """BERT's WordPiece: lower case, Chinese by character; build it with ``train`` or ``load``."""

    def __init__(self, vocabulary: Iterable[str], *, source: str = "vocabulary", lowercase: bool = True):
        """Checks a vocabulary and builds the tokenizer.

        Args:
          vocabulary: word pieces in the order of their ids.
          source: name for messages, usually the file.
          lowercase: whether text is lower-cased and stripped of accents; False for a cased BERT vocabulary.

        Raises:
          ValueError: a special token is missing, a piece occurs twice, or nothing but specials is there.
        """
        self.vocabulary = tuple(vocabulary)
        ids = {piece: index for index, piece in enumerate(self.vocabulary)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise ValueError(
                f"{source}: special token {missing[0]} is missing; add {' '.join(SPECIAL_TOKENS)}"
            )
        if len(ids) < len(self.vocabulary):
            twice = next(piece for index, piece in enumerate(self.vocabulary) if ids[piece] != index)
            raise ValueError(f"{source}: word piece {twice!r} occurs twice; every line needs its own piece")
        if len(ids) == len(SPECIAL_TOKENS):
            raise ValueError(f"{source}: holds special tokens only; add word pieces")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[t] for t in SPECIAL_TOKENS)
        self.special_ids = frozenset(ids[token] for token in SPECIAL_TOKENS)
        # bool [vocab_size]
        self.is_ordinary = ~np.isin(np.arange(len(self.vocabulary)), list(self.special_ids))
        self.ordinary_ids = np.flatnonzero(self.is_ordinary)
        self.lowercase = lowercase
        self._tokenizer = _bert(WordPiece(ids, unk_token=UNK), lowercase)

    @property
    def vocab_size(self) -> int:
        """Number of word pieces, specials included."""
        return len(self.vocabulary)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> ReportTokenizer:
        """Learns word pieces from reports; the same texts give the same vocabulary.

        Args:
          texts: the training reports.
          vocab_size: most word pieces to keep, specials included.

        Returns:
          The tokenizer.

        Raises:
          ValueError: ``vocab_size`` cannot hold the specials and the characters of the texts.
        """
        texts = list(texts)
        scratch = _bert(WordPiece({UNK: 0}, unk_token=UNK), lowercase=True)
        singles, continuations = set(_SINGLES + _PIECES), set(_PIECES)
        for text in texts:
            for word, _ in scratch.pre_tokenizer.pre_tokenize_str(scratch.normalizer.normalize_str(text)):
                singles.add(word[0])
                continuations.update(word[1:])
                singles.update(word[1:])
        # The trainer numbers "##" pieces in hash order; naming them up front makes ids repeatable.
        fixed = [*SPECIAL_TOKENS, *sorted(singles), *("##" + c for c in sorted(continuations))]
        if vocab_size < len(fixed):
            raise ValueError(
                f"vocab_size is {vocab_size}; special tokens and the texts' characters need {len(fixed)}"
            )
        trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
        scratch.train_from_iterator(texts, trainer)
        learned = scratch.get_vocab()
        return cls(sorted(learned, key=learned.__getitem__))

    @classmethod
    def load(cls, path: Path | str, *, lowercase: bool = True) -> ReportTokenizer:
        """Reads a vocab.txt: one word piece a line, the line number is the id.

        Args:
          path: the file, written by ``save`` or taken from a BERT model.
          lowercase: False for a cased BERT vocabulary.

        Raises:
          ValueError: the file cannot be read or is no BERT vocabulary.
        """
        path = Path(path)
        try:
            lines = path.read_text("utf-8-sig").split("\n")
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}); give the path of a vocab.txt"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text ({error.reason}); give a BERT vocab.txt") from error
        while lines and not lines[-1].strip("\r"):
            lines.pop()
        return cls([line.rstrip("\r") for line in lines], source=str(path), lowercase=lowercase)

    def save(self, path: Path | str) -> None:
        """Writes the vocabulary as a vocab.txt that ``load`` reads."""
        Path(path).write_text("\n".join(self.vocabulary) + "\n", "utf-8", newline="\n")

    def tokenize(self, text: str) -> list[str]:
        """Returns the word pieces of a text, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).tokens)

    def encode(self, text: str, language: str, graph: KnowledgeGraph, max_tokens: int) -> EncodedReport:
        """Turns a report into word pieces marked with its named entities.

        Args:
          text: the report; may be empty.
          language: "en" or "zh".
          graph: the knowledge graph.
          max_tokens: L, at least 3; a longer report is cut.

        Returns:
          The encoded report. A word piece belongs to the entity whose characters it shares.

        Raises:
          ValueError: ``max_tokens`` below 3 or unknown language.
        """
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}; [CLS], one word piece and [SEP] need at least 3")
        entities = tuple(extract_entities(text, language, graph))
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        count = min(len(encoding.ids), max_tokens - 2)
        token_ids = np.full(max_tokens, self.pad_id, np.int32)
        token_ids[0], token_ids[count + 1] = self.cls_id, self.sep_id
        token_ids[1 : count + 1] = encoding.ids[:count]
        token_types = np.zeros(max_tokens, np.int32)
        entity_index = np.full(max_tokens, -1, np.int32)
        cursor = 0
        for position, (start, end) in enumerate(encoding.offsets[:count], start=1):
            while cursor < len(entities) and entities[cursor].end <= start:
                cursor += 1
            if cursor < len(entities) and entities[cursor].start < end:
                entity_index[position] = cursor
                token_types[position] = TOKEN_TYPES[graph.concepts[entities[cursor].concept].type]
        return EncodedReport(
            token_ids, np.arange(max_tokens) < count + 2, token_types, entity_index, entities
        )


def _bert(model: WordPiece, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer
