"""The comparison of turned views runs, leaves training patients out and takes differences patient by patient."""

import pandas as pd
import pytest

from medvisionllama import api
from medvisionllama.data.phantom import write_phantoms
from medvisionllama.run_dir import RunDir


@pytest.mark.usefixtures("one_thread")
def test_every_way_of_every_scan_that_did_not_train(module, slim, tmp_path):
    data = write_phantoms(tmp_path / "phantoms", num_cases=8, shape=(20, 24, 16))
    run = tmp_path / "run"
    api.train(data, out=run, cases=3, epochs=1, overrides=slim, test=False)
    table = module("views").compare(run, every=2)
    trained = RunDir(run).read_manifest()["cases"]["train"]
    assert len(trained) == 3
    assert not set(table["case_id"]) & set(trained)
    # Each second of five scans, looked at and cleaned in two ways each, of two classes.
    assert len(table) == 3 * 2 * 2 * 2


def test_the_difference_is_that_of_patients(module):
    rows = [
        (patient, case, views, components, dice)
        for components in ("all components", "largest")
        for views, gain in (("as it is", 0.0), ("turned too", 0.2))
        for patient, case, dice in (("a", "a1", 0.5 + gain), ("a", "a2", 0.5 + gain), ("b", "b1", 0.5))
    ]
    table = pd.DataFrame(rows, columns=["patient_id", "case_id", "views", "components", "dice"])
    for line in module("views").summarise(table).to_dict(orient="records"):
        assert line["difference"] == pytest.approx(0.1)
        assert (line["patients"], line["better"]) == (2, 1)
