"""From the repository's root:

    python -m benchmarks.reproduction prepare TRAIN.txt VALIDATION.txt TEXT   # a vocabulary of 32,768 and token shards
    python -m benchmarks.reproduction run TEXT OUT [--studies depth …] [--jobs 14] [--minutes 9]
    python -m benchmarks.reproduction write OUT                               # tables, verdicts, figures, HTML reports
    python -m benchmarks.reproduction pieces TEXT PIECES [--length 128]       # a control: that text in shuffled pieces

`run` takes the runs of all studies into one pool of processes that share the GPU, the first seed of every variant
first. It goes on where it was stopped, and packs what is finished into OUT/<study>.tar.xz, without checkpoints; from
such files it goes on too. `--set base.train.max_steps=600` changes every study named. `write` needs nothing else, and
leaves this repository's page alone unless it is told to fill it: --page benchmarks/REPRODUCTION.md --figures
benchmarks/reproduction.
"""

from __future__ import annotations

import argparse
import math
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.reproduction.page import write
from benchmarks.reproduction.pool import run
from benchmarks.reproduction.protocol import STUDIES, in_pieces, prepare
from sparsekit.errors import SparsekitError


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduction", description=__doc__, formatter_class=how)
    verbs = parser.add_subparsers(required=True)
    first = verbs.add_parser("prepare", help="text to token shards")
    for name in ("train", "validation", "text"):
        first.add_argument(name, type=Path)
    first.add_argument("--tokens", type=int, default=20_500_000, help="of training text, to the end of a document")
    first.add_argument("--vocabulary", type=int, default=32768)
    first.add_argument("--separator", default="\x1e", help="the line that divides documents (the character 1e)")
    first.set_defaults(do=prepare)
    second = verbs.add_parser("run", help="the studies")
    second.add_argument("text", type=Path)
    second.add_argument("out", type=Path)
    second.add_argument("--studies", dest="names", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    second.add_argument("--jobs", type=int, default=14, help="processes that share the GPU")
    second.add_argument("--minutes", type=float, default=math.inf, help="in which it stops and packs what is done")
    second.add_argument("--set", dest="sets", action="append", default=[], metavar="PATH=VALUE")
    second.set_defaults(do=run)
    third = verbs.add_parser("write", help="tables, verdicts, figures, reports")
    third.add_argument("out", type=Path)
    third.add_argument("--page", type=Path, help="that is filled; OUT/REPRODUCTION.md if not told")
    third.add_argument("--figures", type=Path, help="a folder; OUT/figures if not told")
    third.set_defaults(do=write)
    fourth = verbs.add_parser("pieces", help="a text's training tokens in pieces that are shuffled")
    fourth.add_argument("text", type=Path)
    fourth.add_argument("pieces", type=Path)
    fourth.add_argument("--length", type=int, default=128, help="of a piece, in tokens")
    fourth.add_argument("--seed", type=int, default=0)
    fourth.set_defaults(do=in_pieces)
    given = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is at work is stopped and packed
    try:
        sys.exit(1 if given.pop("do")(**given) else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except SparsekitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:  # which has said what it had to
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
