import xml.etree.ElementTree as ET

from components.rlhf.page.charts import Series, line_chart
from components.rlhf.page.picture import picture

SVG = "{http://www.w3.org/2000/svg}"


def chart(name: str) -> str:
    return line_chart(name, [0, 1], [Series(name=name, values=[0.0, 1.0], tone="kl")], x_label="step")


def test_charts_are_placed_in_a_grid_with_titles_and_style() -> None:
    panels = [
        (f"<{n}>", chart(f"<{n}>"), [("a & b", "kl"), ("c", "sft")] if n == 0 else [("a", "kl")]) for n in range(4)
    ]
    root = ET.fromstring(picture(panels))
    assert root.tag == f"{SVG}svg" and root.attrib["viewBox"] == "0 0 1176 592"  # 3 x 384 + 24, 2 x 284 + 24
    places = [group.attrib["transform"] for group in root.findall(f"{SVG}g")]
    assert places == ["translate(24 24)", "translate(408 24)", "translate(792 24)", "translate(24 308)"]
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert [text for text in texts if text.startswith("<")] == ["<0>", "<1>", "<2>", "<3>"]
    assert "\u25cf a & b\u25cf c" in texts  # a legend for several lines
    inner = root.findall(f"{SVG}g/{SVG}svg")
    assert [(one.attrib["width"], one.attrib["height"], one.attrib.get("class")) for one in inner] == [
        ("360", "220", None)
    ] * 4
    assert "--kl" in root.findall(f"{SVG}style")[0].text  # type: ignore[operator]


def test_no_charts_are_no_picture() -> None:
    assert picture([]) == ""
