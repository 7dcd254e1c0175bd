"""Masking: exact budget, 80/10/10, graph guidance, nothing given away."""

import numpy as np
import pytest

from dilbert_jax.knowledge import ReportTokenizer, load_graph, mask_report, related_entities

# Pleura and B-lines hold relations to lung; breast implant and thyroiditis hold none to anything here.
TEXT = (
    "lung pleura breast implant thyroiditis b-lines of this scan were looked at again by the same hand later "
    "on that day and then once more in the week after"
)


@pytest.fixture(scope="module")
def graph():
    return load_graph()


@pytest.fixture(scope="module")
def tokenizer():
    return ReportTokenizer.train([TEXT] * 5, 600)


@pytest.fixture(scope="module")
def encoded(tokenizer, graph):
    return tokenizer.encode(TEXT, "en", graph, 64)


def ordinary_count(encoded):
    return int(encoded.token_mask.sum()) - 2


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("rate", [0.01, 0.15, 0.4, 1.0])
def test_the_budget_is_exact_and_specials_are_spared(encoded, tokenizer, graph, rate, guided):
    budget = max(1, round(rate * ordinary_count(encoded)))
    for seed in range(40):
        masked = mask_report(
            encoded,
            np.random.default_rng(seed),
            tokenizer,
            rate=rate,
            first=related_entities(encoded, graph) if guided else (),
        )
        assert masked.target_mask.sum() == budget
        assert not masked.target_mask[~encoded.token_mask].any()
        special = np.isin(encoded.token_ids, list(tokenizer.special_ids))
        assert not masked.target_mask[special].any()
        hidden = masked.target_mask
        np.testing.assert_array_equal(masked.token_ids[~hidden], encoded.token_ids[~hidden])
        np.testing.assert_array_equal(masked.targets, np.where(hidden, encoded.token_ids, 0))
        np.testing.assert_array_equal(masked.token_types, np.where(hidden, 0, encoded.token_types))
        assert masked.token_ids.dtype == masked.targets.dtype == masked.token_types.dtype == np.int32


def test_eighty_ten_ten(encoded, tokenizer, graph):
    rng = np.random.default_rng(1)
    masked_share = kept = replaced = total = 0
    seen = set()
    for _ in range(1500):
        masked = mask_report(encoded, rng, tokenizer, rate=0.5, first=related_entities(encoded, graph))
        now, was = masked.token_ids[masked.target_mask], encoded.token_ids[masked.target_mask]
        masked_share += (now == tokenizer.mask_id).sum()
        kept += (now == was).sum()
        other = now[(now != was) & (now != tokenizer.mask_id)]
        replaced += other.size
        seen.update(other.tolist())
        total += now.size
    assert abs(masked_share / total - 0.8) < 0.01
    assert abs(kept / total - 0.1) < 0.01
    assert abs(replaced / total - 0.1) < 0.01
    assert not seen & tokenizer.special_ids
    assert len(seen) > 0.9 * (tokenizer.vocab_size - len(tokenizer.special_ids))


def test_related_entities_are_found(encoded, graph):
    names = [encoded.entities[index].concept for index in related_entities(encoded, graph)]
    assert names == ["lung", "pleura", "b_lines"]
    assert {"breast_implant", "thyroiditis"} <= {e.concept for e in encoded.entities}


def test_guidance_takes_related_entities_first_and_whole(encoded, tokenizer, graph):
    related = related_entities(encoded, graph)
    pieces = int(np.isin(encoded.entity_index, related).sum())
    rate = (pieces + 2) / ordinary_count(encoded)
    chance = 0
    for seed in range(50):
        masked = mask_report(
            encoded, np.random.default_rng(seed), tokenizer, rate=rate, first=related_entities(encoded, graph)
        )
        assert masked.target_mask[np.isin(encoded.entity_index, related)].all()
        plain = mask_report(encoded, np.random.default_rng(seed), tokenizer, rate=rate)
        chance += plain.target_mask[np.isin(encoded.entity_index, related)].mean() / 50
    assert chance < 0.6


def test_a_span_over_the_budget_is_not_cut(tokenizer, graph):
    text = "lung pleural line irregularity of scan"
    encoded = tokenizer.encode(text, "en", graph, 48)
    sizes = {
        encoded.entities[i].concept: int((encoded.entity_index == i).sum())
        for i in range(len(encoded.entities))
    }
    assert sizes["pleural_irregularity"] > sizes["lung"] == 1
    # A budget of one holds "lung" only, whichever entity is drawn first.
    for seed in range(20):
        masked = mask_report(
            encoded, np.random.default_rng(seed), tokenizer, rate=0.01, first=related_entities(encoded, graph)
        )
        assert encoded.entity_index[masked.target_mask].tolist() == [0]


def test_unguided_is_uniform(encoded, tokenizer, graph):
    rng = np.random.default_rng(3)
    counts = sum(mask_report(encoded, rng, tokenizer, rate=0.2).target_mask.astype(int) for _ in range(3000))
    share = counts[1 : 1 + ordinary_count(encoded)] / 3000
    assert np.abs(share - share.mean()).max() < 0.04


@pytest.mark.parametrize("guided", [True, False])
def test_same_state_same_mask(encoded, tokenizer, graph, guided):
    draws = [
        mask_report(
            encoded,
            np.random.default_rng(seed),
            tokenizer,
            rate=0.3,
            first=related_entities(encoded, graph) if guided else (),
        )
        for seed in (5, 5, *range(6, 16))
    ]
    np.testing.assert_array_equal(draws[0].token_ids, draws[1].token_ids)
    np.testing.assert_array_equal(draws[0].target_mask, draws[1].target_mask)
    assert len({draw.target_mask.tobytes() for draw in draws}) > 1


def test_input_is_left_alone_and_empty_reports_have_no_target(encoded, tokenizer, graph):
    before = encoded.token_ids.copy()
    mask_report(encoded, np.random.default_rng(0), tokenizer, rate=1.0)
    np.testing.assert_array_equal(encoded.token_ids, before)
    empty = tokenizer.encode("", "en", graph, 8)
    masked = mask_report(empty, np.random.default_rng(0), tokenizer)
    assert not masked.target_mask.any()
    np.testing.assert_array_equal(masked.token_ids, empty.token_ids)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5])
def test_rate_is_checked(encoded, tokenizer, graph, rate):
    with pytest.raises(ValueError, match="rate is"):
        mask_report(encoded, np.random.default_rng(0), tokenizer, rate=rate)
