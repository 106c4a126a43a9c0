"""fastscore report."""

import argparse

from fastscore.cli import html_report
from fastscore.cli.options import Commands, add_command, check_folder, wrote
from fastscore.scoring.scores import Scores


def add(commands: Commands) -> None:
    """The command and its options."""
    command = add_command(
        commands, "report", run, "a page to look at scores in a browser",
        "Write scores as one HTML file that opens without a network: sortable layers, their importances, and which\n"
        "channels would go at a budget.",
        "fastscore report scores.safetensors --out scores.html\n"
        "fastscore report scores.safetensors --fraction 0.5 --title 'ResNet-50, photos of May' --out scores.html")
    command.add_argument("scores", metavar="SCORES", help="scores from `fastscore score --out`")
    command.add_argument("--out", metavar="HTML", default="fastscore-report.html", help="default: %(default)s")
    command.add_argument("--fraction", type=float, default=0.3, metavar="SHARE",
                         help="share of the channels that the page shows as going at first (default: %(default)s)")
    command.add_argument("--title", default="Channel scores", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Read scores, write the page."""
    check_folder(arguments.out)
    html_report.write(Scores.load(arguments.scores), arguments.out, title=arguments.title, fraction=arguments.fraction)
    wrote(arguments.out)
