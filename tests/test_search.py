"""Words that users look for find their page: in the index of words, and in the site's search."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

#: What people type into a search, and the page that they are looking for.
WORDS = {
    "DDP": "distributed",
    "FSDP": "distributed",
    "torchrun": "distributed",
    "multi-GPU": "distributed",
    "amp": "grad-scaler",
    "autocast": "grad-scaler",
    "DeepSpeed": "migrating",
    "Apex": "migrating",
    "NaN": "faq",
    "diverges": "faq",
    "BF16": "faq",
    "bfloat16": "faq",
    "clip_grad_norm_": "quickstart",
    "scheduler": "quickstart",
    "SAM": "quickstart",
    "LBFGS": "quickstart",
    "resume": "checkpoints",
    "state_dict": "checkpoints",
    "EMA": "master-weights",
    "OOM": "master-weights",
    "LoRA": "trainers",
    "Hugging Face": "trainers",
    "Lightning": "trainers",
    "micro-batch": "accumulation",
    "wandb": "monitoring",
    "TensorBoard": "monitoring",
    "skipped step": "monitoring",
    "BatchNorm": "policies",
    "torch.compile": "compatibility",
    "Muon": "grad-scaler",
    "benchmark": "benchmark",
    "deterministic": "numerics",
    "Windows": "installing",
    "conda": "installing",
    "Triton version": "versions",
    "8-bit": "others",
    "CUDA graph": "fused",
    "H100": "gpu",
    "CLI": "cli",
    "deprecation": "policy",
}


def rows():
    text = (DOCS / "words.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (.*?) \| \[.*?\]\((\S+?)\) \|$", text, re.M)


def has(text, phrase):
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.I) is not None


@pytest.mark.parametrize(("word", "page"), WORDS.items(), ids=WORDS)
def test_a_word_leads_to_its_page(word, page):
    led = {target.split("#")[0] for words, target in rows() if has(words, word)}
    assert f"{page}.md" in led


def test_every_row_of_words_leads_somewhere():
    assert len(rows()) > 30
    for _, target in rows():
        name = target.split("#")[0]
        assert name.startswith("https://") or (DOCS / name).is_file()


def test_the_search_takes_words_apart_as_people_type_them():
    separator = re.search(r"^      separator: '(.*)'$", (ROOT / "mkdocs.yml").read_text(), re.M)[1]
    found = re.split(separator, "torch.cuda.amp DistributedDataParallel clip_grad_norm_ 3.9")
    words = {word for word in found if word}
    assert {"amp", "Distributed", "Parallel", "clip", "norm", "3.9"} <= words


def test_every_page_is_in_the_navigation_once():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r"(\S+\.md)$", text[text.index("nav:") : text.index("validation:")], re.M)
    assert sorted(named) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))
