from pathlib import Path
from typing import Any

from components.rlhf.config.params import Params
from pipelines.local.report import complete_report
from tests.rlhf.config.test_settings import minimal_params
from tests.support.html_page import parse

PAGE = "<!doctype html><p>a</p><!-- costs -->part<!-- /costs --><!-- settings --><!-- /settings -->"


def stage(seconds: float, gib: float, **memory: float) -> dict[str, Any]:
    return {"seconds": seconds, "peak_memory_bytes": int(gib * 2**30), "memory": memory}


def test_report_gets_the_cost_of_all_stages_and_the_parameters(tmp_path: Path) -> None:
    params = Params.model_validate(
        minimal_params()
        | {
            "cluster": {
                "profiles": {"cpu": {}, "gpu": {"price_per_hour": 4.0}},
                "default_profile": "cpu",
                "stages": {"ppo": "gpu", "evaluation": "gpu"},
            }
        }
    )
    page = tmp_path / "report.html"
    page.write_text(PAGE, encoding="utf-8")
    stages = {
        "import_model": stage(30.0, 0.0),
        "ppo": stage(1800.0, 9.0, planned_gib=2.0, peak_gib=2.5),
        "evaluation": stage(90.0, 1.5),
        "evaluation-2": stage(90.0, 1.5),
    }
    complete_report(page, params, stages, "uri: https://me:secret-word@example.com\n")
    text = parse(page.read_text(encoding="utf-8")).text
    assert "stage time price planned, GiB measured, GiB planned / measured import_model 0:30" in text
    assert "ppo 30:00 2.00 2.00 2.50 0.80 evaluation 1:30 0.10 1.50 evaluation-2 1:30 0.10 1.50" in text
    assert "all 33:30 2.20 2.50" in text
    assert "uri: https://" in text and "secret-word" not in text and "part" not in text
