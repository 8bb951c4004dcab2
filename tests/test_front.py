"""What a visitor meets first: a README in order, a container that sets itself up."""

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_has_its_parts_in_order():
    text = (ROOT / "README.md").read_text("utf-8")
    order = [
        "![",
        "numbers: ladder",
        "make course",
        "## Which edition",
        "numbers: notebooks",
        "Laptop and GPU",
        "numbers: methods",
    ]
    places = [text.index(word) for word in order]
    assert places == sorted(places)


def test_the_container_is_set_up_by_make_env_and_uses_its_python():
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
    assert "python:3.11" in settings["image"] and settings["postCreateCommand"] == "make env"
    python = settings["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert python.endswith("/.venv/bin/python") and re.search(r"^env:", (ROOT / "Makefile").read_text(), re.M)


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert "2205.05638" in citation["references"][0]["notes"]
