"""Guides and README: every code block is run, in order, on one small experiment."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import yaml
from typer.testing import CliRunner

import spatialvae.cli
from merfish import cli, datasets
from merfish.errors import InputError
from merfish.guides import GUIDES, guide_titles, read_guide
from merfish.guides import __main__ as guides_site
from merfish.pipeline import cluster
from spatialvae import SpatialVAE

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
FEW_STEPS = {"max_steps": 50}
APPS = {"merfish": cli.app, "spatialvae": spatialvae.cli.app}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the guides are run in sequence."""
    return tmp_path_factory.mktemp("guides")


def run_line(line):
    """Run one line of a shell block with the command lines in this process."""
    if wrote := re.fullmatch(r'echo "(.*)" > (\S+)', line):
        Path(wrote[2]).write_text(wrote[1] + "\n")
        return
    name, *arguments = shlex.split(line, comments=True)
    done = CliRunner().invoke(APPS[name], arguments)
    assert done.exit_code == 0, (line, done.output, done.exception)


def run_blocks(text, variables):
    for kind, block in BLOCK.findall(text):
        if kind == "bash":
            for line in filter(None, block.splitlines()):
                run_line(line)
        elif kind == "python":
            exec(compile(block, "guide", "exec"), variables)
        elif kind == "yaml":
            assert yaml.safe_load(block)
        else:
            assert kind == "text", kind


@contextmanager
def local_jobs(jobs, shared):
    """Replace `_slurm_cluster` by a cluster with threads of this process for jobs."""
    from distributed import LocalCluster

    with LocalCluster(1, processes=False, dashboard_address=None) as local:
        yield local


@pytest.mark.usefixtures("short_reports")
@pytest.mark.filterwarnings("ignore:the table lacks")
@pytest.mark.parametrize("name", GUIDES)
def test_guide_runs(name, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(cluster, "_slurm_cluster", local_jobs)
    train = SpatialVAE.train  # `--embed` has no option that limits the epochs
    monkeypatch.setattr(SpatialVAE, "train", lambda self, *given, **named: train(self, *given, **FEW_STEPS | named))
    run_blocks(read_guide(name), {})
    plt.close("all")


def test_every_guide_is_listed_and_shown():
    files = {path.stem for path in Path(sys.modules["merfish.guides"].__file__).parent.glob("*.md")}
    assert files == set(GUIDES)
    listed = CliRunner().invoke(cli.app, ["guide"]).output
    for name, title in guide_titles().items():
        assert f"{name} " in listed
        assert title in listed
    assert "Ctrl-C" in CliRunner().invoke(cli.app, ["guide", "getting-started"]).output


def test_an_unknown_guide_names_those_there_are():
    with pytest.raises(InputError, match=r"'magic': expected one of getting-started"):
        read_guide("magic")


README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:1 cell without counts", "ignore:Number of distinct clusters")
def test_readme_runs_on_real_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(datasets.merfish_raw(), "experiment")  # one of its few cells has no counts
    run_blocks(re.sub(r"^```sh\n.*?^```", "", README, flags=re.M | re.S), {})
    plt.close("all")


def test_readme_has_the_figures_of_its_pages():
    sections = README.split("## Comparison with other tools")[1].split("\n## ")[0].split("\n### ")[1:]
    assert len(sections) == 4
    for section in sections:
        page = (Path(__file__).parents[1] / re.search(r"\((benchmarks/results/\w+\.md)\)", section)[1]).read_text()
        rows = [line for line in section.splitlines() if line.startswith("|")][2:]
        for figure in re.findall(r"(?<![\w.])-?\d+\.\d+", "\n".join(rows)):
            assert re.search(rf"(?<![\d.]){figure}(?!\d)", page), (figure, section[:20])


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target.split("#")[0]).is_file(), target


def test_site_has_a_page_for_every_guide_and_module(tmp_path):
    guides_site.write_sources(tmp_path)
    pages = {path.name for path in tmp_path.iterdir()}
    assert {f"{name}.md" for name in GUIDES} <= pages
    assert {"index.md", "merfish.rst", "merfish.calls.filtering.rst", "spatialvae.model.rst"} <= pages
    assert not [name for name in pages if "._" in name]
    assert "autofunction:: merfish.run\n" in (tmp_path / "merfish.rst").read_text()


def test_site_never_replaces_a_folder_that_is_not_a_site(tmp_path, monkeypatch):
    monkeypatch.setattr(guides_site, "find_spec", lambda name: name)
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="not a site that Sphinx made"):
        guides_site.build_site(tmp_path)
    monkeypatch.setattr(guides_site, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'merfish\[docs\]'"):
        guides_site.build_site(tmp_path / "site")
