"""The command line: a file for each command, and the options that they share."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastscore import __version__, interrupts
from fastscore.cli import bench, compare, curve, demo, info, needs, prune, report, score
from fastscore.cli.parsers import Parser
from fastscore.cli.processes import ProcessLostError
from fastscore.cli.spelling import as_options, in_one_line

EXAMPLES = """examples:
  fastscore demo
  fastscore score torchvision:mobilenet_v2 --weights DEFAULT --images photos --out scores.safetensors
  fastscore report scores.safetensors --out scores.html
  fastscore prune torchvision:mobilenet_v2 --weights DEFAULT --images photos --macs 0.7 --out small.pt2
  fastscore curve torchvision:mobilenet_v2 --weights DEFAULT --images photos --plot curve.png
  fastscore COMMAND --help has more of each

exit codes: 0 done, 1 an error in the model or in fastscore (with a traceback) or in another process, 2 input that
cannot be used, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 2 for input that cannot be used, 1 where another process was lost
    (one line on stderr); 130 when interrupted.

    What fastscore did not raise itself (an error inside the user's model, say) keeps its traceback; Python's own exit
    code is then 1.
    """
    typed, known = sys.argv[1:] if argv is None else argv, frozenset[str]()
    try:
        interrupts.raise_again()
        arguments = parser().parse_args(typed)
        known = arguments.parser.options
        needs.check(arguments, typed)
        with in_one_line(partial(as_options, known=known, typed=typed)):
            arguments.run(arguments)
    except (ValueError, TypeError, FloatingPointError, ImportError, OSError, ProcessLostError) as error:
        if not _raised_here(error):
            raise
        text = "; ".join(line.strip() for line in str(error).splitlines())
        print(f"fastscore: error: {as_options(text, known, typed)}", file=sys.stderr)
        return 1 if isinstance(error, ProcessLostError) else 2
    except KeyboardInterrupt:
        print(interrupts.SAID, file=sys.stderr)
        return interrupts.EXIT_CODE
    return 0


def _raised_here(error: BaseException) -> bool:
    """Whether the error comes from a line of fastscore's own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])


def parser() -> Parser:
    """Every command and option."""
    top = Parser("fastscore", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES,
                 description="Which channels of a trained network matter, without labels, and a smaller network "
                 "without the rest.")
    top.add_argument("--version", action="version", version=f"fastscore {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, score, prune, curve, compare, report, bench, info):
        command.add(commands)
    return top
