"""Pages and figures: that what they show is what was found, and that no text in them is taken for code."""

import base64
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune.figures import new_figure, saved
from lrp_prune.visualization import Explanation, Pixels, Tokens, plot_by_layer, plot_heads
from lrp_prune.visualization.colours import colour_of, hexadecimal
from tests.support.small_models import batch_for, build


def of_tokens(labels: list[str], values: list[float], kind: str = "tokens") -> Explanation:
    number = len(labels)
    part = Tokens(torch.tensor([values]), (tuple(labels),), (tuple(range(number)),), ((True,) * number,), kind)
    return Explanation({"input_ids": part}, torch.tensor([sum(values)]), "the logit of 1", "attnlrp")


class Reader(HTMLParser):
    """What a page says: its tags, and its tokens with colour and title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[tuple[str, str, str]] = []
        self._attributes: dict[str, str | None] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._attributes = dict(attrs) if tag == "span" and "title" in dict(attrs) else None

    def handle_data(self, data: str) -> None:
        if self._attributes is not None:
            self.tokens.append((data, str(self._attributes["style"]), str(self._attributes["title"])))

    def handle_endtag(self, tag: str) -> None:
        self._attributes = None


def test_every_token_is_on_the_page_in_its_colour() -> None:
    page = Reader(of_tokens(["for", " against", " nothing"], [2.0, -1.0, 0.0]).html())
    assert [(text, title) for text, _, title in page.tokens] == [
        ("for", "+2"),
        (" against", "-1"),
        (" nothing", "+0"),
    ]
    for (_, style, _), share in zip(page.tokens, (1.0, -0.5, 0.0), strict=True):
        assert f"background:{hexadecimal(share)}" in style


def test_text_is_never_code() -> None:
    evil = ["<script>alert(1)</script>", '" onload="x', "&lt;", "</span></div>", "a\nb"]
    explanation = of_tokens(evil, [1.0] * 5)
    named = Explanation({"<img src=x>": explanation.inputs["input_ids"]}, explanation.values, "<b>x</b>", "<i>")
    page = Reader(named.html())
    assert set(page.tags) <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "p",
        "section",
        "h2",
        "h3",
        "div",
        "span",
    }
    assert [text for text, _, _ in page.tokens] == [*evil[:4], "a↵\nb"]


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    explanation = lrp_prune.explain(build("vit"), batch_for("vit"), target=1)
    page = explanation.html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", page)
    assert explanation._repr_html_() == page


def test_a_long_title_takes_two_lines_and_ends_with_what_it_is_by_way_of() -> None:
    target = "the logit of 4, 3, 2, 1, ... (6 samples) by way of model.layers.11.mlp.down_proj[1234]"
    title = replace(of_tokens(["a"], [1.0]), target=target).plot()._suptitle.get_text()
    assert len(title.splitlines()) == 2 and " ".join(title.split()).endswith(target)
    longer = replace(of_tokens(["a"], [1.0]), target="word " * 100).plot()._suptitle.get_text()
    assert len(longer.splitlines()) == 2 and longer.endswith("...")


def test_images_on_a_page_are_the_images() -> None:
    image = torch.zeros(1, 1, 2, 3)
    image[0, 0, 0, 2] = 1
    relevance = torch.zeros(1, 1, 2, 3)
    relevance[0, 0, 1, 0], relevance[0, 0, 1, 1] = 4.0, -4.0
    page = Explanation({"x": Pixels(relevance, image)}, torch.zeros(1), "a", "b").html()
    rows = []
    for data in re.findall(r"base64,([^\"]*)", page):
        png = base64.b64decode(data)
        size = int.from_bytes(png[png.index(b"IDAT") - 4 : png.index(b"IDAT")], "big")
        start = png.index(b"IDAT") + 4
        raw = zlib.decompress(png[start : start + size])
        rows.append([tuple(raw[r * 10 + 1 + 3 * c : r * 10 + 4 + 3 * c]) for r in range(2) for c in range(3)])
    black, white = (0, 0, 0), (255, 255, 255)
    assert rows[0] == [black, black, white, black, black, black]
    assert rows[1][:3] == rows[0][:3] and rows[1][5] == black
    assert rows[1][3] == tuple(round(0.75 * channel) for channel in colour_of(1.0))
    assert rows[1][4] == tuple(round(0.75 * channel) for channel in colour_of(-1.0))


@pytest.mark.slow
def test_figures_show_text_images_and_bars(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = of_tokens(["Price", " $5", " \n", " end"], [2.0, -1.0, 0.0, 0.5])
    figure = text.plot(tmp_path / "text.png")
    assert (tmp_path / "text.png").stat().st_size > 1000
    assert [each.get_text() for each in figure.axes[0].texts] == ["Price", " $5", " ↵", " end"]
    boxes = [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]
    assert boxes[0] == pytest.approx([channel / 255 for channel in colour_of(1.0)])
    bars = of_tokens(["a", "b"], [2.0, -1.0], "features").plot()
    assert [bar.get_height() for bar in bars.axes[0].patches] == [2.0, -1.0]
    image = lrp_prune.explain(build("vit"), batch_for("vit"), target=1)
    drawn = image.plot(samples=1)
    assert len(drawn.axes) == 4 and "the first 1 of 2 samples" in drawn.get_suptitle()
    shown = drawn.axes[2].images[0].get_array()
    assert torch.tensor(shown).allclose(image.inputs["pixel_values"].heat[0])
    with pytest.raises(ValueError, match="samples must be 1 or more"):
        image.plot(samples=0)


@pytest.mark.slow
def test_long_texts_go_on_in_the_next_line_and_stay_within_the_figure() -> None:
    pytest.importorskip("matplotlib")
    figure = of_tokens([" word"] * 100, [1.0] * 100).plot()
    axes = figure.axes[0]
    assert len({patch.get_y() for patch in axes.patches}) > 3
    assert all(patch.get_x() + patch.get_width() <= axes.get_xlim()[1] for patch in axes.patches)
    assert all(patch.get_y() + patch.get_height() <= axes.get_ylim()[0] for patch in axes.patches)


def test_a_word_that_is_longer_than_a_line_is_shortened_to_it() -> None:
    pytest.importorskip("matplotlib")
    explanation = of_tokens(["a", " word", "w" * 300, " end"], [1.0, -1.0, 0.5, 0.2])
    (axes,) = explanation.plot().axes
    texts, boxes = [text.get_text() for text in axes.texts], axes.patches
    assert texts[2].startswith("www") and texts[2].endswith("www") and "…" in texts[2] and len(texts[2]) > 80
    assert max(box.get_x() + box.get_width() for box in boxes) <= axes.get_xlim()[1]


def test_names_with_dollars_are_no_formulas_and_long_ones_leave_room(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model, names = nn.Linear(3, 2), ["cost $a_{$", "$half", "of all that " * 20]
    explanation = lrp_prune.explain(model, torch.randn(1, 3), features=names)
    named = replace(
        explanation,
        target="the logit of '$x_{$'",
        layers={f"{'layer.' * 20}{at}": torch.randn(1, 3) for at in range(2)},
    )
    figure = named.plot(tmp_path / "bars.png")
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()[:2]] == names[:2]
    layers = named.plot_layers(tmp_path / "layers.png")
    ticks = [tick.get_text() for tick in layers.axes[0].get_yticklabels()]
    assert all(
        len(tick) <= 48 and tick.startswith("layer.") and tick.endswith(f"layer.{at}") for at, tick in enumerate(ticks)
    )
    box = layers.axes[0].get_position()
    assert box.width > 0.3 and box.height > 0.3


@pytest.mark.filterwarnings("error")
def test_bars_with_long_names_and_powers_of_ten(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = new_figure(8, 4)
    left, right = figure.subplots(1, 2)
    left.barh(["a $name$ that " * 8, "another"], [1.0, 2.0])
    right.plot([1.0, 1e4], [1, 2])
    right.set_xscale("log")
    saved(figure, tmp_path / "bars.png")
    names = [tick.get_text() for tick in left.get_yticklabels()]
    assert names[1] == "another" and len(names[0]) == 48 and names[0].startswith("a $name$ that")
    assert all(tick.get_parse_math() for tick in right.get_xticklabels())
    assert not any(tick.get_parse_math() for tick in left.get_yticklabels())


@pytest.mark.slow
def test_relevance_through_layers_and_of_heads_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    model, batch = build("llama"), batch_for("llama")
    found = lrp_prune.explain(model, batch, target=5, latent=["model.layers.?"])
    axes = found.plot_layers(sample=1).axes[0]
    expected = found.layers["model.layers.1"][1]
    row = torch.as_tensor(axes.images[0].get_array())[1]
    torch.testing.assert_close(row.float(), expected / expected.abs().sum())
    assert [text.get_text() for text in axes.get_xticklabels()] == list(found.inputs["input_ids"].labels[1])
    with pytest.raises(ValueError, match="pass latent="):
        lrp_prune.explain(model, batch, target=5).plot_layers()
    heads = lrp_prune.attribute(model, [batch], target="last_token", granularity="head")
    shown = torch.as_tensor(plot_heads(heads).axes[0].images[0].get_array())
    torch.testing.assert_close(shown.float(), torch.stack(list(heads.values())))
    bars = [bar.get_width() for bar in plot_by_layer(heads).axes[0].patches]
    assert sum(bars) == pytest.approx(100)
    with pytest.raises(ValueError, match="must be of heads"):
        plot_heads(lrp_prune.attribute(nn.Linear(3, 2), [torch.ones(1, 3)], target="last_token"))


def test_colours_go_from_blue_over_white_to_red() -> None:
    red, blue = colour_of(1.0), colour_of(-1.0)
    assert red[0] > red[2] and blue[2] > blue[0]
    assert [sum(colour_of(share / 10)) for share in range(11)] == sorted(
        (sum(colour_of(share / 10)) for share in range(11)), reverse=True
    )
    assert colour_of(float("nan")) == (255, 255, 255)
