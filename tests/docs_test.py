"""The documentation names what the code has: run keys, verbs, and files that exist."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def difference(what, documented, real):
    if documented - real:
        yield f"{what}: documented, but not in the code: {', '.join(sorted(documented - real))}"
    if real - documented:
        yield f"{what}: not documented: {', '.join(sorted(real - documented))}"


def run_keys():
    source = read("moesaic/train/run_config.cpp")
    table = re.search(r"Json json\{(.*?)\};\n", source, re.DOTALL).group(1)
    keys = set(re.findall(r'^ *\{"(\w+)", ', table, re.MULTILINE) + re.findall(r'visit\("(\w+)", ', source))
    eval_keys = re.findall(r'\{"(\w+)", ', re.search(r'\{"eval", \{(.*?)\}\},\n', table).group(1))
    router = re.search(r"struct RouterConfig \{(.*?)\n\};", read("moesaic/adapters/adapter.h"), re.DOTALL).group(1)
    router_keys = re.findall(r"^  [\w:]+ (\w+) = ", router, re.MULTILINE)
    return keys - {"eval"} | {"router.dtype"} | {
        f"router.{key}" for key in router_keys} | {f"eval.{key}" for key in eval_keys}


def verbs():
    table = re.search(r"kVerbs\[\] = \{(.*?)\n\};", read("cli/main.cpp"), re.DOTALL).group(1)
    return set(re.findall(r'\{"(\w+)", ', table))


def missing_files(page):
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:md|cpp|h|py|yaml|txt))`", read(page)):
        if not any((root / path).exists() for root in (ROOT, ROOT / "moesaic")):
            yield f"{page}: names {path}, which does not exist"


def main():
    problems = list(difference("docs/config.md", set(re.findall(r"^\| `([\w.]+)`", read("docs/config.md"), re.MULTILINE)),
                               run_keys()))
    problems += difference("docs/cli.md", set(re.findall(r"^## moesaic (\w+)", read("docs/cli.md"), re.MULTILINE)), verbs())
    for page in ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]:
        problems += missing_files(page)
    print("\n".join(problems) or "the documentation fits the code")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
