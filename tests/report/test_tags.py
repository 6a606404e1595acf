"""HTML is built so that text from files cannot become markup."""

from __future__ import annotations

import pytest

from rlhf.report.tags import Markup, join, tag


def test_text_and_attributes_are_escaped():
    assert tag("p", "<b> & \"x\" 'y'") == "<p>&lt;b&gt; &amp; &quot;x&quot; &#x27;y&#x27;</p>"
    assert tag("a", href='"><script>') == '<a href="&quot;&gt;&lt;script&gt;"></a>'


def test_markup_is_not_escaped_twice():
    inner = tag("b", "&")
    assert tag("p", inner, ["x<", [inner]], None) == "<p><b>&amp;</b>x&lt;<b>&amp;</b></p>"
    assert isinstance(inner, Markup)
    assert join([]) == ""


def test_attributes():
    assert tag("details", open=True, class_="x", stroke_width="2", id=None, hidden=False) == (
        '<details open class="x" stroke-width="2"></details>'
    )
    assert tag("meta", name="viewport") == '<meta name="viewport">'


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\x9f"])
def test_control_characters_are_replaced(character):
    assert tag("p", f"a{character}b") == "<p>a\ufffdb</p>"


def test_other_scripts_and_line_breaks_stay():
    assert tag("p", "naïve\n\t日本 \u200d👍\ufffd") == "<p>naïve\n\t日本 \u200d👍\ufffd</p>"
