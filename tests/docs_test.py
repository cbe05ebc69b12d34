"""The documentation names what the code has: run keys, verbs, files that exist, and what stands in their lines."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = pathlib.Path(os.environ.get("MOESAIC_BUILD_DIR", ROOT / "build")) / "moesaic"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def difference(what, documented, real):
    if documented - real:
        yield f"{what}: documented, but not in the code: {', '.join(sorted(documented - real))}"
    if real - documented:
        yield f"{what}: not documented: {', '.join(sorted(real - documented))}"


def run_keys():
    """The tables of docs/config.md as the program prints them."""
    return subprocess.run([str(PROGRAM), "train", "--keys"], capture_output=True, text=True, check=True).stdout


def verbs():
    table = re.search(r"kVerbs\[\] = \{(.*?)\n\};", read("cli/main.cpp"), re.DOTALL).group(1)
    return set(re.findall(r'\{"(\w+)", ', table))


def missing_files(page):
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:md|cpp|h|py|yaml|txt))`", read(page)):
        if not any((root / path).exists() for root in (ROOT, ROOT / "moesaic")):
            yield f"{page}: names {path}, which does not exist"


def moved_lines(page):
    """Links like [`struct Sites`](../moesaic/nn/site.h#L115): what they show stands in that line."""
    for text, path, line in re.findall(r"\[`([^`]+)`\]\(([^)#]+)#L(\d+)\)", read(page)):
        file = ((ROOT / page).parent / path).resolve()
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found = [number for number, content in enumerate(lines, 1) if text in content]
        if int(line) not in found:
            yield f"{page}: {path}#L{line} should have `{text}`, which stands in {found[:3] or 'none'} of its lines"


def main():
    problems = []
    if not read("docs/config.md").endswith(run_keys()):
        problems.append("docs/config.md: its tables are not what `moesaic train --keys` prints")
    problems += difference("docs/cli.md", set(re.findall(r"^## moesaic (\w+)", read("docs/cli.md"), re.MULTILINE)), verbs())
    for page in ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]:
        problems += missing_files(page)
        problems += moved_lines(page)
    print("\n".join(problems) or "the documentation fits the code")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
