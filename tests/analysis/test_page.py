"""The page of `eaft-megatron landscape`, used in a real headless browser."""

from __future__ import annotations

import json
import math
import os
import re

import pytest

from eaft_megatron.analysis.html import write_page
from eaft_megatron.analysis.landscape_files import page_samples, write_landscape
from eaft_megatron.analysis.tokens import read_tokens
from eaft_megatron.data.encoding import load_tokenizer
from tests.analysis.browser import MISSING, open_browser
from tests.analysis.columns import write_scores

needs_browser = pytest.mark.skipif(bool(MISSING), reason=str(MISSING))


@pytest.fixture
def page(folder, tmp_path):
    """(data, tokenizer, summary, path of the page)."""
    data = write_scores(folder)
    tokenizer = load_tokenizer(data.manifest["tokenizer"]["name"])
    summary = write_landscape(data, tokenizer, tmp_path / "out", percentile=40, samples=12)
    return data, tokenizer, summary, tmp_path / "out" / "index.html"


def test_nothing_comes_from_outside(page):
    """No address, and no element that could fetch one; the pictures are in the page."""
    text = page[3].read_text()
    assert not re.search(r"https?://|<link|<iframe|<script[^>]+src|@import|url\(", text)
    assert re.findall(r'<img [^>]*src="([^"]{22})', text) == ["data:image/png;base64,"] * 2
    assert "default-src 'none'" in text and "@" not in re.sub(r"<script.*?</script>|@media|@page", "", text, flags=re.S)


@needs_browser
def test_clicking_a_sample_shows_its_tokens(page):
    """Each sample's text and colours, a tooltip with its p, H and w under every gate, and a quiet console."""
    data, tokenizer, summary, path = page
    with open_browser() as browser:
        browser.open(path.as_uri())
        buttons = browser.find("#list button")
        assert len(buttons) == 12
        content = json.loads(browser.run("return document.getElementById('content').textContent"))
        for number in (3, 0):
            browser.click(buttons[number])
            sample = content["samples"][number]
            (expected,) = page_samples(data, tokenizer, read_tokens(data), [sample["row"]], summary)
            assert sample == expected
            spans = browser.find("#tokens span")
            assert len(spans) == data.lengths[sample["row"]]
            shown = browser.run("return document.getElementById('tokens').textContent")
            assert shown == tokenizer.decode(data.tokens(sample["row"])[0].tolist())
            pressed = "return [...document.querySelectorAll('#list button')].map(b => b.getAttribute('aria-current'))"
            assert browser.run(pressed) == [str(i == number).lower() for i in range(12)]
            check_tooltips(browser, spans, sample, summary)
        check_colors(browser, content["samples"][0], summary)
        assert browser.run("return performance.getEntriesByType('resource').map(e => e.name)") == []
        assert browser.messages() == []


def check_tooltips(browser, spans, sample, summary) -> None:
    """Under each of the gates; the tokens of the batch decide TALR's median and the percentiles."""
    index = next(i for i, flag in enumerate(sample["trained"]) if flag and sample["texts"][i].strip())
    p, h = sample["p"][index], sample["h"][index]
    normal = h / math.log(summary["topk"])
    assert browser.run("return [...document.getElementById('gate').options].map(o => o.value)") == [*summary["gates"]]
    weights = {
        "linear": normal,
        "sigmoid": 1 / (1 + math.exp(-30 * (normal - 0.17))),
        "threshold": float(h > summary["thresholds"]["entropy"]),
        "dft": p,
        "trsft": min(1, p / 0.1),
        "stm": float(1 / p <= 2.5),
        "psft": 1.0,
    }
    for gate, weight in weights.items():
        select = f"const s = document.getElementById('gate'); s.value = '{gate}'; s.dispatchEvent(new Event('change'))"
        browser.run(select)
        spans = browser.find("#tokens span")
        browser.hover(spans[0])
        browser.hover(spans[index])
        text = browser.run("const t = document.getElementById('tip'); return t.hidden ? null : t.textContent")
        numbers = dict(re.findall(r"^(p|H|w) (\S+)", text, flags=re.M))
        assert {name: float(value) for name, value in numbers.items()} == pytest.approx(
            {"p": p, "H": h, "w": weight}, rel=1e-3
        )
        assert json.dumps(sample["texts"][index], ensure_ascii=False) in text
    browser.run("const s = document.getElementById('gate'); s.value = 'linear'; s.dispatchEvent(new Event('change'))")


def check_colors(browser, sample, summary) -> None:
    """Orange below a weight of a half, blue above; outlines are the conflicts of the trained tokens."""
    script = "return [...document.querySelectorAll('#tokens span')].map(s => [s.className, s.style.background])"
    found = browser.run(script)
    limits = summary["thresholds"]
    conflicts = 0
    for (name, color), p, h, trained in zip(found, sample["p"], sample["h"], sample["trained"], strict=True):
        if p is None or not trained:
            assert (name, color) == ("plain", "")
            continue
        weight = h / math.log(summary["topk"])
        assert color.startswith("rgba(217, 95, 2" if weight < 0.5 else "rgba(31, 119, 180")
        is_conflict = h < limits["entropy"] and p < limits["probability"]
        assert name == ("conflict" if is_conflict else "")
        conflicts += is_conflict
    assert conflicts == len(sample["conflict"]) > 0


@needs_browser
def test_hostile_text_stays_text(page, tmp_path):
    """Token texts and names that look like markup or like the page's own placeholders change nothing."""
    data, tokenizer, summary, _ = page
    evil = "</script><script>document.title='gone'</script><!--<b>@CONTENT@@TITLE@\u2028"
    (sample,) = page_samples(data, tokenizer, read_tokens(data), [0], summary)
    sample["texts"][0], sample["source"] = evil, evil
    line = {"text": evil, "conflicts": 1, "occurrences": 1, "mean_probability": 0.1, "mean_entropy": 0.1}
    example = {**summary["examples"][0], "token": evil, "before": evil}
    hostile = {**summary, "data": evil, "model": evil, "conflict_tokens": [line], "examples": [example]}
    write_page(tmp_path / "evil.html", hostile, [sample], [])
    with open_browser() as browser:
        browser.open((tmp_path / "evil.html").as_uri())
        assert browser.run("return document.title") == f"Landscape of {os.path.basename(evil)}"
        assert browser.run("return document.querySelector('#tokens span').textContent") == evil
        assert browser.run("return document.querySelectorAll('script').length") == 2
        assert browser.messages() == []
