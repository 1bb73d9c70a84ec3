"""The README and the pages as GitHub shows them: the shortest way to a fine-tune, links, figures, no directives."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from test_docs import DOCS, PAGES, ROOT, whole
from test_theory_docs import anchors

sys.path.insert(0, str(DOCS))

import measured

README = (ROOT / "README.md").read_text(encoding="utf-8")


def small_gpt2(folder: Path) -> None:
    """What ``from_pretrained("gpt2")`` finds before it asks for the hub: two layers, and tokens that are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)


def test_a_regularized_fine_tune_takes_less_than_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    section = README.partition("## Hugging Face")[2].partition("\n## ")[0]
    install, code = re.findall(r"^```(?:sh|py)\n(.*?)^```", section, re.S | re.M)
    assert install.startswith("pip install") and "[integrations]" in install
    assert len([line for line in (install + code).splitlines() if line.strip()]) < 10
    monkeypatch.chdir(tmp_path)
    small_gpt2(tmp_path / "gpt2")
    (tmp_path / "train.txt").write_text("".join(f"a line of {n * 'a'} text\n" for n in range(16)))
    namespace: dict[str, object] = {"__name__": "page"}
    exec(compile(code, "README.md", "exec", dont_inherit=True), namespace)
    trainer = namespace["trainer"]
    # Three epochs of two batches.
    assert trainer.state.global_step == 6
    assert trainer.regularizer.metrics["fastreg/grad_norm"] > 0 and trainer.regularizer.micro_batch_size == 4


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)\s]+)\)", README))))
def test_links_of_the_readme_lead_to_files_and_headings(target: str) -> None:
    path, _, anchor = target.partition("#")
    assert (ROOT / path).exists() and (not anchor or anchor in anchors(whole(ROOT / path)))


@pytest.mark.parametrize("path", measured.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_figures_are_those_of_the_results(path: Path) -> None:
    """Otherwise: ``python docs/measured.py``."""
    text = path.read_text(encoding="utf-8")
    assert measured.current(text, measured.figures()) == text


def test_figures_are_read_from_results(tmp_path: Path) -> None:
    own = {"part": "penalty", "model": "mlp", "m": 8, "curve": None}
    timed = [{**own, "method": name, "ratio": {"p50": p50}} for name, p50 in (("a", 9.994), ("b", 10))]
    other = [{**timed[0], "curve": "by depth", "ratio": {"p50": 3}}, {**timed[0], "ratio": None}]
    growth = {"plain": 2**21, "x, y": 3 * 2**20}
    rows = [{"method": name, "depth": d, "bytes": size * d} for name, size in growth.items() for d in (1, 2, 4)]
    old = [{**row, "ratio": {"p50": 7}} for row in timed]
    for name, day, document in (
        ("a", 2, {"schema": 2, "rows": timed + other}),
        ("b", 1, {"schema": 2, "rows": old}),
        ("memory", 3, {"rows": rows}),
    ):
        (tmp_path / f"cpu-{name}.json").write_text(json.dumps({**document, "machine": {"date": f"2000-01-0{day}"}}))
    found = measured.figures(tmp_path)
    a, b, block, share = "mlp_8.a -->", "mlp_8.b -->", "x_y.block -->", "x_y.to_plain -->"
    text = f"| <!-- penalty.{a} | 1<!-- penalty.{b} (?<!-- memory.{block} <!-- memory.{share}"
    wanted = f"| 9.99<!-- penalty.{a} | 10.0<!-- penalty.{b} (3.0<!-- memory.{block} 1.50<!-- memory.{share}"
    assert measured.current(text, found) == wanted


@pytest.mark.parametrize("name", [name for name in PAGES if not name.startswith("api/") and name != "benchmarks.md"])
def test_pages_can_be_read_on_github(name: str) -> None:
    """Where comments are not shown, directives and roles are shown as they are written."""
    shown = re.sub(r"<!--.*?-->|\$`.*?`\$|^\$\$$.*?^\$\$$", "", PAGES[name], flags=re.S | re.M)
    assert not re.search(r"^```\{|\{[\w:]+\}`|\{\{", shown, re.M)
