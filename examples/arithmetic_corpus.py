"""A small corpus and its questions, the same in every run, for 5_from_a_text_corpus.sh.

python examples/arithmetic_corpus.py FOLDER

corpus.jsonl     4000 texts: a question and, on the next line, its answer. One answer in four is wrong by one.
prompts.jsonl    questions to train on, with the right answer
held_out.jsonl   the others: each sum or difference is asked for in two ways, and of some only one was trained on
"""

import json
import random
import sys
from pathlib import Path

LARGEST = 5
PHRASES = {
    "+": ("What is {} plus {} ?", "Take {} and add {} ."),
    "-": ("What is {} minus {} ?", "Take {} and subtract {} ."),
}
NUM_TEXTS = 4000


def questions() -> list[tuple[str, int, bool]]:
    """(question, right answer, whether it is held out), every third fact in one of its two phrases."""
    numbers = range(LARGEST + 1)
    facts = [(a, "+", b, a + b) for a in numbers for b in numbers]
    facts += [(a, "-", b, a - b) for a in numbers for b in range(a + 1)]
    made = []
    for i, (a, sign, b, answer) in enumerate(facts):
        held_out = i // 3 % 2 if i % 3 == 0 else None
        made += [(phrase.format(a, b), answer, j == held_out) for j, phrase in enumerate(PHRASES[sign])]
    return made


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw, asked = random.Random(0), questions()
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for _ in range(NUM_TEXTS):
            question, answer, _ = draw.choice(asked)
            if draw.random() < 0.25:
                answer += 1
            file.write(json.dumps({"text": f"{question}\n{answer}"}) + "\n")
    for name, wanted in (("prompts", False), ("held_out", True)):
        lines = [{"prompt": q, "answer": str(answer)} for q, answer, held_out in asked if held_out is wanted]
        text = "".join(json.dumps({**line, "task": "arithmetic"}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} questions")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: arithmetic_corpus.py FOLDER")
    write(Path(sys.argv[1]))
