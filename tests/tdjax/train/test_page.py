"""The page of a run: every number has a curve, whatever stands in the file."""

import html.parser
import re

import pytest

from tdjax.train import metrics, page


class Tags(html.parser.HTMLParser):
    """Counts elements."""

    def __init__(self, text):
        super().__init__()
        self.seen = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1


def test_a_page_has_a_curve_for_every_number(tmp_path):
    with metrics.Metrics(tmp_path) as out:
        for step in range(1, 2001):
            out.write(step, {"a/loss": 1.0 / step, "b": float("nan") if step % 2 else 3.0})
        out.write(2001, {"<c>": 5.0})
    path = page.write(tmp_path, "rcm & more", {"run.seed": "0", "data.path": "<x>"})
    text = path.read_text()
    seen = Tags(text).seen
    assert (seen["figure"], seen["polyline"], seen["tr"]) == (3, 3, 2)
    assert "script" not in seen and "http" not in text
    assert "rcm &amp; more" in text and "&lt;c&gt;: 5" in text and "&lt;x&gt;" in text
    assert text.index("a/loss") < text.index("<figcaption>b")
    assert "Step 2001." in text
    assert len(text) < 60_000


def test_a_run_without_numbers_has_a_page(tmp_path):
    assert "Step 0." in page.write(tmp_path, "new", {}).read_text()


@pytest.mark.parametrize(
    ("values", "heights"),
    [([1, 2, 3], [178, 94, 10]), ([1, 100, 10_000], [178, 94, 10]), ([7, 7, 7], [94, 94, 94])],
)
def test_far_values_lie_on_a_logarithmic_axis(values, heights):
    line = re.search(r'points="([^"]*)"', page.plot(list(enumerate(values))))[1]
    found = [tuple(map(float, point.split(","))) for point in line.split()]
    assert [x for x, _ in found] == [62, 237, 412]
    assert [y for _, y in found] == pytest.approx(heights)
