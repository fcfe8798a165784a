"""Which Penumbra this is: its version, and the commit that it was made from."""

import os
import subprocess
from pathlib import Path

import click

from penumbra.serving import VERSION

ROOT = Path(__file__).resolve().parents[1]


def commit_of(revision: str) -> str:
    """The commit that an image says it was made from (PENUMBRA_REVISION), else that of this checkout; empty where
    neither says."""
    if revision or not (ROOT / ".git").exists():
        return revision
    try:
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() if head.returncode == 0 else ""


def build_facts(revision: str) -> dict[str, str]:
    """`version`, and `commit` where it is known."""
    commit = commit_of(revision)
    return {"version": VERSION} | ({"commit": commit} if commit else {})


def print_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """What `penumbra --version` does."""
    if asked and not context.resilient_parsing:
        facts = build_facts(os.environ.get("PENUMBRA_REVISION", ""))
        click.echo("penumbra, " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))
        context.exit()
