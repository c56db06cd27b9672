"""The README's tree names every file of the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tree_names_every_module_and_tool() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree")[1].split("```")[1]
    top = folder = ""
    named = set()
    for line in tree.strip("\n").splitlines():
        depth = len(line) - len(line.lstrip())
        entries = re.split(r"\s{2,}", line.strip())[0].split(", ")
        if depth == 0:
            top = folder = entries[0]
        elif depth == 2 and entries[0].endswith("/"):
            folder = top + entries[0]
        else:
            named |= {(top if depth == 2 else folder) + entry for entry in entries}
    files = [*(ROOT / "megatron_jam").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    files += (ROOT / "megatron_jam").rglob("*.jinja")
    real = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    assert real - named == set(), "name these in the README's tree"
    gone = {n for n in named if n.startswith(("megatron_jam", "tools")) and n not in real}
    assert gone == set(), "the README's tree names what is not there"


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
