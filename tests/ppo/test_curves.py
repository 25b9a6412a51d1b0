import re
import xml.etree.ElementTree as ET

from components.ppo.curves import PANELS, as_html, as_svg
from components.rlhf.config.ppo import PpoConfig, RolloutConfig

PPO = PpoConfig(rollout=RolloutConfig(num_prompts=16, samples_per_prompt=2))


def history(length: int, *, evals: bool = False) -> list[dict[str, float]]:
    rows = []
    for iteration in range(1, length + 1):
        row = {name: float(iteration * (1 + number)) for number, (name, _) in enumerate(PANELS)}
        row |= {"iteration": float(iteration), "kl/coef": 0.0625}
        if evals and iteration % 2 == 0:
            row["validation/score/mean"] = float(iteration)
        rows.append(row)
    return rows


def test_page_is_self_contained() -> None:
    page = as_html(history(4, evals=True), PPO)
    # The names of XML namespaces and vocabularies look like addresses; nothing fetches them.
    fetched = re.findall(r"""(?:src|href|data|action)\s*=\s*["'](?!#)([^"']*)|url\((?!#)([^)]*)\)|@import""", page)
    assert fetched == []
    assert not re.search(r"<(script|link|iframe|object|embed|img)\b", page)
    svg = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
    assert ET.fromstring(svg).tag.endswith("svg")


def test_page_describes_the_run() -> None:
    page = as_html(history(4), PPO)
    assert page.startswith("<!doctype html>")
    assert "4 iterations of 32 responses; score 1.00 to 4.00, KL 8.00 nats per response, KL coefficient 0.0625." in page


def test_every_panel_is_drawn_with_its_title() -> None:
    svg = as_svg(history(3))
    assert len(re.findall(r'<g id="axes_\d+"', svg)) == len(PANELS) == 9
    for _, title in PANELS:
        assert f"<!-- {title} -->" in svg


def test_validation_passes_are_drawn_as_points() -> None:
    assert "validation prompts" not in as_svg(history(4))
    assert "validation prompts" in as_svg(history(4, evals=True))


def test_one_iteration_can_be_plotted() -> None:
    assert "<svg" in as_html(history(1), PPO)
