"""The report: one file, everything inside, figures of every method."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lrp_prune import circuits
from lrp_prune.circuits.plots import kept_per_layer, overlaps, size_curves
from tests.support.circuit_tasks import small_task
from tests.support.small_models import build

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore:the circuit is evaluated on the prompts")


def results() -> tuple[dict[str, circuits.EvaluationResult], dict[str, circuits.Circuit]]:
    model, task = build("llama"), small_task()
    rankings = {m: circuits.discover(model, task, ["head", "neuron"], m) for m in ("attnlrp", "random <1>")[:1]}
    rankings["random <1>"] = circuits.discover(model, task, ["head", "neuron"], "random")
    found = {name: circuits.evaluate(model, one, task, [0, 9, 104], seeds=[0, 1]) for name, one in rankings.items()}
    return found, {name: one.at(9) for name, one in rankings.items()}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.slow
def test_the_report_is_one_file_with_all_in_it(tmp_path: Path) -> None:
    evaluations, found = results()
    circuits.save_report(tmp_path / "report.html", evaluations, found, title="IOI & more")
    html = (tmp_path / "report.html").read_text()
    assert "IOI &amp; more" in html and "random &lt;1&gt;" in html and "<1>" not in html
    tags = Tags()
    tags.feed(html)
    images = [attributes for tag, attributes in tags.found if tag == "img"]
    assert len(images) == 4  # faithfulness, accuracy, layers, overlaps
    for image in images:
        kind, data = str(image["src"]).split(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG") and image["alt"]
    assert not re.search(r'(src|href)="(?!data:)', html)
    for result in evaluations.values():
        assert f"{result.cpr:.3f}" in html and f"{result.cmd:.3f}" in html


@pytest.mark.slow
def test_figures_show_the_values() -> None:
    evaluations, found = results()
    (axes,) = size_curves(evaluations).axes
    for line, result in zip(axes.get_lines(), evaluations.values(), strict=False):
        assert line.get_ydata() == pytest.approx(result.faithfulness.tolist())
        assert line.get_xdata() == pytest.approx([100 * share for share in result.fractions])
    panels = kept_per_layer(found).axes
    assert len(panels) == 2 and len(panels[0].get_lines()) == 2
    drawn = sum(int(sum(panel.get_lines()[0].get_ydata())) for panel in panels)
    assert drawn == found["attnlrp"].size
    assert next(text.get_text() for text in overlaps(found).axes[0].texts) == "1.00"


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    model, task = build("llama"), small_task()
    ranking = circuits.discover(model, task, "head", "random")
    mixed = {ablation: circuits.evaluate(model, ranking, task, [1, 4], ablation) for ablation in ("zero", "mean")}
    with pytest.raises(ValueError, match="differ in ablation"):
        circuits.save_report(tmp_path / "report.html", mixed)
    with pytest.raises(ValueError, match="no results"):
        circuits.save_report(tmp_path / "report.html", {})
