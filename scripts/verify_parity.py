"""Check a system against tensors of the authors' own code: python scripts/verify_parity.py rectok FOLDER

Prints a table and one summary line; exits with 1 if any tensor is off or was not computed.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokenizers_lab.errors import TokenizersLabError
from tokenizers_lab.parity import summary, verify

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("system", help="name of the system, such as rectok")
parser.add_argument("folder", type=Path, help="folder with config.json, weights, io.safetensors and tolerance.json")
args = parser.parse_args()

try:
    checks = verify(args.system, args.folder)
except TokenizersLabError as error:
    sys.exit(f"{type(error).__name__}: {error}")

table = Table("tensor", "shape", "max error", "tolerance", "verdict")
for check in checks:
    error = "" if check.error is None else f"{check.error:.1e}"
    tolerance = "" if check.verdict == "input" else f"{check.tolerance:g}" if check.tolerance else "equal"
    verdict = f"[red]{check.verdict}[/]" if check.failed else check.verdict
    table.add_row(check.name, str(list(check.shape)).replace("[", r"\["), error, tolerance, verdict)
Console(width=120 if not sys.stdout.isatty() else None).print(table)
print(f"{args.system}: {summary(checks)}")
sys.exit(any(check.failed for check in checks))
