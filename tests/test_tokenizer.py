"""WordPiece training, vocabulary files and the marks that tie word pieces to entities."""

import subprocess
import sys

import numpy as np
import pytest

from dilbert_jax.knowledge import ReportTokenizer, load_graph
from dilbert_jax.knowledge.tokenizer import SPECIAL_TOKENS, TOKEN_TYPES

TEXTS = [
    "Breast: a hypoechoic, irregular mass with spiculated margin is seen.",
    "No calcification is seen. The liver is homogeneous.",
    "右叶可见无回声结节，大小约_2DS_，边界清晰。",
    "肝内外胆管未见扩张。",
] * 3


@pytest.fixture(scope="module")
def graph():
    return load_graph()


@pytest.fixture(scope="module")
def tokenizer():
    return ReportTokenizer.train(TEXTS, 400)


def test_training_is_deterministic_across_processes(tokenizer):
    code = (
        "from dilbert_jax.knowledge import ReportTokenizer\n"
        f"print('\\n'.join(ReportTokenizer.train({TEXTS!r}, 400).vocabulary))"
    )
    result = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], capture_output=True, check=True, encoding="utf-8"
    )
    assert tuple(result.stdout.rstrip("\n").split("\n")) == tokenizer.vocabulary


def test_vocabulary(tokenizer):
    assert tokenizer.vocabulary[:5] == SPECIAL_TOKENS
    assert (
        tokenizer.pad_id,
        tokenizer.unk_id,
        tokenizer.cls_id,
        tokenizer.sep_id,
        tokenizer.mask_id,
    ) == tuple(range(5))
    assert tokenizer.vocab_size == len(set(tokenizer.vocabulary)) <= 400
    assert "hypoechoic" in tokenizer.vocabulary


def test_save_and_load_give_the_same_pieces(tokenizer, tmp_path):
    path = tmp_path / "vocab.txt"
    tokenizer.save(path)
    loaded = ReportTokenizer.load(path)
    assert loaded.vocabulary == tokenizer.vocabulary
    assert loaded.tokenize(TEXTS[0]) == tokenizer.tokenize(TEXTS[0])


def test_a_bert_vocabulary_is_accepted_in_its_own_order(tmp_path, graph):
    path = tmp_path / "vocab.txt"
    pieces = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mass", "a", "no", "##es", "肝", "."]
    path.write_bytes("\r\n".join(pieces).encode())
    tokenizer = ReportTokenizer.load(path)
    assert (tokenizer.unk_id, tokenizer.mask_id) == (2, 5)
    encoded = tokenizer.encode("No masses.", "en", graph, 8)
    assert encoded.token_ids.tolist() == [3, 8, 6, 9, 11, 4, 0, 0]
    assert encoded.entity_index.tolist() == [-1, -1, 0, 0, -1, -1, -1, -1]


@pytest.mark.parametrize("missing", SPECIAL_TOKENS)
def test_a_missing_special_token_is_named(tmp_path, missing):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(t for t in (*SPECIAL_TOKENS, "mass") if t != missing))
    with pytest.raises(ValueError, match="special token") as error:
        ReportTokenizer.load(path)
    assert missing in str(error.value) and str(path) in str(error.value)


def test_bad_vocabulary_files(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join((*SPECIAL_TOKENS, "mass", "mass")))
    with pytest.raises(ValueError, match="'mass' occurs twice"):
        ReportTokenizer.load(path)
    path.write_text("\n".join(SPECIAL_TOKENS))
    with pytest.raises(ValueError, match="special tokens only"):
        ReportTokenizer.load(path)
    path.write_bytes(b"\xff\xfe\x00mass")
    with pytest.raises(ValueError, match="not UTF-8"):
        ReportTokenizer.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        ReportTokenizer.load(tmp_path / "none.txt")


def test_a_vocabulary_too_small_for_the_characters_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size is 20; .* need \d+"):
        ReportTokenizer.train(TEXTS, 20)


def test_encoding_frames_the_report(tokenizer, graph):
    encoded = tokenizer.encode("无回声结节", "zh", graph, 12)
    pieces = [tokenizer.vocabulary[i] for i in encoded.token_ids]
    assert pieces == ["[CLS]", *"无回声结节", "[SEP]", *["[PAD]"] * 5]
    assert encoded.token_mask.tolist() == [True] * 7 + [False] * 5
    assert [e.concept for e in encoded.entities] == ["anechoic", "nodule"]
    assert encoded.entity_index.tolist() == [-1, 0, 0, 0, 1, 1, -1, -1, -1, -1, -1, -1]
    descriptor, finding = TOKEN_TYPES["descriptor"], TOKEN_TYPES["finding"]
    assert (TOKEN_TYPES["organ"], TOKEN_TYPES["region"], finding, descriptor, TOKEN_TYPES["condition"]) == (
        1,
        2,
        3,
        4,
        5,
    )
    assert encoded.token_types[:7].tolist() == [0, descriptor, descriptor, descriptor, finding, finding, 0]
    for array, dtype in (
        (encoded.token_ids, np.int32),
        (encoded.token_types, np.int32),
        (encoded.entity_index, np.int32),
        (encoded.token_mask, np.bool_),
    ):
        assert array.shape == (12,) and array.dtype == dtype


def test_unseen_words_numbers_and_placeholders_are_spelled_not_unknown(tokenizer):
    pieces = tokenizer.tokenize("Xylographic 3.75 mm, _SCM_ _LocR_ 大小")
    assert "[UNK]" not in pieces
    assert "".join(piece.removeprefix("##") for piece in pieces) == "xylographic3.75mm,_scm__locr_大小"


def test_every_piece_of_a_split_word_belongs_to_its_entity(tokenizer, graph):
    encoded = tokenizer.encode("thyroid vascularity", "en", graph, 32)
    used = encoded.token_ids[encoded.token_mask][1:-1]
    assert len(used) > 2
    assert set(encoded.entity_index[1 : 1 + len(used)].tolist()) == {0, 1}


def test_a_long_report_is_cut(tokenizer, graph):
    encoded = tokenizer.encode(TEXTS[0] * 5, "en", graph, 6)
    assert encoded.token_mask.all() and encoded.token_ids[-1] == tokenizer.sep_id
    assert len(encoded.entities) > encoded.entity_index.max() + 1
    with pytest.raises(ValueError, match="max_tokens is 2"):
        tokenizer.encode("mass", "en", graph, 2)


def test_an_empty_report(tokenizer, graph):
    encoded = tokenizer.encode("", "en", graph, 4)
    assert encoded.token_ids.tolist() == [tokenizer.cls_id, tokenizer.sep_id, 0, 0]
    assert encoded.token_mask.tolist() == [True, True, False, False]
