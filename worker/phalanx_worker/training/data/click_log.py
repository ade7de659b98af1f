"""`python -m phalanx_worker.training.data.click_log --rows 100000 OUT.tsv`: a click log in Criteo's format whose chance
of a click is known, line by line, so that it can be checked whether a model learned it.

Owns the structure: a click's log-odds are a constant, plus what some counts add (a multiple of log(1 + count)), plus
what each word of some categories adds, plus the product of hidden vectors of two words. The other columns mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phalanx_worker.training.data.criteo import CATEGORIES, COUNTS

TELLING_COUNTS, TELLING_WORDS = 4, 6  # the first so many columns
HIDDEN = 3  # size of the vectors whose products count, of categories 0 and 1
CONSTANT = -1.0
CHUNK = 8192

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Clicks:
    """Lines: `counts` (rows, 13) and `words` (rows, 26) as whole numbers, `chances` (rows,) of a click, and `labels`
    (rows,), 0 or 1, drawn from them."""

    counts: Words
    words: Words
    chances: Floats
    labels: Words

    @property
    def best_loss(self) -> float:
        """The mean log loss, in nats, of who knows the chances: no model does better, but by luck."""
        return loss_of(self.chances, self.labels)

    @property
    def base_loss(self) -> float:
        """The same of who knows the share of clicks alone: the entropy of the base rate."""
        return loss_of(np.full(len(self.labels), self.labels.mean()), self.labels)


def loss_of(chances: Floats, labels: Words) -> float:
    """Mean log loss of predicted chances, in nats."""
    return float(-np.mean(np.log(np.where(labels == 1, chances, 1 - chances))))


def clicks(rows: int, *, values: int = 100, seed: int = 0) -> Clicks:
    """So many lines, the words of a category drawn from `values` with frequencies 1, 1/2, 1/3, …. The structure follows
    from `seed`, too."""
    draw = np.random.default_rng(seed)
    per_count = draw.choice([-0.5, 0.5], size=TELLING_COUNTS)
    per_word = draw.normal(0.0, 0.7, size=(TELLING_WORDS, values))
    hidden = draw.normal(0.0, 0.7, size=(2, values, HIDDEN))

    counts = np.floor(np.exp(draw.normal(1.0, 1.0, size=(rows, COUNTS)))).astype(np.int64)
    frequencies = 1 / np.arange(1, values + 1)
    words = draw.choice(values, size=(rows, CATEGORIES), p=frequencies / frequencies.sum())
    odds = CONSTANT + (np.log1p(counts[:, :TELLING_COUNTS]) - 1.3) @ per_count
    odds += sum(per_word[column][words[:, column]] for column in range(TELLING_WORDS))
    odds += (hidden[0][words[:, 0]] * hidden[1][words[:, 1]]).sum(axis=1)
    chances = 1 / (1 + np.exp(-odds))
    return Clicks(counts, words, chances, (draw.random(rows) < chances).astype(np.int64))


def write(log: Clicks, path: Path) -> None:
    """As text: label, counts, and words of 8 hexadecimal digits, separated by tabs."""
    with open(path, "w") as stream:
        for begin in range(0, len(log.labels), CHUNK):
            part = slice(begin, begin + CHUNK)
            lines = zip(log.labels[part].tolist(), log.counts[part].tolist(), log.words[part].tolist(), strict=True)
            stream.writelines(_line(*line) for line in lines)


def _line(label: int, counts: list[int], words: list[int]) -> str:
    return "\t".join((str(label), *map(str, counts), *(f"{word:08x}" for word in words))) + "\n"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="click_log", description="Write a click log whose structure is known.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--values", type=int, default=100, help="different words per category")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("out", type=Path, metavar="OUT.tsv")
    args = parser.parse_args(arguments)
    log = clicks(args.rows, values=args.values, seed=args.seed)
    write(log, args.out)
    print(f"{args.rows} lines, {log.labels.mean():.1%} clicks")
    print(f"loss of the base rate {log.base_loss:.4f}, best possible {log.best_loss:.4f} (nats)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
