"""Items for the tasks in this folder, made from the novels that come with sparsekit: ``python specs/tasks/items.py``.

The tasks read the .jsonl files beside this one, through :func:`read`; making them again gives the same bytes. The
questions come from Persuasion, which sparsekit holds out of training; other novels supply wrong answers.
"""

from __future__ import annotations

import importlib.resources
import json
import lzma
import random
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HELD_OUT = "persuasion"
TITLES = {
    "emma": "Emma",
    "mansfield_park": "Mansfield Park",
    "northanger_abbey": "Northanger Abbey",
    "persuasion": "Persuasion",
    "pride_and_prejudice": "Pride and Prejudice",
    "sense_and_sensibility": "Sense and Sensibility",
}
LETTERS = "ABCD"


def read(file: str, **_: Any) -> dict[str, Any]:
    """The items of a file as lm-eval's splits: ``dev`` for few-shot examples, ``test`` for the rest."""
    from datasets import Dataset

    rows = [json.loads(line) for line in (HERE / file).read_text(encoding="utf-8").splitlines()]
    return {split: Dataset.from_list([row for row in rows if row["split"] == split]) for split in ("dev", "test")}


# --- making them


def sentences(novel: str) -> list[list[str]]:
    """A novel's paragraphs, each as its sentences."""
    packed = importlib.resources.files("sparsekit.data").joinpath("austen", f"{novel}.txt.xz").read_bytes()
    text = lzma.decompress(packed).decode("utf-8").replace("_", "")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.) (?=[A-Z])", p) for p in paragraphs if p]


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def shuffled(rng: random.Random, right: str, wrong: list[str]) -> tuple[list[str], int]:
    """The answers in an order of chance, and where the right one stands."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return choices, choices.index(right)


def last_words(rng: random.Random) -> list[dict[str, Any]]:
    """As LAMBADA: a passage whose last word stands in it before."""
    found = []
    for paragraph in sentences(HELD_OUT):
        for end in range(2, len(paragraph) + 1):
            text = " ".join(paragraph[:end])[-400:].partition(" ")[2].rstrip(".!?\"'”’")
            last = text.rpartition(" ")[2]
            if len(text) >= 120 and re.fullmatch(r"[A-Za-z]{4,}", last) and last in words(text[: -len(last)]):
                found.append({"text": text})
    return rng.sample(found, 80)


def next_sentences(rng: random.Random) -> list[dict[str, Any]]:
    """As HellaSwag: the sentence that goes on, and three from elsewhere in the novel."""
    paragraphs = sentences(HELD_OUT)
    pool = [s for p in paragraphs for s in p if 40 <= len(s) <= 120]
    found = []
    for paragraph in paragraphs:
        for first, second, right in zip(paragraph, paragraph[1:], paragraph[2:], strict=False):
            context = f"{first} {second}"
            if 60 <= len(context) <= 220 and 40 <= len(right) <= 120:
                endings, label = shuffled(rng, right, rng.sample([s for s in pool if s not in paragraph], 3))
                found.append({"context": context, "endings": endings, "label": label})
    return rng.sample(found, 80)


def missing_words(rng: random.Random) -> list[dict[str, Any]]:
    """As ARC: a question with four answers, named by letters."""
    flat = [s for p in sentences(HELD_OUT) for s in p if 60 <= len(s) <= 200]
    known = sorted({w for s in flat for w in words(s) if len(w) >= 5 and w.islower()})
    found = []
    for sentence in flat:
        said = words(sentence)
        candidates = [w for w in said if len(w) >= 5 and w.islower() and said.count(w) == 1]
        if candidates:
            word = rng.choice(candidates)
            question = re.sub(rf"\b{word}\b", "____", sentence)
            texts, at = shuffled(rng, word, rng.sample([w for w in known if w not in said], 3))
            choices = {"label": list(LETTERS), "text": texts}
            found.append({"question": question, "choices": choices, "answerKey": LETTERS[at]})
    return rng.sample(found, 80)


def of_which_novel(rng: random.Random) -> list[dict[str, Any]]:
    """As MMLU: sentences, and the novel that they stand in."""
    found = []
    for novel in TITLES:
        flat = [s for p in sentences(novel) for s in p if 60 <= len(s) <= 160]
        for sentence in rng.sample(flat, 10):
            others = [title for name, title in TITLES.items() if name != novel]
            choices, answer = shuffled(rng, TITLES[novel], rng.sample(others, 3))
            found.append({"question": f'Which novel says: "{sentence}"', "choices": choices, "answer": answer})
    rng.shuffle(found)
    return found


def of_whose_name(rng: random.Random) -> list[dict[str, Any]]:
    """As MMLU: names, and the only novel that they stand in often."""
    counts: dict[str, dict[str, int]] = {}
    for novel in TITLES:
        for paragraph in sentences(novel):
            for sentence in paragraph:
                for word in words(sentence)[1:]:
                    if word.istitle() and len(word) >= 4:
                        counts.setdefault(word, {})[novel] = counts.get(word, {}).get(novel, 0) + 1
    found = []
    for name, of in sorted(counts.items()):
        novel = max(of, key=lambda each: of[each])
        if of[novel] >= 20 and sum(of.values()) == of[novel]:
            others = [title for key, title in TITLES.items() if key != novel]
            choices, answer = shuffled(rng, TITLES[novel], rng.sample(others, 3))
            found.append({"question": f"Which novel speaks of {name}?", "choices": choices, "answer": answer})
    return rng.sample(found, 60)


MAKERS = {
    "lambada.jsonl": last_words,
    "hellaswag.jsonl": next_sentences,
    "arc.jsonl": missing_words,
    "mmlu_sentences.jsonl": of_which_novel,
    "mmlu_names.jsonl": of_whose_name,
}


def make(folder: Path) -> None:
    """Writes every file; the first five items of each are examples."""
    for name, maker in MAKERS.items():
        rows = [{"split": "dev" if n < 5 else "test", **row} for n, row in enumerate(maker(random.Random(name)))]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    make(HERE)
