"""`eaft-megatron landscape`: every number against numpy by hand, the pictures, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from eaft_megatron.analysis.conflicts import sample_rows, token_texts
from eaft_megatron.analysis.landscape import (
    QUADRANTS,
    average_ranks,
    fidelity,
    quadrant_of,
    shown_weights,
    summarize,
    thresholds,
)
from eaft_megatron.analysis.tokens import ScoredTokens, read_rows, read_tokens
from eaft_megatron.cli import main
from eaft_megatron.data.encoding import load_tokenizer
from eaft_megatron.data.prepared import PreparedData, write_column
from tests.analysis.columns import RECORD, write_scores


@pytest.fixture
def scored(folder) -> PreparedData:
    return write_scores(folder)


def made_up(n: int = 4000) -> ScoredTokens:
    """Tokens that need no folder."""
    generator = np.random.default_rng(3)
    entropy = generator.exponential(0.8, n).clip(0, 2.99).astype(np.float32)
    logprob = -generator.exponential(1, n).astype(np.float32)
    others = {None: (entropy * 1.1).astype(np.float32), 5: generator.random(n, np.float32), 20: entropy}
    zeros, rows = np.zeros(n, np.int32), np.arange(n, dtype=np.int64) * 41 // n
    squares = generator.random(n, np.float32)
    return ScoredTokens(zeros, rows, zeros, logprob, entropy, 20, others, RECORD, 41, squares)


def test_tokens_are_the_trained_ones(scored):
    """Row by row those of the mask, never a first token; "all" takes every other token too."""
    tokens = read_tokens(scored)
    expected = [
        (row, position, scored.tokens(row)[0][position], scored.column("ref_logprob", row)[position])
        for row in range(len(scored))
        for position in range(1, scored.lengths[row])
        if scored.tokens(row)[1][position]
    ]
    actual = list(zip(tokens.row, tokens.position, tokens.ids, tokens.logprob, strict=True))
    assert actual == expected and tokens.topk == 20
    assert len(read_tokens(scored, which="all")) == scored.lengths.sum() - len(scored)
    few = read_tokens(scored, max_tokens=len(tokens) // 3 + 1)
    assert few.rows == 8 and set(few.row) == set(range(0, 24, 3))


@pytest.mark.parametrize("percentile", [15.0, 40.0])
def test_quadrants_and_gates_by_hand(percentile):
    """Shares, losses and every gate's effect, written out in numpy from the paper's formulas."""
    tokens = made_up()
    summary = summarize(tokens, percentile)
    h, loss = tokens.entropy.astype(np.float64), -tokens.logprob.astype(np.float64)
    p = np.exp(-loss)
    a, b = np.percentile(h, percentile), np.percentile(p, percentile)
    assert summary["thresholds"] == pytest.approx({"entropy": a, "probability": b})
    inside = [(h < a) & (p < b), (h < a) & (p >= b), (h >= a) & (p < b), (h >= a) & (p >= b)]
    for (name, found), where in zip(summary["quadrants"].items(), inside, strict=True):
        assert name in QUADRANTS and found["tokens"] == where.sum()
        expected = [where.mean(), loss[where].sum() / loss.sum(), loss[where].mean(), p[where].mean(), h[where].mean()]
        keys = ("share", "loss_share", "mean_loss", "mean_probability", "mean_entropy")
        assert [found[key] for key in keys] == pytest.approx(expected, rel=1e-5)
    normal = h / math.log(20)
    weights = {
        "linear": normal,
        "alpha 2": normal**2,
        "alpha 3": normal**3,
        "sigmoid": 1 / (1 + np.exp(-30 * (normal - 0.17))),
        "threshold": (h > a).astype(float),
        "conflict mask": (~inside[0]).astype(float),
        "fixed conflict mask": 1.0 - ((normal < 0.17) & (p < 0.1)),
        "sft": np.ones_like(p),
        "sft-kl": np.ones_like(p),
        "dft": p,
        "asft": p,
        "power 8": p**8,
        "power 0.5": p**0.5,
        "power -0.5": np.minimum(p**-0.5, 10),
        "profit": (p >= 0.1).astype(float),
        "trsft": np.minimum(p / 0.1, 1),
        "deft": p**tokens.sum_p_squared,
        "stm": (1 / p <= 2.5).astype(float),
        "psft": np.ones_like(p),  # the model that scored is the one that is trained
        "iw-sft": np.ones_like(p),
        "iw-sft token": np.ones_like(p),
    }
    means = np.array([loss[tokens.row == row].mean() for row in range(41)])
    weights["talr"] = np.maximum(p ** (1 / np.median(means)), 0.01)
    weights["flow"] = np.exp(-means / np.median(means))[tokens.row]
    assert set(summary["gates"]) == set(weights)
    for name, w in weights.items():
        found = summary["gates"][name]
        assert found["mean_weight"] == pytest.approx(w.mean(), rel=1e-4)
        assert found["loss_kept"] == pytest.approx((w * loss).sum() / loss.sum(), rel=1e-4)
        for part, where in zip(QUADRANTS, inside, strict=True):
            kept = (w * loss)[where].sum()
            assert found["kept"][part] == pytest.approx(kept / loss[where].sum(), rel=1e-4, abs=1e-12)
            assert found["loss_share"][part] == pytest.approx(kept / (w * loss).sum(), rel=1e-4, abs=1e-12)


def test_shown_tokens_do_not_count(scored):
    """Among the shown tokens the trained ones have the weights of the summary, whatever else is shown; so do others."""
    tokens, rows = read_tokens(scored), [3, 0, 7]
    shown = read_rows(scored, rows, which="all")
    assert len(shown) == sum(scored.lengths[row] - 1 for row in rows)
    weights, whole = shown_weights(tokens, shown, 40), shown_weights(tokens, tokens, 40)
    assert {"talr", "flow", "stm", "conflict mask"} <= set(weights) and "deft" not in weights, "not scored"
    place = {(row, position): i for i, (row, position) in enumerate(zip(tokens.row, tokens.position, strict=True))}
    trained = [i for i, at in enumerate(zip(shown.row, shown.position, strict=True)) if at in place]
    same = [place[shown.row[i], shown.position[i]] for i in trained]
    assert 0 < len(trained) < len(shown)
    for name in weights:
        np.testing.assert_array_equal(weights[name][trained], whole[name][same])
    limit = np.percentile(tokens.entropy, 40)
    np.testing.assert_array_equal(weights["threshold"], shown.entropy > limit)


def test_fidelity_by_hand():
    """Pearson is numpy's; Spearman is Pearson of ranks in which equal values share their mean rank."""
    tokens = made_up()
    tokens.others[5][:100] = 0.25
    found = fidelity(tokens)
    full = tokens.others[None].astype(np.float64)
    for topk in (5, 20):
        values = tokens.others[topk].astype(np.float64)
        assert found[str(topk)]["pearson"] == pytest.approx(np.corrcoef(values, full)[0, 1], abs=1e-9)
        ranks = [np.array([(np.sum(v < x) + np.sum(v <= x) + 1) / 2 for x in v]) for v in (values[:300], full[:300])]
        np.testing.assert_array_equal(average_ranks(values[:300]), ranks[0])
        few = ScoredTokens(*(getattr(tokens, name) for name in ("ids", "row", "position", "logprob", "entropy")), 20,
                           {None: full[:300], topk: values[:300]}, RECORD, 1)  # fmt: skip
        assert fidelity(few)[str(topk)]["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
    assert found["20"]["spearman"] == pytest.approx(1, abs=1e-6)
    assert fidelity(made_up(1))["5"]["pearson"] is None


def test_the_folder(scored, tmp_path, capsys):
    """Four files; the JSON's conflict tables agree with a count by hand and name the tokens' own text."""
    assert main(["landscape", str(scored.path), "--output", str(tmp_path / "out"), "--percentile", "40"]) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["gates.png", "index.html", "landscape.png", "summary.json"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("gates.png", "landscape.png"))
    summary = json.loads((out / "summary.json").read_text())
    printed = capsys.readouterr().out
    assert f"{summary['quadrants']['conflict']['share']:.2%} of tokens" in printed and "top-5" in printed
    tokens, tokenizer = read_tokens(scored), load_tokenizer(scored.manifest["tokenizer"]["name"])
    limits = thresholds(tokens, 40)
    conflict = (tokens.entropy < limits["entropy"]) & (tokens.probability < limits["probability"])
    table = summary["conflict_tokens"]
    assert sum(line["conflicts"] for line in table) == conflict.sum() == summary["quadrants"]["conflict"]["tokens"]
    for line in table:
        here = tokens.ids == line["token_id"]
        assert line["text"] == tokenizer.decode([line["token_id"]])
        assert (line["conflicts"], line["occurrences"]) == ((here & conflict).sum(), here.sum())
        assert line["mean_probability"] == pytest.approx(tokens.probability[here & conflict].mean(), rel=1e-4)
        assert line["mean_entropy"] == pytest.approx(tokens.entropy[here & conflict].mean(), rel=1e-4)
    assert [line["conflicts"] for line in table] == sorted((line["conflicts"] for line in table), reverse=True)
    losses = []
    for example in summary["examples"]:
        ids = scored.tokens(example["row"])[0].tolist()
        text = tokenizer.decode(ids[max(example["position"] - 48, 0) : example["position"] + 17])
        assert example["before"] + example["token"] + example["after"] == text
        assert example["entropy"] < limits["entropy"] and example["probability"] < limits["probability"]
        losses.append(-math.log(example["probability"]))
    assert losses == sorted(losses, reverse=True)


def test_refusals(folder, tmp_path, capsys):
    """No scores; scores of two models; a percentile that is none."""
    arguments = ["landscape", str(folder), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "eaft-megatron score" in capsys.readouterr().err
    data = write_scores(folder)
    assert main([*arguments, "--percentile", "115"]) == 1
    assert "--percentile" in capsys.readouterr().err
    other = {**RECORD, "model": {**RECORD["model"], "weights_fingerprint": "other"}}
    write_column(data, "entropy", (np.zeros(n, np.float32) for n in data.lengths), other)
    assert main(arguments) == 1
    assert "not of one model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_shown(scored):
    """The rows with the most conflicts first, then others, none twice, as many as asked for or as there are."""
    tokens = read_tokens(scored)
    conflict = quadrant_of(tokens, thresholds(tokens, 40)) == 0
    counts = np.bincount(tokens.row, conflict, len(scored))
    rows = sample_rows(tokens, conflict, 10)
    assert len(rows) == len(set(rows)) == 10
    assert sorted(counts[rows[:5]]) == sorted(np.sort(counts)[-5:])
    assert sorted(sample_rows(tokens, conflict, 100)) == list(range(24))


@pytest.mark.parametrize("text", ["plain words", "größer — 日本語 🙂🙃", "", "a\n\n  b\t", "🙂"])
def test_token_texts_join_to_the_text(text):
    """Characters of several tokens come out whole, and nothing is lost or doubled."""
    from tests.data.conftest import build_tokenizer

    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert len(token_texts(tokenizer, ids[:-1])) == max(len(ids) - 1, 0)
