"""Datasets that the rule for suggested rates was not made on, from what any Debian machine has, as CSV files.

    apt-get update && apt-get install -y fortunes
    python recipes/benchmarks/debian_tasks.py runs/debian_tasks
    python recipes/benchmarks/lr_suggestions.py curves --data runs/debian_tasks --tasks debian-topics.csv

A package's short description says its section (all that are large enough, or twelve that are topics), or whether it
is a program for the terminal or for windows; a fortune cookie says which jar it comes from. The figures in README.md
here are of Debian 12.
"""

import argparse
import csv
import random
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

FORTUNES = Path("/usr/share/games/fortunes")
TOPICS = "games science net mail graphics sound web editors database math electronics admin".split()
GRAPHICAL, TERMINAL = ("graphical", "x11"), ("commandline", "text-mode", "shell")
Rows = list[tuple[str, str]]


def packages() -> list[tuple[str, str, str]]:
    """Short description, section and tags of each package; of packages with the same description, the first."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    found: dict[str, tuple[str, str, str]] = {}
    for block in listed.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*(?:\n .*)*)", block, flags=re.MULTILINE))
        if "Description" in fields and "Section" in fields:
            description = " ".join(fields["Description"].split())
            found.setdefault(description.lower(), (description, fields["Section"], fields.get("Tag", "")))
    rows = list(found.values())
    random.Random(0).shuffle(rows)
    return rows


def interface(tags: str) -> str | None:
    """Whether a program is for windows or for the terminal; None for both, neither and what is no program."""
    graphical = any(f"interface::{name}" in tags for name in GRAPHICAL)
    terminal = any(f"interface::{name}" in tags for name in TERMINAL)
    if "role::program" not in tags or graphical == terminal:
        return None
    return "graphical" if graphical else "terminal"


def fortunes() -> Rows:
    """The fortune cookies of the twenty largest jars; of copies, the last."""
    jars = [path for path in sorted(FORTUNES.iterdir()) if "." not in path.name and path.name != "translate-me"]
    cookies = {}
    for jar in jars:
        for cookie in jar.read_text(encoding="utf8", errors="replace").split("\n%\n"):
            text = " ".join(cookie.replace("\b", "").split())
            if 20 < len(text) < 600:
                cookies[text] = jar.name
    largest = {jar for jar, _ in Counter(cookies.values()).most_common(20)}
    rows = [(text, jar) for text, jar in cookies.items() if jar in largest]
    random.Random(2).shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the CSV files go")
    folder = parser.parse_args().folder
    if shutil.which("apt-cache") is None or not FORTUNES.is_dir():
        parser.error(f"apt-cache and {FORTUNES} are needed: run this on Debian, with the package fortunes installed")
    rows = packages()
    sizes = Counter(section for _, section, _ in rows)
    tasks: dict[str, Rows] = {
        "debian-sections": [(text, section) for text, section, _ in rows if sizes[section] >= 100][:12000],
        "debian-topics": [(text, section) for text, section, _ in rows if section in TOPICS][:8000],
        "debian-interface": [(text, kind) for text, _, tags in rows if (kind := interface(tags))],
        "fortunes": fortunes()[:9000],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, labelled in tasks.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *labelled])
        print(f"{name}: {len(labelled):,} rows, {len({label for _, label in labelled})} classes")


if __name__ == "__main__":
    main()
