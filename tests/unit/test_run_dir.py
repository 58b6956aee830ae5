"""What a run says of its machine."""

import pytest

from medvisionllama.run_dir import RunDir, processor_name

CPUINFO = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: {name}
flags\t\t: fpu avx2

processor\t: 1
cpu family\t: 25
model\t\t: 17
model name\t: {name}
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AMD EPYC", "AMD EPYC (family 26, model 2)"),
        ("AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654 96-Core Processor"),
        ("Xeon(R) Processor @ 2.50GHz", "Xeon(R) Processor @ 2.50GHz (family 26, model 2)"),
        ("Xeon(R) Gold 6348 CPU @ 2.60GHz", "Xeon(R) Gold 6348 CPU @ 2.60GHz"),
    ],
)
def test_processor_that_hides_its_number_is_told_by_its_family(name: str, expected: str) -> None:
    assert processor_name(CPUINFO.format(name=name)) == expected


def test_processor_of_another_kind_keeps_its_name() -> None:
    assert processor_name("Processor\t: ARM\nmodel name\t: Neoverse\n") == "Neoverse"


def test_a_run_may_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDir("~/runs/hip").config == tmp_path / "runs" / "hip" / "config.yaml"
