"""The table of vision families: a family goes through its columns, a run goes on, and a page says what was found."""

import json
from pathlib import Path

import pytest

from tests.conformance import vision
from tests.conformance.record import passed
from tests.conformance.workers import each
from tests.support.vision_families import families, variant


@pytest.mark.slow
@pytest.mark.parametrize("family", ["timm/xcit", "timm/edgenext", "timm/gcvit", "torchvision/shufflenetv2"])
def test_families_conserve_and_compute_what_they_did(family: str) -> None:
    entry = vision.check(*family.split("/"), ["forward", "conserves", "attnlrp"])
    assert passed(entry), entry


@pytest.mark.slow
@pytest.mark.parametrize("family", ["timm/resnet", "timm/vision_transformer"])
def test_units_of_families_are_what_they_own(family: str) -> None:
    """The columns of transformers' table, on models with biases."""
    entry = vision.check(*family.split("/"), ["weights", "neurons", "heads", "blocks"])
    assert passed(entry), entry
    assert entry["columns"]["neurons"]["figure"] > 5 and entry["columns"]["blocks"]["figure"] > 3
    told = entry["columns"]["heads"]
    assert told["status"] == "passed" if "transformer" in family else "no head" in told["why"]


def test_a_limit_of_time_is_one_that_the_system_takes() -> None:
    (_, result), *_ = each([0], lambda task: task + 1, seconds=vision._options([]).seconds)
    assert result == 1


@pytest.mark.slow
def test_a_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    record = tmp_path / "vision.jsonl"
    options = ["--only", "timm/byobnet", "--record", str(record), "--docs", str(tmp_path), "--columns"]
    vision.main([*options, "conserves"])
    vision.main([*options, "conserves", "attnlrp"])
    vision.main([*options, "conserves", "attnlrp"])
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [sorted(line["columns"]) for line in lines] == [["conserves"], ["attnlrp", "conserves"]]
    assert variant("timm", "byobnet") == "test_byobnet" and ("torchvision", "resnet") in families()


def test_the_page_tells_what_failed_and_what_was_refused() -> None:
    entries = {
        "timm/good": {"mapping": "timm", "type": "good", "columns": {"conserves": {"status": "passed"}}},
        "timm/bad": {
            "mapping": "timm",
            "type": "bad",
            "columns": {
                "conserves": {"status": "failed", "why": "half is missing"},
                "heads": {"status": "refused", "why": "ResNet has no heads"},
            },
        },
        "timm/none": {"mapping": "timm", "type": "none", "built": "ValueError: no image"},
    }
    page = vision.page(entries)
    assert "| timm | 1 | 2 | 3 | 1 of 2 | 1 of 1 (1 none) |" in page
    assert "vision.py --columns conserves heads`" in page and "attnlrp" not in page
    assert "* `timm/bad`: **conserves**: half is missing" in page and "refused: it has no heads" in page
    assert "* `timm/none`: **built**: ValueError: no image" in page
